"""What other programs see of the package: its names, its examples in docs/python.md, its wheel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import megatron_eslm

ROOT = Path(__file__).parents[1]


def run(words: Sequence[str | Path], folder: Path, packages: Path) -> str:
    """Standard output of this Python in `folder`, with the packages of another folder."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_names_are_those_that_type_checkers_see() -> None:
    source = (ROOT / "megatron_eslm" / "__init__.py").read_text()
    _, _, declared = source.partition("if TYPE_CHECKING:")
    declared = declared.partition("# Before torch")[0]
    homes = megatron_eslm._HOMES
    assert set(re.findall(r"(\w+) as \1\b", declared)) == set(homes)
    assert set(re.findall(r"from megatron_eslm\.([\w.]+) import", declared)) == {*homes.values()}
    assert set(homes) <= set(dir(megatron_eslm))
    for name in homes:
        assert getattr(megatron_eslm, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'build_trainre'"):
        _ = megatron_eslm.build_trainre


def test_examples_of_the_document(tmp_path: Path) -> None:
    """One after the other, in one process; `import megatron_eslm` alone brings no torch."""
    text = (ROOT / "docs" / "python.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    for name in megatron_eslm._HOMES:
        assert f"`{name}`" in text
    light = "import sys, megatron_eslm\nassert 'torch' not in sys.modules\n"
    (tmp_path / "examples.py").write_text(light + "\n".join(blocks))
    run(["examples.py"], tmp_path, ROOT)
    assert (tmp_path / "runs" / "eslm" / "iter_0000002").is_dir()


def test_the_wheel_works_outside_the_checkout(tmp_path: Path) -> None:
    source, site, elsewhere = (tmp_path / name for name in ("source", "site", "elsewhere"))
    elsewhere.mkdir()
    # A copy, since the build leaves its own folders beside it.
    shutil.copytree(
        ROOT / "megatron_eslm",
        source / "megatron_eslm",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = ["-m", "pip", "--disable-pip-version-check", "--quiet"]
    run([*pip, "wheel", ".", "--no-deps", "--no-build-isolation", "-w", "dist"], source, source)
    (wheel,) = (source / "dist").iterdir()
    run([*pip, "install", "--no-deps", "--no-index", "--target", site, wheel], elsewhere, source)
    shutil.rmtree(source)

    (elsewhere / "text.txt").write_text("hello world")
    program = site / "bin" / "megatron-eslm"
    assert "\n  preprocess " in run(["-m", "megatron_eslm", "--help"], elsewhere, site)
    words = ["preprocess", "--input", "text.txt", "--output-prefix", "x"]
    run([program, *words, "--tokenizer-type", "ByteTokenizer"], elsewhere, site)
    printed = run(["-m", "megatron_eslm", "verify-data", "x"], elsewhere, site)
    assert printed.startswith("x: 1 documents, 11 tokens")
    # The folder of the repository has nothing that the package needs.
    python = [f"{path.relative_to(ROOT)}" for path in (ROOT / "megatron_eslm").rglob("*.py")]
    assert all((site / name).is_file() for name in python)
