"""Training a tokenizer: determinism, and inputs that cannot work."""

from __future__ import annotations

import pytest

from megatron_eslm.data.tokenizers.build import HuggingFaceTokenizer
from megatron_eslm.data.tokenizers.train_bpe import train_bpe
from megatron_eslm.errors import ConfigError
from tests.interop.conftest import load_tool


def test_train_bpe_is_deterministic(tmp_path, documents):
    for name in "ab":
        assert train_bpe(iter(documents), 350, tmp_path / name) == 350
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert HuggingFaceTokenizer(tmp_path / "a").vocab_size == 350


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (["text"], 100, "--vocab-size 100 is too small"),
        (["text"], 10**12, "--vocab-size 1000000000000 is too large: at most 4194304"),
        ([], 300, "no text to train a tokenizer on"),
        (["", " \n"], 300, "no text to train a tokenizer on"),
    ],
)
def test_what_cannot_be_trained(tmp_path, texts, vocab_size, message):
    """A vocabulary of 10^12 ids made the library abort the process."""
    with pytest.raises(ConfigError, match=message):
        train_bpe(texts, vocab_size, tmp_path / "bpe.json")
    assert list(tmp_path.iterdir()) == []


def test_the_tool(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tool = load_tool("train_tokenizer")
    (tmp_path / "text.txt").write_text("hello world hello")
    (tmp_path / "taken.json").write_text("{}")

    def run(output, vocab_size=300, *more):
        arguments = ["--input", "text.txt", "--output", output, "--vocab-size", str(vocab_size)]
        code = tool.main([*arguments, *more])
        return code, "".join(capsys.readouterr())

    for output, message in (
        ("taken.json", "--output taken.json exists"),
        (".", "is not a file"),
        ("text.txt/bpe.json", "cannot be written"),
        ("/proc/none/bpe.json", "cannot be written"),
    ):
        code, said = run(output)
        assert code == 2
        assert message in said
        assert said.count("\n") == 1
    assert run("bpe.json", 10**12)[0] == 2
    code, said = run("bpe.json")
    assert code == 0
    assert "267 ids, for the text has no more pairs" in said
    assert run("taken.json", 260, "--overwrite") == (0, "wrote taken.json: 260 ids\n")

    for output, message in (("new/", "is not a file"), ("text.txt", "is the --input")):
        code, said = run(output, 300, "--overwrite")
        assert code == 2 and message in said
    assert (tmp_path / "text.txt").read_text() == "hello world hello"

    (tmp_path / "bad.jsonl").write_text('{"text": "hello hello"}\n{"text": 7}\n')
    bad = ["--input", "bad.jsonl", "--output", "bad.json", "--vocab-size", "258"]
    assert tool.main(bad) == 2
    assert "bad.jsonl, line 2: " in capsys.readouterr().err
    assert tool.main([*bad, "--on-bad-line", "skip"]) == 0
    assert "left out 1 document(s) that cannot be read; the first: bad.jsonl, line 2: " in (
        capsys.readouterr().out
    )
