"""Stored losses: the file, its refusals, and that training reads those of its tokens."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_eslm.data.data_options import DataOptions
from megatron_eslm.data.index_file import read_index
from megatron_eslm.data.loader import build_loader
from megatron_eslm.data.mixture import Datasets, build_datasets
from megatron_eslm.data.reference_losses import (
    ReferenceMeta,
    ReferenceWriter,
    data_fingerprint,
    losses_path,
    open_reference_losses,
    positions_of,
)
from megatron_eslm.data.source import DataSource, open_data
from megatron_eslm.data.verify import verify_data
from megatron_eslm.errors import ConfigError

T = 32


def meta_of(prefix: str, **changes) -> ReferenceMeta:
    index = read_index(prefix)
    meta = ReferenceMeta(
        data=data_fingerprint(index),
        weights="w" * 64,
        seq_length=T,
        dtype="float32",
        tokens=index.tokens,
    )
    return dataclasses.replace(meta, **changes)


def made_up(prefix: str) -> np.ndarray:
    """A loss for each token from which its position in the file can be told."""
    return (np.arange(read_index(prefix).tokens) % 2048).astype(np.float32)


def write(prefix: str, name: str = "made-up", **changes) -> Path:
    losses = made_up(prefix)
    with ReferenceWriter(prefix, name, meta_of(prefix, **changes)) as writer:
        while writer.scored < len(losses):
            writer.append(losses[writer.scored : writer.scored + 1000])
    return losses_path(prefix, name)


def opened(domains: list[str]) -> DataSource:
    return open_data(DataOptions(data_path=("3", domains[0], "1", domains[1])))


def build(domains: list[str], samples: int = 40, **more) -> Datasets:
    source = opened(domains)
    words = ("3", domains[0], "1", domains[1])
    options = DataOptions(data_path=words, split="80,20", **more)
    return build_datasets(
        source,
        options,
        seq_length=T,
        train_samples=samples,
        valid_samples=8,
        seed=1,
        reference=open_reference_losses(source, "made-up"),
    )


def test_the_file_is_a_plain_float16_array(domains: list[str]) -> None:
    path = write(domains[0])
    losses = np.load(path)
    assert losses.dtype == np.float16
    np.testing.assert_array_equal(losses, made_up(domains[0]))
    facts = json.loads(path.with_suffix(".json").read_text())
    assert facts["scored"] == facts["tokens"] == len(losses)


@pytest.mark.parametrize("samples", [40, 3000])
def test_a_sample_reads_the_losses_of_its_labels(domains: list[str], samples: int) -> None:
    """In one epoch and in several, over spans of documents."""
    for prefix in domains:
        write(prefix)
    data = build(domains, samples)
    for i in range(0, samples, max(1, samples // 200)):
        item = data.train[i]
        prefix = domains[item["domain"]]
        part = data.train._parts[item["domain"]]
        positions = positions_of(part, int(data.train._index_in_domain[i]))
        ids = read_index(prefix).ids()
        np.testing.assert_array_equal(ids[positions], item["tokens"])
        assert item["reference"].dtype == torch.float32
        np.testing.assert_array_equal(item["reference"], made_up(prefix)[positions[1:]])
    assert data.valid is not None and "reference" not in data.valid[0]


def test_one_domain_and_every_split_of_ranks(domains: list[str]) -> None:
    for prefix in domains:
        write(prefix)
    data = build(domains).train
    for dp_rank in range(2):
        loader = build_loader(
            data,
            start_sample=0,
            num_samples=40,
            micro_batch_size=5,
            dp_rank=dp_rank,
            dp_size=2,
            num_workers=2,
        )
        for batch in loader:
            assert batch["reference"].shape == batch["valid"].shape
            for losses, sample in zip(batch["reference"], batch["samples"].tolist(), strict=True):
                assert torch.equal(losses, data[sample]["reference"])
    source = open_data(DataOptions(data_path=(domains[0],)))
    alone = build_datasets(
        source,
        DataOptions(data_path=(domains[0],), split="80,20"),
        seq_length=T,
        train_samples=4,
        valid_samples=0,
        seed=1,
        reference=open_reference_losses(source, "made-up"),
    )
    assert alone.train[0]["reference"].shape == (T,)


def test_what_is_filled_up_has_no_loss(domains: list[str]) -> None:
    for prefix in domains:
        write(prefix)
    data = build(domains)
    part = data.train._parts[0]
    losses = open_reference_losses(opened(domains), "made-up")

    class Short:
        """The last sequence of a set whose tokens run out."""

        dataset = part.dataset
        document_index = sample_index = shuffle_index = None

        def _query_document_sample_shuffle_indices(self, index: int):
            ids = self.dataset.get(3, offset=1, length=5)
            return np.concatenate([ids, [self._pad_token_id] * (T - 4)]), None

    begin = int(read_index(domains[0]).lengths[:3].sum()) + 1
    expected = np.zeros(T, np.float32)
    expected[:4] = made_up(domains[0])[begin + 1 : begin + 5]
    np.testing.assert_array_equal(losses.of_sample(0, Short(), 0), expected)


def test_a_killed_writer_goes_on(domains: list[str]) -> None:
    losses, meta = made_up(domains[0]), meta_of(domains[0])
    with ReferenceWriter(domains[0], "made-up", meta) as writer:
        writer.append(losses[:1000])
        path = losses_path(domains[0], "made-up")
        # Killed after writing, before counting.
        with path.open("ab") as file:
            file.write(b"\x55" * 333)
    with pytest.raises(ConfigError, match=rf"{path} has 1000 of {len(losses)} tokens. Run the"):
        open_reference_losses(open_data(DataOptions(data_path=(domains[0],))), "made-up")
    with ReferenceWriter(domains[0], "made-up", meta) as writer:
        assert writer.scored == 1000
        writer.append(losses[1000:])
    np.testing.assert_array_equal(np.load(path), losses)
    with ReferenceWriter(domains[0], "made-up", meta) as writer:
        assert writer.scored == len(losses)  # and a third time there is nothing left to do
        with pytest.raises(ValueError, match=r"\+ 1 of"):
            writer.append(losses[:1])
    with ReferenceWriter(domains[0], "made-up", meta, overwrite=True) as writer:
        assert writer.scored == 0


def test_losses_beyond_float16_are_cut_and_nan_is_refused(domains: list[str]) -> None:
    with ReferenceWriter(domains[0], "made-up", meta_of(domains[0])) as writer:
        writer.append(np.array([1e6, 2.0], dtype=np.float32))
        with pytest.raises(ConfigError, match="losses that are not finite, at token 2 of"):
            writer.append(np.array([1.0, np.nan], dtype=np.float32))
        assert writer.scored == 2
    with losses_path(domains[0], "made-up").open("rb") as file:
        np.lib.format.read_magic(file), np.lib.format.read_array_header_1_0(file)
        assert np.frombuffer(file.read(), "<f2").tolist() == [65504.0, 2.0]


def test_other_losses_are_not_continued(domains: list[str]) -> None:
    write(domains[0])
    for change, message in (
        ({"weights": "v" * 64}, "weights: www.* there, vvv"),
        ({"seq_length": 16}, "seq_length: 32 there, 16 here"),
        ({"data": "d"}, "data: .* there, d here"),
    ):
        with pytest.raises(ConfigError, match=rf"another source \({message}.*--overwrite"):
            ReferenceWriter(domains[0], "made-up", meta_of(domains[0], **change))


def test_two_writers_do_not_mix(domains: list[str]) -> None:
    meta = meta_of(domains[0])
    with (
        ReferenceWriter(domains[0], "made-up", meta),
        pytest.raises(
            ConfigError, match=rf"made-up: .* is being written by process {os.getpid()} on"
        ),
    ):
        ReferenceWriter(domains[0], "made-up", meta)


def test_what_cannot_be_read_is_refused(domains: list[str]) -> None:
    source = opened(domains)

    def refusal() -> str:
        with pytest.raises(ConfigError) as caught:
            open_reference_losses(source, "made-up")
        return str(caught.value)

    assert f"{losses_path(domains[0], 'made-up')} or its .json is missing" in refusal()
    path = write(domains[0])
    other = write(domains[1], weights="v" * 64)
    assert "beta were scored with different weights" in refusal()
    other.unlink()
    with pytest.raises(ConfigError, match=r"npy is damaged \(.* --overwrite"):
        write(domains[1], weights="v" * 64)
    other.with_suffix(".json").unlink()
    write(domains[1])
    assert open_reference_losses(source, "made-up").weights == "w" * 64

    whole, facts = path.read_bytes(), path.with_suffix(".json").read_text()
    path.write_bytes(whole[:-100])
    assert f"{path} is damaged" in refusal() and "--overwrite" in refusal()
    np.save(path, np.zeros(7, np.float16))
    assert "it holds float16 [7]" in refusal()
    path.write_bytes(whole)
    path.with_suffix(".json").write_text(facts.replace(meta_of(domains[0]).data[:20], "0" * 20))
    assert f"was made from other text than {domains[0]}.bin" in refusal()


def test_damage_is_found_before_more_is_written_and_by_verification(domains: list[str]) -> None:
    """Zeros behind a good header are losses like others, but not those that were stored."""
    path = write(domains[0])
    assert verify_data(domains[0]).losses == ("made-up",)
    whole = path.read_bytes()
    for damaged in (whole[:128] + bytes(len(whole) - 128), whole[:-2]):
        path.write_bytes(damaged)
        for find in (lambda: verify_data(domains[0]), lambda: write(domains[0])):
            with pytest.raises(ConfigError, match=rf"{path} is damaged \(.* --overwrite"):
                find()
    meta, losses = meta_of(domains[0]), made_up(domains[0])
    with ReferenceWriter(domains[0], "made-up", meta, overwrite=True) as writer:
        writer.append(losses[:1000])
    assert verify_data(domains[0]).losses == ()  # not complete
    with ReferenceWriter(domains[0], "made-up", meta) as writer:
        writer.append(losses[1000:])
    assert path.read_bytes() == whole and verify_data(domains[0]).losses == ("made-up",)


def test_losses_of_versions_without_a_checksum(domains: list[str]) -> None:
    path = write(domains[0])
    facts = json.loads(path.with_suffix(".json").read_text())
    del facts["crc32"]
    path.with_suffix(".json").write_text(json.dumps({**facts, "scored": 1000}))
    write(domains[0])
    np.testing.assert_array_equal(np.load(path), made_up(domains[0]))
    assert verify_data(domains[0]).losses == ("made-up",)


def test_new_losses_leave_those_that_a_run_reads(domains: list[str]) -> None:
    mapped = np.load(write(domains[0]), mmap_mode="r")
    with ReferenceWriter(domains[0], "made-up", meta_of(domains[0]), overwrite=True):
        np.testing.assert_array_equal(mapped, made_up(domains[0]))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda facts: "{", "is not JSON"),
        (lambda facts: "[" * 100_000, "nested too deep"),
        (lambda facts: "[]", "top level"),
        (lambda facts: json.dumps({**facts, "scored": "5"}), "scored: "),
        (lambda facts: json.dumps({**facts, "tokens": -1}), "tokens: "),
        (lambda facts: json.dumps({**facts, "scored": 10**9}), "counts 1000000000 of"),
        (lambda facts: json.dumps({**facts, "seq_length": 0}), "seq_length: "),
        (lambda facts: json.dumps({**facts, "format_version": 2}), "format_version: "),
        (lambda facts: json.dumps({**facts, "surplus": 1}), "surplus: "),
    ],
)
def test_facts_that_are_not_as_they_were_written(domains: list[str], change, says: str) -> None:
    facts = write(domains[0]).with_suffix(".json")
    facts.write_text(change(json.loads(facts.read_text())))
    for read in (
        lambda: open_reference_losses(opened(domains), "made-up"),
        lambda: write(domains[0]),
        lambda: verify_data(domains[0]),
    ):
        with pytest.raises(ConfigError, match=rf"{says}.* score the text again") as caught:
            read()
        assert str(facts) in str(caught.value)


def test_what_is_no_file(domains: list[str]) -> None:
    path = write(domains[0])
    write(domains[1])
    path.unlink()
    os.mkfifo(path)
    for read in (
        lambda: open_reference_losses(opened(domains), "made-up"),
        lambda: write(domains[0]),
        lambda: verify_data(domains[0]),
    ):
        with pytest.raises(ConfigError, match="is a named pipe"):
            read()
