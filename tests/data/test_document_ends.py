"""Data without ends of documents is said, and refused where a flag relies on them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from megatron_eslm.data.data_options import DataOptions
from megatron_eslm.data.preprocess import preprocess
from megatron_eslm.data.source import open_data
from megatron_eslm.data.tokenizers.build import ByteTokenizer
from megatron_eslm.errors import ConfigError


@pytest.fixture
def pairs(tmp_path: Path) -> dict[str, str]:
    """Pairs with and without ends; `foreign` ones have no facts beside them."""
    found = {}
    for kind in ("with", "without", "foreign_with", "foreign_without"):
        found[kind] = str(tmp_path / kind)
        preprocess(
            ["x"],
            found[kind],
            ByteTokenizer(),
            documents=["one", "two", "three"],
            append_eod=not kind.endswith("without"),
        )
    for kind in ("foreign_with", "foreign_without"):
        Path(f"{found[kind]}.meta.json").unlink()
    return found


@pytest.mark.parametrize(
    ("kinds", "without"),
    [
        (["with"], []),
        (["without"], ["without"]),
        (["with", "without"], ["without"]),
        (["foreign_with", "with"], []),
        (["foreign_with", "foreign_without"], ["foreign_without"]),
    ],
)
def test_what_lacks_ends_is_named(pairs, kinds, without, caplog):
    words = [word for kind in kinds for word in ("1", pairs[kind])]
    options = {
        "data_path": tuple(words if len(kinds) > 1 else [pairs[kinds[0]]]),
        "tokenizer_type": "ByteTokenizer",
    }
    with caplog.at_level(logging.WARNING):
        open_data(DataOptions(**options))
    said = [r.getMessage() for r in caplog.records if "no end-of-document id" in r.getMessage()]
    names = ", ".join(pairs[kind] for kind in without)
    assert [text.split(": ")[0] for text in said] == ([names] if without else [])
    if without:
        with pytest.raises(ConfigError, match=r"^--eod-mask-loss has no effect.*--append-eod\.$"):
            open_data(DataOptions(**options, eod_mask_loss=True))
    else:
        open_data(DataOptions(**options, eod_mask_loss=True))
