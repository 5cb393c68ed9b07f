"""Two small preprocessed domains that the whole folder trains on."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from megatron_eslm.data.preprocess import preprocess
from megatron_eslm.data.tokenizers.build import ByteTokenizer
from megatron_eslm.launch.bootstrap import quiet_imports

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

DOMAINS = {
    "prose": [
        "the",
        "quick",
        "riskiest",
        "token",
        "is",
        "kept",
        "and",
        "the",
        "easy",
        "one",
        "is",
        "dropped",
        "again",
        "today",
    ],
    "code": [
        "def",
        "return",
        "import",
        "x",
        "=",
        "y",
        "+",
        "z",
        "(",
        ")",
        "[",
        "]",
        ":",
        "self",
        ".",
        "loss",
        "0",
        "1",
        "2",
    ],
}


@pytest.fixture(scope="session", autouse=True)
def _imported() -> None:
    """Ranks are forked from this process: what it has imported they need not."""
    quiet_imports()
    import megatron_eslm.training.build  # noqa: F401


def make_domain(prefix: Path, name: str, documents: int, seed: int = 0) -> str:
    """Preprocess deterministic documents of one kind; returns the prefix."""
    rng = random.Random(f"{name}{seed}")
    texts = [
        f"{n} " + " ".join(rng.choices(DOMAINS[name], k=rng.randint(4, 60)))
        for n in range(documents)
    ]
    preprocess([name], str(prefix), ByteTokenizer(), documents=texts)
    return str(prefix)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Prefixes of two domains; about 3,000 sequences of 32 tokens."""
    folder = tmp_path_factory.mktemp("data")
    return [make_domain(folder / name, name, 400) for name in DOMAINS]


@pytest.fixture(scope="session")
def start(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of `runs.MODEL`'s shape to start from: checkpoints of its training in `trained`, the
    same as a Hugging Face folder in `hf` and, as tools/convert_from_hf.py makes them, in `weights`.
    """
    from megatron_eslm.interop.convert import checkpoint_to_folder, folder_to_checkpoint
    from tests.harness import run_ranks

    from .runs import train, words

    folder = tmp_path_factory.mktemp("start")

    def fn(rank: int) -> None:
        train(words(data, "--selection", "clm", "--seed", "7", "--save", folder / "trained"))

    run_ranks(1, fn)
    checkpoint_to_folder(str(folder / "trained"), str(folder / "hf"))
    folder_to_checkpoint(str(folder / "hf"), str(folder / "weights"))
    return folder
