"""Any tokenizer.json: its end of documents, its special tokens as text, and files that are none."""

from __future__ import annotations

import json
import os
import pickle

import pytest

from megatron_eslm.data.tokenizers.build import HuggingFaceTokenizer, load_tokenizer
from megatron_eslm.errors import ConfigError

END = "<|endoftext|>"


def added(index: int, content: str, special: bool = True) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": content, "special": special, **flags}


def write(folder, model: dict, tokens: list[dict], **parts):
    spec = {"version": "1.0", "added_tokens": tokens, "model": model, **parts}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder


def test_end_of_document_token_is_found(bpe_files, tmp_path):
    data = json.loads((bpe_files / "tokenizer.json").read_text())
    data["added_tokens"] = []
    data["model"]["vocab"] = {
        t.replace(END, "[STOP]"): i for t, i in data["model"]["vocab"].items()
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="no token to end documents"):
        HuggingFaceTokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "[STOP]"}}')
    tokenizer = HuggingFaceTokenizer(tmp_path)
    assert tokenizer.eod == 0
    assert 0 not in tokenizer.encode("a [STOP] b")
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").identity == tokenizer.identity


def test_an_end_token_that_its_file_does_not_call_special(bpe_files, hf, tmp_path):
    """Such a token came out of text in the middle of documents."""
    data = json.loads((bpe_files / "tokenizer.json").read_text())
    data["added_tokens"][0]["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = HuggingFaceTokenizer(tmp_path)
    assert tokenizer.eod == hf.eod
    for text in (END, f"one {END} two", f"{END}{END}"):
        assert tokenizer.encode(text) == hf.encode(text)
        assert tokenizer.eod not in tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_added_tokens_that_are_not_special_are_part_of_the_language(bpe_files, hf, tmp_path):
    """As vocabularies for code have runs of spaces; special ones are ordinary text."""
    data = json.loads((bpe_files / "tokenizer.json").read_text())
    data["added_tokens"] += [added(400, "    ", special=False), added(401, "<|sep|>")]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = HuggingFaceTokenizer(tmp_path)
    assert tokenizer.vocab_size == 402
    assert 400 in tokenizer.encode("a    b")
    assert tokenizer.encode("a<|sep|>b") == hf.encode("a<|sep|>b")


UNIGRAM = {
    "type": "Unigram",
    "unk_id": 1,
    "vocab": [["</s>", 0.0], ["<unk>", 0.0], ["<sep>", 0.0], *([c, -2.0] for c in "ab s</>e")],
}
WHOLE_WORDS = {"</s>": 0, "<unk>": 1, "<sep>": 2, "a": 3, "<": 4, "/": 5, "s": 6, ">": 7, "b": 8}


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        (UNIGRAM, {}),
        ({"type": "BPE", "vocab": WHOLE_WORDS, "merges": [], "ignore_merges": True}, {}),
        (
            {"type": "WordLevel", "vocab": WHOLE_WORDS, "unk_token": "<unk>"},
            {"pre_tokenizer": {"type": "WhitespaceSplit"}},
        ),
    ],
)
def test_models_that_hold_special_tokens_as_pieces(tmp_path, model, parts):
    """They make them of text even where the library is told not to look for special tokens."""
    tokens = [added(0, "</s>"), added(1, "<unk>"), added(2, "<sep>")]
    tokenizer = HuggingFaceTokenizer(write(tmp_path, model, tokens, **parts))
    assert tokenizer.eod == 0
    for text in ("</s>", "a</s>b", " </s>", "a </s> b", "<sep>"):
        assert not {0, 2} & set(tokenizer.encode(text))
    assert 3 in tokenizer.encode("a")
    assert "</s>" in tokenizer.decode([3, 0, 3])
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("a</s>b") == tokenizer.encode("a</s>b")
    assert copy.decode([3, 0, 3]) == tokenizer.decode([3, 0, 3])


def test_a_special_token_that_merges_make_is_refused(tmp_path):
    vocab = {"</s>": 0, "</s": 1, "</": 2, "<": 3, "/": 4, "s": 5, ">": 6}
    model = {"type": "BPE", "vocab": vocab, "merges": [["<", "/"], ["</", "s"], ["</s", ">"]]}
    with pytest.raises(ConfigError, match=r"tokenizer\.json produces its special tokens </s> from"):
        HuggingFaceTokenizer(write(tmp_path, model, [added(0, "</s>")]))


def test_an_end_token_that_stands_for_unknown_characters_is_refused(tmp_path):
    model = {"type": "WordLevel", "vocab": {"</s>": 0, "a": 1}, "unk_token": "</s>"}
    with pytest.raises(ConfigError, match=r"tokenizer\.json gives its end-of-document id 0 for"):
        HuggingFaceTokenizer(write(tmp_path, model, [added(0, "</s>")]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "[" * 100_000, "nested too deep"),
        ("tokenizer.json", '{"model": {"type": "BPE"}}', "is not a loadable tokenizer.json"),
        ("tokenizer.json", "[]", "is not a loadable tokenizer.json"),
        ("tokenizer.json", None, "named pipe"),
        ("tokenizer_config.json", "[" * 100_000, "nested too deep"),
        ("tokenizer_config.json", "[]", "not a JSON object"),
        ("tokenizer_config.json", '{"eos_token": {"content": 5}}', "no token to end documents"),
        ("tokenizer_config.json", None, "named pipe"),
    ],
)
def test_files_that_are_none(tmp_path, name, content, message):
    write(tmp_path, {"type": "BPE", "vocab": {"a": 0}, "merges": []}, [])
    path = tmp_path / name
    path.unlink(missing_ok=True)
    if content is None:
        os.mkfifo(path)
    else:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        HuggingFaceTokenizer(path if name == "tokenizer.json" else tmp_path)


def test_an_absurd_id_is_refused(tmp_path):
    model = {"type": "BPE", "vocab": {"</s>": 0, "a": 2**32 - 1}, "merges": []}
    with pytest.raises(ConfigError, match=r"tokenizer\.json has ids up to 4294967295; at most"):
        HuggingFaceTokenizer(write(tmp_path, model, [added(0, "</s>")]))
