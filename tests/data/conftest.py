"""Small inputs made on the spot: a corpus, tokenizers trained on it, preprocessed domains."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron_eslm.data.preprocess import preprocess
from megatron_eslm.data.tokenizers.build import (
    ByteTokenizer,
    GPT2BPETokenizer,
    HuggingFaceTokenizer,
)
from megatron_eslm.data.tokenizers.train_bpe import train_bpe

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_SENTENCE = (
    "the selective model reads every token but learns from the riskiest part of them while "
    "simple pieces it's don't we'll 1234 naïve café 漢字 🙂 == != () [] def"
)
WORDS = [*_SENTENCE.split(), "return\n\n", ""]


def make_documents(count: int, seed: int = 0) -> list[str]:
    """Different documents of 5 to 60 words; deterministic."""
    state, documents = seed * 7919 + 1, []
    for n in range(count):
        words = []
        for _ in range(5 + (n * 31 + seed) % 56):
            state = (state * 1103515245 + 12345) % 2**31
            words.append(WORDS[state // 65536 % len(WORDS)])
        documents.append(f"{n}: " + " ".join(words))
    return documents


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return make_documents(120)


@pytest.fixture(scope="session")
def bpe_files(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    """A folder with tokenizer.json, vocab.json and merges.txt of one small byte-level BPE."""
    folder = tmp_path_factory.mktemp("bpe")
    train_bpe(documents, 400, folder / "tokenizer.json")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return folder


@pytest.fixture(scope="session")
def gpt2(bpe_files: Path) -> GPT2BPETokenizer:
    return GPT2BPETokenizer(bpe_files / "vocab.json", bpe_files / "merges.txt")


@pytest.fixture(scope="session")
def hf(bpe_files: Path) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(bpe_files / "tokenizer.json")


@pytest.fixture(scope="session")
def train_pieces(tmp_path_factory, documents):
    """A function that trains a SentencePiece model on the documents with the given options."""
    import sentencepiece

    def train(**options) -> str:
        prefix = tmp_path_factory.mktemp("pieces") / "pieces"
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(documents),
            model_prefix=str(prefix),
            hard_vocab_limit=False,
            minloglevel=2,
            **options,
        )
        return f"{prefix}.model"

    return train


@pytest.fixture(scope="session")
def sentencepiece_model(train_pieces) -> str:
    """A SentencePiece model that keeps text as it is."""
    return train_pieces(
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )


@pytest.fixture(scope="session")
def normalizing_model(train_pieces) -> str:
    """A SentencePiece model as its trainer makes it by default, but for the bytes."""
    return train_pieces(vocab_size=350, byte_fallback=True)


@pytest.fixture
def domains(tmp_path: Path) -> list[str]:
    """Two preprocessed domains of different text, in bytes; returns their prefixes."""
    prefixes = []
    for name, count, seed in (("alpha", 150, 1), ("beta", 90, 2)):
        prefixes.append(str(tmp_path / name))
        preprocess([name], prefixes[-1], ByteTokenizer(), documents=make_documents(count, seed))
    return prefixes


@pytest.fixture
def two(domains: list[str]) -> list[str]:
    return ["3", domains[0], "1", domains[1]]
