"""Ids against the reference libraries, round trips, identity, and every message."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from tokenizers import Tokenizer as RustTokenizer

from megatron_eslm.data.tokenizers.build import (
    ByteTokenizer,
    GPT2BPETokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    build_tokenizer,
    load_tokenizer,
    same_ids,
)
from megatron_eslm.data.tokenizers.train_bpe import train_bpe
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
    from megatron_eslm.data.tokenizers import gpt2 as tokenizer_gpt2

    short = "a" + " " * 50 + "the \t\n  x" + " " * 33 + "\n"
    expected = gpt2.encode(short)
    with pytest.MonkeyPatch.context() as patch:
        import re

        patch.setattr(tokenizer_gpt2, "_LONG_SPACE", 3)
        patch.setattr(tokenizer_gpt2, "_SPACE_RUN", re.compile(r"[\t\n ]{4,}"))
        assert gpt2.encode(short) == expected


def test_half_surrogates_become_replacement_characters(gpt2):
    assert gpt2.decode(gpt2.encode_arrays(["a\ud800b"])[0]) == "a\ufffdb"


def test_no_kind_makes_its_end_of_document_of_text(gpt2, hf, sentencepiece_model):
    """Text that spells the token that ends documents is ordinary text, and comes back."""
    pieces = SentencePieceTokenizer(sentencepiece_model)
    for tokenizer, spelling in (
        (gpt2, "<|endoftext|>"),
        (hf, "<|endoftext|>"),
        (ByteTokenizer(), "<|endoftext|>"),
        (pieces, "</s>"),
    ):
        texts = [spelling, f"a{spelling}b", f"one {spelling} two {spelling}"]
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            assert tokenizer.eod not in ids
            assert tokenizer.decode(ids) == text
        assert all(tokenizer.eod not in ids for ids in tokenizer.encode_arrays(texts))


def test_a_tokenizer_that_ends_documents_within_text_is_refused():
    class Broken(ByteTokenizer):
        def _encode_batch(self, texts):
            return [[65, self.eod] if "\0" in text else [65] for text in texts]

        def _encode_arrays(self, texts):
            return [np.array(ids) for ids in self._encode_batch(texts)]

    tokenizer = Broken()
    assert tokenizer.encode("a") == [65]
    for encode in (tokenizer.encode_batch, tokenizer.encode_arrays):
        with pytest.raises(ConfigError, match=r"The ByteTokenizer gives .* id 256 for text \('b"):
            encode(["a", "b\0"])


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
    with pytest.raises(ConfigError, match=r"is not JSON.*Preprocess the data again"):
        load_tokenizer(tmp_path / "1")
    with pytest.raises(ConfigError, match="has no stored tokenizer"):
        load_tokenizer(tmp_path / "absent")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"extra": None}, "extra: input should be an object"),
        ({"identity": 5}, "identity: input should be a valid string"),
        ({"vocab_size": "257"}, "vocab_size: input should be a valid integer"),
        ({"eod": -1}, "eod: input should be greater than or equal to 0"),
        ({"surprise": 1}, "surprise: "),
        ({"type": "NoSuchTokenizer"}, "unknown tokenizer type 'NoSuchTokenizer'"),
    ],
)
def test_stored_facts_that_do_not_fit(tmp_path, facts, message):
    ByteTokenizer().save(tmp_path)
    path = tmp_path / "tokenizer_meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))
    with pytest.raises(ConfigError, match=rf"tokenizer_meta\.json.*{message}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deep"),
        ('{"a": 0, "a": 1}', "given twice"),
        ('{"a": 0, "b": 0}', "a unique id"),
        ('{"a": -1}', "a unique id"),
        ("{}", "a unique id"),
        ('{"a": true}', "JSON object of token to id"),
        ('{"a": 1.5}', "JSON object of token to id"),
    ],
)
def test_vocabularies_that_are_none(bpe_files, tmp_path, text, message):
    (tmp_path / "vocab.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"--vocab-file .*vocab\.json.*{message}"):
        GPT2BPETokenizer(tmp_path / "vocab.json", bpe_files / "merges.txt")


def test_an_absurd_vocabulary_is_refused(bpe_files, tmp_path):
    """Nothing of that size is made: a model would need a row for every id."""
    vocab = json.loads((bpe_files / "vocab.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps({**vocab, "x" * 99: 10**12}))
    with pytest.raises(ConfigError, match=r"vocab\.json .*ids up to 1000000000000"):
        GPT2BPETokenizer(tmp_path / "vocab.json", bpe_files / "merges.txt")


def test_sentencepiece(sentencepiece_model, documents):
    tokenizer = build_tokenizer("SentencePieceTokenizer", tokenizer_model=sentencepiece_model)
    assert tokenizer.vocab_size == 400
    for document in documents[:20]:
        ids = tokenizer.encode(document)
        assert tokenizer.eod not in ids
        assert max(ids) < 400
        assert tokenizer.decode(ids) == document


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
        (("ByteTokenizer", vocab), "--vocab-file .* has no effect with"),
        (("GPT2BPETokenizer", absent, merges), "--vocab-file .*absent cannot be read"),
        (("GPT2BPETokenizer", text, merges), "--vocab-file .*text is not JSON"),
        (("GPT2BPETokenizer", str(tmp_path / "list.json"), merges), "is not a vocabulary"),
        (("GPT2BPETokenizer", vocab, absent), "--merge-file .*absent cannot be read"),
        (("HuggingFaceTokenizer", None, None, absent), "there is no tokenizer file"),
        (("HuggingFaceTokenizer", None, None, text), "--tokenizer-model .*text is not JSON"),
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
    with pytest.raises(ConfigError, match="never produce 'xyz'"):
        build(odd, ["x y", "y z", "x yz"])


def test_same_ids_whatever_the_files(gpt2, hf, documents, tmp_path):
    assert gpt2.identity != hf.identity
    assert same_ids(gpt2, hf) and same_ids(hf, gpt2) and same_ids(gpt2, gpt2)
    train_bpe(documents[:60], gpt2.vocab_size, tmp_path / "other.json")
    assert not same_ids(gpt2, HuggingFaceTokenizer(tmp_path / "other.json"))
    assert not same_ids(gpt2, ByteTokenizer())
