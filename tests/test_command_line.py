"""What all tools have in common: strict flags, one paragraph for bad input, quiet ends."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence

import pytest

from megatron_eslm.command_line import OnOff, Parser, command
from megatron_eslm.errors import ConfigError, Failure


def parser() -> Parser:
    made = Parser("What it does.\n\n    example --kind one")
    made.add_argument("files", nargs="*")
    made.add_argument("--kind", choices=("ByteTokenizer", "GPT2BPETokenizer"))
    made.add_argument("--share", type=float, default=0.5)
    made.add_argument("--output-prefix", default="out")
    made.add_argument("--prompt", action="append", type=str)
    made.add_argument("--labels", nargs="+")
    made.add_argument("--overwrite", action="store_true")
    made.add_argument("--balance", action=OnOff, default=True)
    return made


def test_what_is_given_is_taken() -> None:
    args = parser().parse_args(
        ["a", "--prompt", "", "--prompt", "x", "--overwrite", "--no-balance", "--share", "1e-3"]
    )
    assert (args.files, args.prompt, args.overwrite, args.balance) == (
        ["a"],
        ["", "x"],
        True,
        False,
    )
    assert (args.share, args.output_prefix, args.labels) == (1e-3, "out", None)
    assert parser().parse_args([]).overwrite is False
    again = parser()
    for _ in range(2):  # what one parsing has seen is not held against the next
        assert again.parse_args(["--share", "1"]).share == 1.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kind", "bytes"], "--kind: 'bytes' is not one of .* Did you mean ByteTokenizer\\?$"),
        (["--outputprefix", "x"], "no option --outputprefix. Did you mean --output-prefix\\?$"),
        (["--output", "x"], "There is no option --output\\."),
        (["--output-prefix", ""], "--output-prefix: its value is empty; give one, or leave"),
        (["--output-prefix="], "--output-prefix: its value is empty"),
        (["--labels", "a", ""], "--labels: its value is empty"),
        (["--share", "nan"], "--share: nan is not a finite number\\.$"),
        (["--share", "half"], "--share: 'half' is not a number\\.$"),
        (["--share", "1", "--share", "1"], "--share is given twice; leave one out\\.$"),
        (["--labels", "a", "--labels", "b"], "--labels is given twice; give all values after one"),
        (["--overwrite", "--overwrite"], "--overwrite is given twice"),
        (["--no-balance", "--balance"], "--no-balance and --balance are given; leave one out"),
        (["--share"], "--share: expected one argument\\.$"),
    ],
)
def test_what_cannot_be_used_is_one_paragraph(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parser().parse_args(words)
    assert "\n" not in str(caught.value)


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The exit code of a command that writes a lot to a file of a kind."""

    def end(descriptor: int, write: Callable[[], None]) -> int:
        @command
        def main(argv: Sequence[str] | None = None) -> int:
            write()
            return 0

        with os.fdopen(descriptor, "w") as file:
            monkeypatch.setattr(sys, "stdout", file)
            code = main([])
        return code  # closing the file had nothing left to fail at

    return end


def unread_pipe() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def through_logging() -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.emit(logging.LogRecord("x", logging.INFO, "", 0, "x" * 100, None, None))


@pytest.mark.parametrize(
    "write", [lambda: print("x"), lambda: print("x" * 10**6), through_logging], ids="abc"
)
def test_output_that_nobody_takes(
    ending: Callable[..., int], write: Callable[[], None], capfd: pytest.CaptureFixture
) -> None:
    """`| head` is no failure; a full disk is one, in a line."""
    assert ending(unread_pipe(), write) == 141
    assert capfd.readouterr().err == ""
    assert ending(os.open("/dev/full", os.O_WRONLY), write) == 1
    message = "error: standard output cannot be written: No space left on device.\n"
    assert capfd.readouterr().err == message


def test_ends_of_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    @command
    def main(argv: Sequence[str] | None = None) -> int:
        assert argv is not None
        if argv[0] == "bad":
            raise ConfigError("--flag is wrong.")
        if argv[0] == "failed":
            raise Failure("It did not work.")
        if argv[0] == "interrupted":
            raise KeyboardInterrupt
        print("said")
        return int(argv[0])

    assert main(["1"]) == 1 and capsys.readouterr().out == "said\n"
    assert main(["bad"]) == 2 and capsys.readouterr().err == "error: --flag is wrong.\n"
    assert main(["failed"]) == 1 and capsys.readouterr().err == "error: It did not work.\n"
    assert main(["interrupted"]) == 130 and capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "argv", ["tool", "0"])
    assert main() == 0
    monkeypatch.setattr(sys, "stdout", None)  # `>&-`
    assert main(["0"]) == 0
