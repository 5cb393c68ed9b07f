"""The program megatron-eslm, and what all of its commands have in common."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_eslm.__main__ import main, summary
from megatron_eslm.commands import COMMANDS
from megatron_eslm.config.flags import field_help

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "megatron_eslm" / "commands"
OTHERS = [name for name in COMMANDS if name != "pretrain"]
"""Commands that return: `pretrain` ends its process."""
HEAVY = ("pretrain", "plan")
"""Commands whose flags are those of components that need torch."""


@pytest.fixture(autouse=True)
def _argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["megatron-eslm"])


def test_every_module_is_a_command_and_every_tool_is_one() -> None:
    modules = {path.stem for path in FOLDER.glob("*.py")} - {"__init__"}
    assert modules == {name.replace("-", "_") for name in COMMANDS}
    scripts = [*(ROOT / "tools").glob("*.py"), ROOT / "pretrain_gpt.py"]
    imported = {
        line.split()[1].rpartition(".")[2]
        for script in scripts
        for line in script.read_text().splitlines()
        if line.startswith("from megatron_eslm.commands.")
    }
    assert imported == modules - {"doctor"}


def test_help_lists_all_of_them(capsys: pytest.CaptureFixture) -> None:
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert main([]) == 0 and capsys.readouterr().out == listed
    for name in COMMANDS:
        assert f"\n  {name} " in listed and f" {summary(name)}\n" in listed
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("megatron-eslm 0.")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("preprocesz", "error: There is no command 'preprocesz'. Did you mean preprocess?\n"),
        ("Plan", "error: There is no command 'Plan'. Did you mean plan?\n"),
        ("--zzz", "error: There is no command '--zzz'. See megatron-eslm --help.\n"),
        ("", "error: There is no command ''. See megatron-eslm --help.\n"),
    ],
)
def test_what_is_no_command(word: str, message: str, capsys: pytest.CaptureFixture) -> None:
    assert main([word, "--flag"]) == 2
    assert capsys.readouterr() == ("", message)


@pytest.mark.parametrize("name", OTHERS)
def test_each_ends_as_all_do(name: str, capsys: pytest.CaptureFixture) -> None:
    assert main([name, "--no-such-flag=1"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: megatron-eslm {name} ") and f"    megatron-eslm {name}" in out


def test_flags_are_explained() -> None:
    """By the text under each field."""
    for name in OTHERS:
        module = importlib.import_module(f"megatron_eslm.commands.{name.replace('-', '_')}")
        named = [cls for cls in vars(module).values() if isinstance(cls, type)]
        for cls in (cls for cls in named if dataclasses.is_dataclass(cls)):
            for field in dataclasses.fields(cls):
                assert field_help(cls).get(field.name), f"{cls.__name__}.{field.name}"


def test_help_needs_no_torch() -> None:
    names = [f"megatron_eslm.commands.{n.replace('-', '_')}" for n in COMMANDS if n not in HEAVY]
    script = f"import sys, megatron_eslm.__main__, {', '.join(names)}"
    subprocess.run(
        [sys.executable, "-c", f"{script}\nassert 'torch' not in sys.modules"],
        check=True,
        cwd=ROOT,
    )
