"""What all command lines have in common: how they read flags, say what is wrong, and end."""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn, Protocol, TextIO

from megatron_eslm.errors import ConfigError, Failure, did_you_mean
from megatron_eslm.files.stopped import Stopped

BROKEN_PIPE_CODE = 128 + 13
"""Exit code where nobody reads the output any more, as of a program that SIGPIPE ends."""
INTERRUPTED_CODE = 128 + 2
"""Exit code after SIGINT."""


def whole_number(text: str) -> int:
    """An integer from a flag; ArgumentTypeError says what is wrong."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def finite_number(text: str) -> float:
    """A float from a flag, neither nan nor inf; ArgumentTypeError says what is wrong."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def some_text(text: str) -> str:
    """Text from a flag, such as a path, that is not empty: "$UNSET" in a script is."""
    if not text:
        raise argparse.ArgumentTypeError("its value is empty; give one, or leave the flag out")
    return text


def not_among(value: Any, choices: Iterable[Any]) -> str:
    """What to say of a value that is none of the choices: those there are, and the nearest."""
    known = list(map(str, choices))
    hint = did_you_mean(str(value), known, cutoff=0.4)
    return f"{str(value)!r} is not one of {', '.join(known)}.{hint}"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reads strictly and whose errors are ConfigErrors of one paragraph.

    Flags are not abbreviated and are given once, unless their action is "append". Numbers are
    finite. Text is not empty, unless its type is declared to be `str`.
    """

    def __init__(self, description: str | None = None, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(description=description, allow_abbrev=False, **kwargs)
        self._given: dict[str, str] = {}
        self.register("type", int, whole_number)
        self.register("type", float, finite_number)
        self.register("type", None, some_text)
        self.register("action", None, _Store)
        self.register("action", "store", _Store)
        self.register("action", "store_true", _StoreTrue)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As of any parser; what was given before is forgotten."""
        self._given.clear()
        return super().parse_known_args(args, namespace)

    def once(self, action: argparse.Action, flag: str | None) -> None:
        """Note that a flag is given; an error if it was before."""
        if flag is None:  # a positional argument
            return
        before = self._given.get(action.dest)
        if before is not None:
            what = f"{flag} is given twice" if flag == before else f"{before} and {flag} are given"
            remedy = "give all values after one" if action.nargs == "+" else "leave one out"
            raise ConfigError(f"{what}; {remedy}.")
        self._given[action.dest] = flag

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, not_among(value, action.choices))

    def error(self, message: str) -> NoReturn:
        """Raise what argparse has to say as a ConfigError."""
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            unknown = message.removeprefix(prefix).split()[0]
            if not unknown.startswith("-"):
                raise ConfigError(f"{unknown!r} belongs to no option. See --help.")
            known = [flag for action in self._actions for flag in action.option_strings]
            hint = did_you_mean(unknown.split("=")[0], known) or " See --help for those there are."
            raise ConfigError(f"There is no option {unknown}.{hint}")
        message = " ".join(message.removeprefix("argument ").split())
        raise ConfigError(message if message[-1:] in ".?" else f"{message}.")


class _Store(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, flag: str | None = None) -> None:
        parser.once(self, flag)
        setattr(namespace, self.dest, values)


class _StoreTrue(argparse.Action):
    def __init__(self, option_strings: Any, dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **{"default": False, **kwargs})

    def __call__(self, parser: Any, namespace: Any, values: Any, flag: str | None = None) -> None:
        parser.once(self, flag)
        setattr(namespace, self.dest, True)


class OnOff(argparse.BooleanOptionalAction):
    """--flag and --no-flag, of which one is given, once."""

    def __call__(self, parser: Any, namespace: Any, values: Any, flag: str | None = None) -> None:
        """Store whether it is on."""
        parser.once(self, flag)
        super().__call__(parser, namespace, values, flag)


class Main(Protocol):
    """A command."""

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        """Run with these flags, by default those of the command line; the exit code."""
        ...


def command(main: Callable[[Sequence[str]], int]) -> Main:
    """Make a tool's `main(argv)`, which returns an exit code, end as every tool does.

    Bad input (ConfigError) is one paragraph and code 2, a Failure one and code 1. Ctrl-C and a
    reader that is gone (`| head`) end without a word, with the codes that the signals would give;
    output that cannot be written is named, code 1.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            with _watched_output():
                return main(sys.argv[1:] if argv is None else argv)
        except ConfigError as error:
            return _complain(str(error), 2)
        except Failure as error:
            return _complain(str(error), 1)
        except Stopped as stop:
            sys.stderr.write(f"{stop}; {stop.remains}\n")
            return stop.exit_code
        except KeyboardInterrupt:
            return INTERRUPTED_CODE
        except _OutputLost as lost:
            if lost.error.errno == errno.EPIPE:
                return BROKEN_PIPE_CODE
            return _complain(f"standard output cannot be written: {lost.error.strerror}.", 1)

    return run


def _complain(message: str, code: int) -> int:
    sys.stderr.write(f"error: {message}\n")
    return code


class _OutputLost(BaseException):
    """Standard output cannot be written. Not an Exception: logging would catch it and go on."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


class _Watched:
    """Standard output whose failures can be told from those of other files."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._losses():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._losses():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _losses(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # What is left in the buffer would be written at the interpreter's end and fail again.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            raise _OutputLost(error) from error


@contextlib.contextmanager
def _watched_output() -> Iterator[None]:
    if sys.stdout is None:  # closed by whoever started us
        yield
        return
    watched = _Watched(sys.stdout)
    with contextlib.redirect_stdout(watched):
        try:
            yield
        finally:
            watched.flush()
