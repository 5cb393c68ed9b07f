"""`megatron-eslm NAME ...`, the same as `python -m megatron_eslm NAME ...`.

Nothing is imported but the module of the command that is asked for: `pretrain` minds signals
before imports that take seconds.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence

from megatron_eslm.commands import COMMANDS


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: its name and flags; by default those of the command line.

    Returns:
        The exit code; `pretrain` ends the process itself.
    """
    name, *words = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    if name not in COMMANDS:
        return _without_command(name)
    sys.argv = [f"megatron-eslm {name}", *words]  # the name of the program in the command's help
    return importlib.import_module(_module(name)).main(words)


def _module(name: str) -> str:
    return f"megatron_eslm.commands.{name.replace('-', '_')}"


def _without_command(word: str) -> int:
    from megatron_eslm import __version__
    from megatron_eslm.command_line import command
    from megatron_eslm.errors import ConfigError, did_you_mean

    @command
    def answer(words: Sequence[str]) -> int:
        if word in ("-h", "--help"):
            sys.stdout.write(_help())
            return 0
        if word == "--version":
            sys.stdout.write(f"megatron-eslm {__version__}\n")
            return 0
        hint = did_you_mean(word, COMMANDS, cutoff=0.4) or " See megatron-eslm --help."
        raise ConfigError(f"There is no command {word!r}.{hint}")

    return answer([])


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = "".join(f"  {name:<{width}}  {summary(name)}\n" for name in COMMANDS)
    return (
        "usage: megatron-eslm COMMAND [FLAG ...]\n\n"
        "Pretrain GPT models with selection in the training step.\n\n"
        f"{lines}\nmegatron-eslm COMMAND --help has the flags of each.\n"
    )


def summary(name: str) -> str:
    """The first line of a command's docstring, read without running its imports."""
    import ast

    spec = importlib.util.find_spec(_module(name))
    assert spec is not None and spec.origin is not None
    with open(spec.origin, encoding="utf-8") as file:
        text = ast.get_docstring(ast.parse(file.read()))
    assert text
    return text.partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
