"""Exported tokenizers: the ids of training, by the means that users of transformers have."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer, GPT2Config

from megatron_eslm.data.tokenizers.build import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    same_ids,
)
from megatron_eslm.data.tokenizers.from_transformers import folder_tokenizer
from megatron_eslm.data.tokenizers.to_transformers import export_no_tokenizer, export_tokenizer
from megatron_eslm.errors import ConfigError

POSITIONS = 4096

# Control characters, line ends, spaces of all kinds, other scripts, marks, digits: where
# tokenizers and their copies come apart. No special token is among them.
EDGES = [
    "emoji \U0001f9d1\u200d\U0001f680 \U0001f1e9\U0001f1ea",
    "nul\0inside\0",
    "crlf line\r\nline2\r\n\r\n",
    "mac\rcr",
    "\ufeffBOM text",
    " ",
    "\n",
    "\t",
    "   \n\n   ",
    "\x1c\x1d\x1e\x1f\x85\u2028\u2029",
    "e\u0301 vs \u00e9",
    "\u202eRTL \u0627\u0644\u0639",
    "trailing  ",
    "  leading",
    "a'S IT'LL won't",
    "1234567890123456789012",
    "\u00a0\u00a0x",
    "\u3000\u3000字",
    "日本語" * 40,
]


def export(tokenizer, folder):
    """As an exported model has it: beside a config.json."""
    folder.mkdir()
    GPT2Config(vocab_size=tokenizer.vocab_size, bos_token_id=0, eos_token_id=0).save_pretrained(
        folder
    )
    export_tokenizer(tokenizer, folder, POSITIONS)
    return folder


def test_every_kind_gives_the_ids_of_training(
    tmp_path, gpt2, hf, documents, sentencepiece_model, caplog
):
    """With the library's defaults: nothing is put before or behind a text."""
    pieces = SentencePieceTokenizer(sentencepiece_model)
    for n, tokenizer in enumerate((gpt2, hf, ByteTokenizer(), pieces)):
        loaded = AutoTokenizer.from_pretrained(export(tokenizer, tmp_path / str(n)))
        assert loaded.model_max_length == POSITIONS
        assert loaded.eos_token_id == loaded.pad_token_id == loaded.bos_token_id == tokenizer.eod
        assert len(loaded) == tokenizer.vocab_size
        for text in [*documents[:30], *EDGES]:
            ids = tokenizer.encode(text)
            assert loaded(text)["input_ids"] == ids
            assert loaded.decode(ids) == text == tokenizer.decode(ids)
        assert same_ids(folder_tokenizer(tmp_path / str(n)), tokenizer)
    assert caplog.text == ""


def test_begin_tokens_that_training_never_saw_are_not_added(bpe_files, tmp_path):
    """A tokenizer.json may ask for one around every text; preprocessing writes none."""
    data = json.loads((bpe_files / "tokenizer.json").read_text())
    begin = {"id": 400, "content": "<s>", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    data["added_tokens"] += [{**begin, **flags}]
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [400], "tokens": ["<s>"]}},
    }
    data["truncation"] = {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = HuggingFaceTokenizer(tmp_path)
    loaded = AutoTokenizer.from_pretrained(export(tokenizer, tmp_path / "hf"))
    assert loaded("the riskiest part")["input_ids"] == tokenizer.encode("the riskiest part")
    assert loaded.bos_token_id == tokenizer.eod


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model_type": "bpe", "byte_fallback": True},
        {"normalization_rule_name": "nmt_nfkc_cf", "byte_fallback": True},
        {"normalization_rule_name": "nfkc", "model_type": "bpe"},
        {"add_dummy_prefix": False, "byte_fallback": True},
    ],
    ids=["default", "bpe", "case folding", "nfkc", "no prefix"],
)
def test_normalizing_models_are_exported(train_pieces, documents, tmp_path, options):
    """They used to train for days and then could not be exported at all."""
    tokenizer = SentencePieceTokenizer(train_pieces(vocab_size=350, **options))
    folder = export(tokenizer, tmp_path / "hf")
    loaded = AutoTokenizer.from_pretrained(folder)
    for text in [*documents[:10], *EDGES]:
        assert loaded(text)["input_ids"] == tokenizer.encode(text)
    text = documents[1].strip().lower()
    assert loaded.decode(tokenizer.encode(text)).replace("<unk>", " ⁇ ") == tokenizer.decode(
        tokenizer.encode(text)
    )
    again = folder_tokenizer(folder)
    assert again.name == "HuggingFaceTokenizer"
    assert same_ids(again, tokenizer)
    assert again.encode("a</s>b") == tokenizer.encode("a</s>b")


def test_other_ids_for_rare_characters_are_said(normalizing_model, tmp_path, caplog):
    tokenizer = SentencePieceTokenizer(normalizing_model)
    export(tokenizer, tmp_path / "hf")
    assert "other ids for rare combining characters" in caplog.text
    assert "nmt_nfkc" in caplog.text


def test_a_model_that_transformers_cannot_express(train_pieces, documents, tmp_path, caplog):
    """It goes out as it is, where nothing reads it wrongly."""
    tokenizer = SentencePieceTokenizer(
        train_pieces(vocab_size=350, treat_whitespace_as_suffix=True)
    )
    folder = export(tokenizer, tmp_path / "hf")
    assert "transformers cannot express" in caplog.text
    model = folder / "tokenizer" / "tokenizer.model"
    assert model.read_bytes() == tokenizer.files["tokenizer.model"].read_bytes()
    with pytest.raises(ValueError, match="instantiate"):
        AutoTokenizer.from_pretrained(folder)
    again = folder_tokenizer(folder)
    assert again.identity == tokenizer.identity
    assert again.encode_batch(documents[:5]) == tokenizer.encode_batch(documents[:5])


def test_without_a_tokenizer_none_is_loaded(tmp_path):
    """transformers would make up an empty one, which gives every text no ids."""
    GPT2Config().save_pretrained(tmp_path)
    export_no_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="instantiate"):
        AutoTokenizer.from_pretrained(tmp_path)


def test_an_export_with_other_ids_is_refused(hf, tmp_path):
    class Wrong(HuggingFaceTokenizer):
        def _encode_batch(self, texts):
            return [[5, *ids] for ids in super()._encode_batch(texts)]

    with pytest.raises(ConfigError, match=r"gives other ids for .The riskiest.*--without-"):
        export(Wrong(hf.files["tokenizer.json"]), tmp_path / "hf")
