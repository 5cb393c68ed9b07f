"""Ids against the reference libraries, round trips, identity, and every message."""

from __future__ import annotations

import json
import shutil

import pytest
from tokenizers import Tokenizer as RustTokenizer

from megatron_eslm.data.hf_tokenizer import hf_tokenizer
from megatron_eslm.data.tokenizers import (
    ByteTokenizer,
    GPT2BPETokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    build_tokenizer,
    load_tokenizer,
    same_ids,
)
from megatron_eslm.data.train_bpe import train_bpe
from megatron_eslm.errors import ConfigError

TEXTS = [
    "the riskiest part of them",
    "  two  spaces\n\n\nlines\t tabs \u00a0 \u3000end   ",
    "it's don't we'll I'VE 1234567 x²",
    "naïve 漢字 🙂 ½ é",
    "aaaaaaaaaaaaaaaaaaaaaa    aaa aaaa",
    "before <|endoftext|> after",
    "",
    " ",
]


def reference(bpe_files) -> RustTokenizer:
    rust = RustTokenizer.from_file(str(bpe_files / "tokenizer.json"))
    rust.encode_special_tokens = True
    return rust


def test_gpt2_ids_equal_the_tokenizers_library(bpe_files, gpt2, hf, documents):
    rust = reference(bpe_files)
    texts = TEXTS + documents
    expected = [rust.encode(text).ids for text in texts]
    assert gpt2.encode_batch(texts) == expected
    assert [ids.tolist() for ids in gpt2.encode_arrays(texts)] == expected
    assert [gpt2.encode(text) for text in texts] == expected
    assert hf.encode_batch(texts) == expected
    assert gpt2.eod == hf.eod == 0
    assert gpt2.vocab_size == hf.vocab_size == len(gpt2.vocab)


def test_round_trip_and_no_special_token_from_text(gpt2, hf):
    for tokenizer in (gpt2, hf, ByteTokenizer()):
        for text in TEXTS:
            ids = tokenizer.encode(text)
            assert tokenizer.eod not in ids
            assert tokenizer.decode(ids) == text
        assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.eod]) == "a<|endoftext|>"
        with pytest.raises(ValueError, match="outside the vocabulary"):
            tokenizer.decode([tokenizer.vocab_size])


def test_long_space_does_not_overflow_the_regex_engine(gpt2):
    text = "a" + " " * 70_000 + "x" + "\n" * 2_000_000 + "the"
    for ids in (gpt2.encode(text), gpt2.encode_arrays([text])[0]):
        assert gpt2.decode(ids) == text
    # A cut before the last space changes no id: compare where the reference can still follow.
    from megatron_eslm.data import tokenizer_gpt2

    short = "a" + " " * 50 + "the \t\n  x" + " " * 33 + "\n"
    expected = gpt2.encode(short)
    with pytest.MonkeyPatch.context() as patch:
        import re

        patch.setattr(tokenizer_gpt2, "_LONG_SPACE", 3)
        patch.setattr(tokenizer_gpt2, "_SPACE_RUN", re.compile(r"[\t\n ]{4,}"))
        assert gpt2.encode(short) == expected


def test_half_surrogates_become_replacement_characters(gpt2):
    assert gpt2.decode(gpt2.encode_arrays(["a\ud800b"])[0]) == "a\ufffdb"


def test_identity_follows_contents_not_paths(bpe_files, gpt2, tmp_path):
    shutil.copytree(bpe_files, tmp_path / "copy")
    same = GPT2BPETokenizer(tmp_path / "copy/vocab.json", tmp_path / "copy/merges.txt")
    assert same.identity == gpt2.identity
    assert same.unique_identifiers == gpt2.unique_identifiers
    other = HuggingFaceTokenizer(tmp_path / "copy")  # a folder will do
    assert other.identity != gpt2.identity
    assert json.dumps(other.unique_identifiers)
    assert other.pad == -1


def test_save_and_load(bpe_files, gpt2, hf, tmp_path, sentencepiece_model):
    pieces = SentencePieceTokenizer(sentencepiece_model)
    for n, tokenizer in enumerate((gpt2, hf, ByteTokenizer(), pieces)):
        tokenizer.save(tmp_path / str(n))
        loaded = load_tokenizer(tmp_path / str(n))
        assert type(loaded) is type(tokenizer)
        assert loaded.identity == tokenizer.identity
        assert loaded.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    with (tmp_path / "0" / "merges.txt").open("a") as file:
        file.write("\n")
    with pytest.raises(ConfigError, match="not those that were stored"):
        load_tokenizer(tmp_path / "0")
    (tmp_path / "1" / "tokenizer_meta.json").write_text("{")
    with pytest.raises(ConfigError, match="is damaged"):
        load_tokenizer(tmp_path / "1")
    with pytest.raises(ConfigError, match="holds no stored tokenizer"):
        load_tokenizer(tmp_path / "absent")


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory, documents):
    import sentencepiece

    prefix = tmp_path_factory.mktemp("pieces") / "pieces"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents),
        model_prefix=str(prefix),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return f"{prefix}.model"


def test_sentencepiece(sentencepiece_model, documents):
    tokenizer = build_tokenizer("SentencePieceTokenizer", tokenizer_model=sentencepiece_model)
    assert tokenizer.vocab_size == 400
    for document in documents[:20]:
        ids = tokenizer.encode(document)
        assert tokenizer.eod not in ids
        assert max(ids) < 400
        assert tokenizer.decode(ids) == document


