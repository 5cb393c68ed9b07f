"""Windows of documents, and ids as text again."""

from __future__ import annotations

import os

import numpy as np
import pytest

from megatron_eslm.data.preprocess import preprocess
from megatron_eslm.data.tokenizers.build import ByteTokenizer, build_tokenizer
from megatron_eslm.errors import ConfigError
from megatron_eslm.reports.passages import (
    END_OF_DOCUMENT,
    passages_of_text,
    pieces,
    read_text,
    validation_passages,
)

TEXTS = [f"{n} " + "abc" * n for n in range(20)]


@pytest.fixture
def prefixes(tmp_path):
    """Two pairs of 20 documents over bytes, one of them of capitals."""
    made = []
    for name, texts in (("low", TEXTS), ("high", [text.upper() for text in TEXTS])):
        preprocess([name], str(tmp_path / name), ByteTokenizer(), documents=texts)
        made.append(str(tmp_path / name))
    return made


def text_of(passage):
    return ByteTokenizer().decode(passage.ids.tolist())


def test_windows_of_a_text():
    tokenizer = ByteTokenizer()
    found = passages_of_text("abcdefg", "x.txt", tokenizer, window=3)
    assert [text_of(p) for p in found] == ["abc", "def", "g"]
    assert [p.before for p in found] == [tokenizer.eod, ord("c"), ord("f")]
    assert [p.name for p in found] == ["x.txt", "x.txt, from token 3", "x.txt, from token 6"]
    with pytest.raises(ConfigError, match=r"--text x\.txt is empty"):
        passages_of_text("", "x.txt", tokenizer, window=3)


def test_validation_documents_in_turn(prefixes):
    args = ("80,10,10", ByteTokenizer(), 16)
    found = validation_passages(prefixes, *args, samples=3, first_only=True)
    # Of 20 documents 16 and 17 are for validation.
    assert [p.name for p in found] == ["low, document 16", "high, document 16", "low, document 17"]
    assert text_of(found[0]) == TEXTS[16][:16]
    assert all(p.before == ByteTokenizer().eod for p in found)
    every = validation_passages(prefixes[:1], *args, samples=100)
    joined = "".join(text_of(p) for p in every)
    assert joined == "".join(f"{text}<|endoftext|>" for text in TEXTS[16:18])
    assert max(len(p.ids) for p in every) == 16


def test_a_split_without_validation(prefixes):
    with pytest.raises(ConfigError, match=r"--split 100,0,0 leaves .*low no validation document"):
        validation_passages(prefixes, "100,0,0", ByteTokenizer(), 16, 4)
    with pytest.raises(ConfigError, match="--samples 0"):
        validation_passages(prefixes, "80,10,10", ByteTokenizer(), 16, 0)


def test_data_of_another_tokenizer(prefixes, bpe):
    with pytest.raises(ConfigError, match="was made with another tokenizer"):
        validation_passages(prefixes, "80,10,10", bpe, 16, 4)


def test_a_text_that_cannot_be_read(tmp_path):
    (tmp_path / "x").write_bytes(b"\xff\xfe\xff")
    os.mkfifo(tmp_path / "pipe")
    for name, says in (
        ("x", "cannot be read"),
        ("gone", "cannot be read"),
        ("pipe", "a named pipe"),
    ):
        path = tmp_path / name
        with pytest.raises(ConfigError, match=rf"--text.*{name}.*{says}.*Give a UTF-8 file"):
            read_text(str(path))


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A byte-level BPE that knows little of what is not ASCII."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    rust = Tokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    rust.train_from_iterator(["the cat sat on the mat, the cat"], trainer)
    rust.save(str(path))
    return build_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(path))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text.txt").write_text("the cat sat on the mat\n" * 9)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=280,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    path = str(folder / "tokenizer.model")
    return build_tokenizer("SentencePieceTokenizer", tokenizer_model=path)


@pytest.mark.parametrize("kind", ["bytes", "bpe", "sentencepiece"])
@pytest.mark.parametrize("text", ["the cat sat", "the ☃ größer 漢字 cat 🎉🎉 on\n\n the mat", "é"])
def test_pieces_spell_the_text(request, kind, text):
    tokenizer = ByteTokenizer() if kind == "bytes" else request.getfixturevalue(kind)
    ids = tokenizer.encode(text)
    found = pieces(tokenizer, ids)
    assert "".join(piece for piece, _ in found) == text
    assert sum(length for _, length in found) == len(ids)
    # Whatever is ASCII has a piece for each token, and a snowman is one piece.
    if kind != "sentencepiece" and text.isascii():
        assert len(found) == len(ids)
    if "☃" in text:
        assert any(piece.endswith("☃") for piece, _ in found)


def test_pieces_of_what_is_no_text():
    tokenizer = ByteTokenizer()
    ids = [ord("a"), tokenizer.eod, *[0xFF] * 20, ord("b")]
    found = pieces(tokenizer, np.array(ids))
    assert found[:2] == [("a", 1), (END_OF_DOCUMENT, 1)]
    assert sum(length for _, length in found) == len(ids)
    assert "".join(piece for piece, _ in found[2:]) == "�" * 20 + "b"
