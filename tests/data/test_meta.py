"""The facts beside a pair: each that is not as it was written is refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_eslm.data.data_options import DataOptions
from megatron_eslm.data.meta import read_meta
from megatron_eslm.data.preprocess import preprocess
from megatron_eslm.data.source import open_data
from megatron_eslm.data.tokenizers.build import ByteTokenizer
from megatron_eslm.data.verify import verify_data
from megatron_eslm.errors import ConfigError


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A prefix and the text of its meta file."""
    prefix = str(tmp_path_factory.mktemp("pair") / "a")
    preprocess(["x"], prefix, ByteTokenizer(), documents=["some text"] * 20)
    return prefix, Path(f"{prefix}.meta.json").read_text()


def test_what_is_written_is_read(pair: tuple[str, str]) -> None:
    prefix, text = pair
    Path(f"{prefix}.meta.json").write_text(text)
    meta = read_meta(prefix)
    assert meta is not None and meta.documents == 20 and meta.max_token_id == 256
    assert verify_data(prefix).documents == 20
    assert read_meta(f"{prefix}b") is None


def _set(key: str, value: Any):
    def change(text: str) -> str:
        fields = json.loads(text)
        inner = fields["tokenizer"] if key.startswith("tokenizer.") else fields
        inner[key.removeprefix("tokenizer.")] = value
        return json.dumps(fields)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: "", "is not JSON"),
        (lambda text: "[]", "top level: "),
        (lambda text: '"text"', "top level: "),
        (lambda text: "{}", "tokenizer: field required"),
        (lambda text: "[" * 100_000, "nested too deep"),
        (lambda text: '{"tokenizer":' * 100_000, "nested too deep"),
        (lambda text: text.replace('"documents"', '"tokens"'), "'tokens' is given twice"),
        (_set("tokenizer", None), "tokenizer: "),
        (_set("tokenizer", []), "tokenizer: "),
        (_set("tokenizer.identity", 5), r"\(tokenizer\) has .* identity: "),
        (_set("tokenizer.identity", "abc"), "identity: string should match pattern"),
        (_set("tokenizer.extra", None), "extra: "),
        (_set("tokenizer.eod", "256"), "eod: "),
        (_set("tokenizer.vocab_size", 0), "vocab_size: "),
        (_set("max_token_id", None), "max_token_id: "),
        (_set("max_token_id", "x"), "max_token_id: "),
        (_set("max_token_id", -1), "max_token_id: "),
        (_set("max_token_id", True), "max_token_id: "),
        (_set("documents", 2**70), "documents: "),
        (_set("tokens", 200.0), "tokens: "),
        (_set("append_eod", "yes"), "append_eod: "),
        (_set("sources", "x"), "sources: "),
        (_set("bin_sha256", 5), "bin_sha256: "),
        (_set("idx_bytes", None), "idx_bytes: "),
        (_set("format_version", "1"), "format_version: "),
        (_set("format_version", 99), "has format version 99, not 1"),
        (_set("surplus", 1), "surplus: "),
        # Of the right type, and not true.
        (_set("max_token_id", 9999), None),
        (_set("documents", 19), "says 19 documents, but the files have 20"),
        (_set("tokens", 199), "says 199 tokens, but the files have 200"),
        (_set("idx_sha256", "0" * 64), r"a\.idx is damaged or from another run"),
    ],
)
def test_what_is_not_as_it_was_written(pair: tuple[str, str], change, says: str | None) -> None:
    """By training and by tools/verify_data.py alike."""
    prefix, text = pair
    Path(f"{prefix}.meta.json").write_text(change(text))
    for read, expected in (
        (lambda: open_data(DataOptions(data_path=(prefix,))), "holds the id 9999, beyond"),
        (lambda: verify_data(prefix), "says that the largest id is 9999, but it is 256"),
    ):
        with pytest.raises(ConfigError, match=says or expected) as caught:
            read()
        assert f"{prefix}.meta.json" in str(caught.value) or prefix in str(caught.value)
        assert "\n" not in str(caught.value)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.meta.json")
    (tmp_path / "b.meta.json").mkdir()
    for name, kind in (("a", "a named pipe"), ("b", "a folder")):
        with pytest.raises(ConfigError, match=f"must be a regular file but is {kind}.*delete"):
            read_meta(str(tmp_path / name))
