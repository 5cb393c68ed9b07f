"""README and docs/: links lead somewhere, commands exist, examples work."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from megatron_eslm.config.flags import options
from megatron_eslm.config.run import GROUPS, PAGES
from megatron_eslm.limits import flag_of
from megatron_eslm.selection.policy import SelectionPolicy
from megatron_eslm.selection.registry import POLICIES
from megatron_eslm.selection.selection_options import SelectionOptions
from megatron_eslm.selection.state import Peers, SelectionState

from .selection.scoring import scored

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
EXTENDING = ROOT / "docs" / "extending.md"


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=named)
def test_links_lead_to_files(path: Path) -> None:
    text = re.sub(r"`[^`]*`", "", path.read_text())
    for target in re.findall(r"\]\(<?([^)>#]+)", text):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


WORKED_EXAMPLE = {
    "megatron_eslm/selection/policies/longest.py",
    "tests/selection/test_longest.py",
}
"""What the reader of docs/extending.md writes."""


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_files_that_are_named_exist(path: Path) -> None:
    """From the root of the repository or of the package."""
    names = re.findall(r"`((?:\w+/)+(?:[\w-]+\.(?:py|sh|yaml|json|sbatch))?)`", path.read_text())
    for name in set(names) - WORKED_EXAMPLE:
        if name.split("/")[0] not in MADE:
            assert (ROOT / name).exists() or (ROOT / "megatron_eslm" / name).exists(), name


MADE = ("demo", "runs", "cache", "site", "iter_0000100", "tokenizer", "owner")
"""Folders that commands make."""


def commands(program: str) -> list[str]:
    """What follows the name of a program in code blocks of the documents."""
    found = []
    for path in DOCUMENTS:
        text = path.read_text().replace(" \\\n", " ")
        found += re.findall(rf"^ {{4,}}(?:.* )?{re.escape(program)}( .*)?$", text, re.MULTILINE)
    return found


def flags(command: str) -> set[str]:
    return set(re.findall(r"(?<!\S)--[\w-]+", command.split("#")[0]))


def test_flags_of_training_commands_exist() -> None:
    known = {flag_of(name) for name in options(GROUPS)} | PAGES.keys() | {"--config", "--help"}
    found = commands("pretrain_gpt.py")
    assert len(found) > 20
    for command in found:
        assert flags(command) <= known, command


@pytest.mark.parametrize("tool", sorted(ROOT.glob("tools/*.py")), ids=lambda path: path.stem)
def test_flags_of_tools_exist(tool: Path, capsys: pytest.CaptureFixture) -> None:
    spec = importlib.util.spec_from_file_location(tool.stem, tool)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(SystemExit):
        module.main(["--help"])
    known = flags(capsys.readouterr().out.replace("[", " ").replace("]", " ").replace(",", " "))
    for command in commands(f"python tools/{tool.name}"):
        assert flags(command) <= known, command


def test_every_tool_has_a_place_in_the_documents() -> None:
    text = "".join(path.read_text() for path in DOCUMENTS)
    for tool in ROOT.glob("tools/*.py"):
        assert tool.name in text, tool.name


def test_the_worked_example_of_a_policy() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", EXTENDING.read_text(), re.MULTILINE | re.DOTALL)
    code, test = blocks
    space: dict = {}
    written = POLICIES.pop("longest", None)  # of somebody who has followed the example
    try:
        exec(compile(code, "longest.py", "exec"), space)
        made = POLICIES["longest"]
    finally:
        POLICIES.pop("longest", None)
        if written is not None:
            POLICIES["longest"] = written

    def policy(selection: str) -> SelectionPolicy:
        assert selection == made.name
        return made(SelectionOptions(), SelectionState(alpha=0.1), Peers(0, 1, None), 0)

    space |= {"policy": policy, "scored": scored}
    exec(re.sub(r"^from \..*$", "", test, flags=re.MULTILINE), space)
    space["test_the_sequence_with_most_valid_tokens_scores_highest"]()


def test_the_page_of_flags_has_all_of_them() -> None:
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    page = hooks.flags_page()
    for name in options(GROUPS):
        assert page.count(f"\n| `{flag_of(name)}` |") == 1
    cells = {len(re.findall(r"(?<!\\)\|", line)) for line in page.splitlines() if line[:1] == "|"}
    assert cells == {5}
