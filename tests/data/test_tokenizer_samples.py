"""What is said of a tokenizer that changes text."""

from __future__ import annotations

import json
import logging

import pytest

from megatron_eslm.data.preprocess import preprocess
from megatron_eslm.data.tokenizers.build import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
)
from megatron_eslm.data.tokenizers.samples import changes, warn_of_changes


def test_lossless_kinds_change_nothing(gpt2, hf, sentencepiece_model, caplog):
    for tokenizer in (gpt2, hf, ByteTokenizer(), SentencePieceTokenizer(sentencepiece_model)):
        assert changes(tokenizer) == {}
        warn_of_changes(tokenizer)
    assert caplog.text == ""


def test_preprocessing_says_what_a_normalizing_model_changes(
    normalizing_model, documents, tmp_path, caplog
):
    """Such models used to lose white space, ligatures and more without a word."""
    tokenizer = SentencePieceTokenizer(normalizing_model)
    assert changes(tokenizer)["a  b"] == "a b"
    with caplog.at_level(logging.WARNING):
        preprocess(["x"], str(tmp_path / "out"), tokenizer, documents=documents[:3])
    (record,) = caplog.records
    said = record.getMessage()
    assert normalizing_model in said
    assert "nmt_nfkc, remove_extra_whitespaces" in said
    assert "'a  b' becomes 'a b'" in said
    assert "'½' becomes '1⁄2'" in said
    assert "normalization_rule_name=identity" in said


@pytest.mark.parametrize(
    ("parts", "named", "text", "becomes"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "Lowercase", "A", "a"),
        (
            {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}]}},
            "NFKC, ByteLevel",
            "½",
            "1⁄2",
        ),
    ],
)
def test_normalizers_of_a_tokenizer_json(bpe_files, tmp_path, parts, named, text, becomes, caplog):
    data = json.loads((bpe_files / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**data, **parts}))
    tokenizer = HuggingFaceTokenizer(tmp_path)
    assert changes(tokenizer)[text] == becomes
    warn_of_changes(tokenizer)
    assert named in caplog.text
