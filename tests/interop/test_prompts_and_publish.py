"""The stored prompts, and folders that appear whole or not at all."""

from __future__ import annotations

import pytest

from megatron_eslm.errors import ConfigError
from megatron_eslm.interop.prompts import TEXTS, prompts_ids
from megatron_eslm.interop.whole_folder import published
from megatron_eslm.model.hf.folder import from_hf

from .conftest import files_of, random_gpt2


@pytest.mark.parametrize("context", [1, 40, 1000])
def test_prompts_cover_the_edges(byte_tokenizer, context):
    model = random_gpt2(n_layer=1, n_positions=context, vocab_size=300)
    _, shape = from_hf(model, model.config, 128)
    prompts = prompts_ids(byte_tokenizer, shape)
    assert len(prompts) == len(TEXTS) + 3
    assert [byte_tokenizer.eod] in prompts
    assert [299] in prompts
    assert len(prompts[-1]) == context
    assert all(0 < len(ids) <= context for ids in prompts)


def test_published_appears_at_the_end(tmp_path):
    target = tmp_path / "deep" / "out"
    with published(target, "--output") as aside:
        (aside / "a").write_text("new")
        assert not target.exists()
    assert files_of(tmp_path) == {"deep/out/a": b"new"}


def test_failure_leaves_what_was_there(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "config.json").write_text("old")
    with (
        pytest.raises(RuntimeError, match="no luck"),
        published(target, "--output", "config.json") as aside,
    ):
        (aside / "config.json").write_text("new")
        raise RuntimeError("no luck")
    assert files_of(tmp_path) == {"out/config.json": b"old"}


def test_replaces_an_earlier_export_only(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "config.json").write_text("old")
    (target / "left-over").write_text("old")
    with (
        pytest.raises(ConfigError, match=r"--output .* exists already"),
        published(target, "--output"),
    ):
        pass
    with published(target, "--output", "config.json") as aside:
        (aside / "config.json").write_text("new")
    assert files_of(tmp_path) == {"out/config.json": b"new"}
    (target / "config.json").rename(target / "thesis.tex")
    with (
        pytest.raises(ConfigError, match=r"holds no config\.json"),
        published(target, "--output", "config.json"),
    ):
        pass
    assert files_of(tmp_path) == {"out/thesis.tex": b"new"}


def test_an_empty_folder_is_no_obstacle(tmp_path):
    (tmp_path / "out").mkdir()
    with published(tmp_path / "out", "--output") as aside:
        (aside / "a").write_text("new")
    assert files_of(tmp_path) == {"out/a": b"new"}


def test_two_exports_to_one_place_never_meet(tmp_path):
    target = tmp_path / "out"
    with published(target, "--output", "config.json") as first:
        with published(target, "--output", "config.json") as second:
            assert first != second
            (second / "config.json").write_text("second")
        (first / "config.json").write_text("first")
    assert files_of(tmp_path) == {"out/config.json": b"first"}


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(ConfigError, match="--output"), published(target, "--output"):
            pass