def test_hf_export(tmp_path, gpt2, hf, documents, sentencepiece_model):
    from transformers import AutoTokenizer

    pieces = SentencePieceTokenizer(sentencepiece_model)
    for n, tokenizer in enumerate((gpt2, hf, ByteTokenizer(), pieces)):
        hf_tokenizer(tokenizer).save_pretrained(tmp_path / str(n))
        loaded = AutoTokenizer.from_pretrained(tmp_path / str(n))
        assert loaded.eos_token_id == tokenizer.eod
        for text in documents[:30]:
            ids = tokenizer.encode(text)
            assert loaded.encode(text, add_special_tokens=False) == ids
            assert loaded.decode(ids) == text


def test_hf_export_refuses_what_it_cannot_express(tmp_path, documents):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents),
        model_prefix=str(tmp_path / "odd"),
        vocab_size=60,
        model_type="unigram",
        normalization_rule_name="nmt_nfkc_cf",
        minloglevel=2,
    )
    with pytest.raises(ConfigError, match="do not reproduce"):
        hf_tokenizer(SentencePieceTokenizer(tmp_path / "odd.model"))


def test_train_bpe_is_deterministic(tmp_path, documents):
    for name in "ab":
        train_bpe(iter(documents), 350, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert HuggingFaceTokenizer(tmp_path / "a").vocab_size == 350
    with pytest.raises(ConfigError, match="too small"):
        train_bpe(documents, 100, tmp_path / "c")


def test_build_tokenizer_messages(bpe_files, tmp_path):
    vocab, merges = str(bpe_files / "vocab.json"), str(bpe_files / "merges.txt")
    (tmp_path / "text").write_text("not json")
    (tmp_path / "list.json").write_text("[1]")
    text, absent = str(tmp_path / "text"), str(tmp_path / "absent")
    for arguments, message in [
        (("Nonsense",), "Nonsense is unknown"),
        (("GPT2BPETokenizer", vocab), "needs --merge-file"),
        (("GPT2BPETokenizer", None, merges), "needs --vocab-file"),
        (("SentencePieceTokenizer",), "needs --tokenizer-model"),
        (("ByteTokenizer", vocab), "--vocab-file .* has no meaning with"),
        (("GPT2BPETokenizer", absent, merges), "--vocab-file .*absent cannot be read"),
        (("GPT2BPETokenizer", text, merges), "--vocab-file .*text is not valid JSON"),
        (("GPT2BPETokenizer", str(tmp_path / "list.json"), merges), "is not a vocabulary"),
        (("GPT2BPETokenizer", vocab, absent), "--merge-file .*absent cannot be read"),
        (("HuggingFaceTokenizer", None, None, absent), "there is no tokenizer file"),
        (("HuggingFaceTokenizer", None, None, text), "is not a tokenizer.json"),
        (("SentencePieceTokenizer", None, None, absent), "is not a file"),
        (("SentencePieceTokenizer", None, None, text), "is not a SentencePiece model"),
    ]:
        with pytest.raises(ConfigError, match=message):
            build_tokenizer(*arguments)


def test_gpt2_files_that_tiktoken_could_not_reproduce(bpe_files, tmp_path):
    vocab = json.loads((bpe_files / "vocab.json").read_text())
    merges = (bpe_files / "merges.txt").read_text().splitlines()[1:]

    def build(vocab, merges):
        (tmp_path / "vocab.json").write_text(json.dumps(vocab))
        (tmp_path / "merges.txt").write_text("\n".join(merges))
        return GPT2BPETokenizer(tmp_path / "vocab.json", tmp_path / "merges.txt")

    build(vocab, merges)
    with pytest.raises(ConfigError, match="do not follow the order"):
        build(vocab, [merges[1], merges[0], *merges[2:]])
    with pytest.raises(ConfigError, match="do not belong together"):
        build(vocab, [*merges, "the the"])
    with pytest.raises(ConfigError, match="lacks the token 'A' of a single byte"):
        build({t: i for t, i in vocab.items() if t != "A"}, merges)
    with pytest.raises(ConfigError, match="has no <\\|endoftext\\|>"):
        build({t: i for t, i in vocab.items() if t != "<|endoftext|>"}, merges)
    with pytest.raises(ConfigError, match="line 2 is not a pair"):
        build(vocab, [merges[0], "three words here", *merges[1:]])
    # "ab" + "c" is never reached: the merges of "abc" go another way.
    base = {t: i for t, i in vocab.items() if len(t) == 1 or t == "<|endoftext|>"}
    n = max(base.values())
    odd = {**base, "xy": n + 1, "yz": n + 2, "xyz": n + 3}
    with pytest.raises(ConfigError, match="never arrive at 'xyz'"):
        build(odd, ["x y", "y z", "x yz"])


def test_end_of_document_token_is_found(bpe_files, tmp_path):
    data = json.loads((bpe_files / "tokenizer.json").read_text())
    data["added_tokens"] = []
    data["model"]["vocab"] = {
        t.replace("<|endoftext|>", "[STOP]"): i for t, i in data["model"]["vocab"].items()
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="no token that ends documents"):
        HuggingFaceTokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "[STOP]"}}')
    tokenizer = HuggingFaceTokenizer(tmp_path)
    assert tokenizer.eod == 0
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").identity == tokenizer.identity


def test_same_ids_whatever_the_files(gpt2, hf, documents, tmp_path):
    assert gpt2.identity != hf.identity
    assert same_ids(gpt2, hf) and same_ids(hf, gpt2) and same_ids(gpt2, gpt2)
    train_bpe(documents[:60], gpt2.vocab_size, tmp_path / "other.json")
    assert not same_ids(gpt2, HuggingFaceTokenizer(tmp_path / "other.json"))
    assert not same_ids(gpt2, ByteTokenizer())
