"""Tensor files: any part of a parameter is read back, whichever parts were written."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch

from megatron_eslm.checkpoint.manifest import TENSORS, Stamp
from megatron_eslm.checkpoint.shards import Shard, whole
from megatron_eslm.checkpoint.tensor_files import (
    TensorReader,
    file_name,
    metadata_of,
    write_file,
)
from megatron_eslm.checkpoint.tensor_index import LossScale, Scalars, index_of, write_index
from megatron_eslm.checkpoint.tensor_shares import deal
from megatron_eslm.errors import ConfigError

ROWS, PADDED, WIDTH = 10, 12, 8
STAMP = Stamp(run_id="0" * 32, iteration=7)
SCALARS = Scalars(7, LossScale(2.0, 5, -1, 2))


def cut(dim: int | None, rank: int, size: int, shape: tuple[int, ...]) -> Shard:
    """The part of a parameter that one of `size` ranks holds; dimension 0 is padded to PADDED."""
    part = list(shape)
    if dim is None:
        return whole(shape)
    part[dim] = (PADDED if dim == 0 else shape[dim]) // size
    begin = rank * part[dim]
    return Shard(full_shape=shape, shape=tuple(part), dim=dim, begin=begin)


def part_of(full: torch.Tensor, shard: Shard) -> torch.Tensor:
    """What `shard` is of `full`, by plain indexing: zero beyond it."""
    sizes = list(full.shape)
    sizes[shard.axis] = max(sizes[shard.axis], shard.begin + shard.shape[shard.axis])
    wide = torch.zeros(sizes)
    wide[tuple(slice(size) for size in full.shape)] = full
    return wide.narrow(shard.axis, shard.begin, shard.shape[shard.axis])


@pytest.fixture
def full() -> dict[str, torch.Tensor]:
    """A parameter for each way of cutting one."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"vocabulary": (ROWS, WIDTH), "column": (PADDED, WIDTH), "row": (ROWS, WIDTH)}
    shapes |= {"bias": (PADDED,), "norm": (WIDTH,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


DIMS = {"vocabulary": 0, "column": 0, "row": 1, "bias": 0, "norm": None}


def write(folder: Path, full: dict[str, torch.Tensor], size: int) -> None:
    """What tensor-parallel ranks of a layout of `size` write, one file each."""
    shares = []
    for rank in range(size):
        tensors, shards = {}, {}
        for name, tensor in full.items():
            shard = cut(DIMS[name], rank, size, tuple(tensor.shape))
            if (shard.dim is not None or rank == 0) and shard.end > shard.begin:
                stored = tensor.narrow(shard.axis, shard.begin, shard.end - shard.begin)
                tensors[f"weight/{name}"], shards[name] = stored.contiguous(), shard
        shares.append((file_name(rank), shards))
        write_file(folder / file_name(rank), tensors, metadata_of(STAMP))
    write_index(folder, index_of(STAMP, shares, SCALARS))


@pytest.mark.parametrize("written", [1, 2, 4])
def test_every_part_is_read_from_whatever_was_written(
    tmp_path: Path, full: dict[str, torch.Tensor], written: int
) -> None:
    write(tmp_path, full, written)
    reader = TensorReader(tmp_path)
    assert reader.scalars == SCALARS
    for name, tensor in full.items():
        assert torch.equal(reader.read_whole("weight")[name], tensor)
        for size in (1, 2, 4, 6):
            for rank in range(size):
                if DIMS[name] == 1 and WIDTH % size:
                    continue
                shard = cut(DIMS[name], rank, size, tuple(tensor.shape))
                expected = part_of(tensor, shard).flatten()
                assert torch.equal(reader.read("weight", name, shard), expected)
                for begin in range(0, shard.numel, 5):
                    for end in range(begin + 1, shard.numel + 1, 3):
                        read = reader.read("weight", name, shard, begin, end)
                        assert torch.equal(read, expected[begin:end]), (name, size, begin, end)


def test_others_may_read_a_file_where_the_umask_lets_them(tmp_path: Path) -> None:
    for umask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(umask)
        try:
            write_file(tmp_path / f"{umask}", {"weight/a": torch.zeros(2)})
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / f"{umask}").stat().st_mode) == mode


def test_a_disk_that_takes_nothing_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="serializing"):
        write_file(tmp_path / "folder", {"weight/a": torch.zeros(2)})


def test_a_rank_of_nothing_but_padding_writes_nothing(
    tmp_path: Path, full: dict[str, torch.Tensor]
) -> None:
    write(tmp_path, {"vocabulary": full["vocabulary"]}, 6)
    index = json.loads((tmp_path / TENSORS).read_text())
    assert [p["begin"] for p in index["tensors"]["vocabulary"]["pieces"]] == [0, 2, 4, 6, 8]


def test_models_that_do_not_fit_are_refused(tmp_path: Path, full: dict[str, torch.Tensor]) -> None:
    write(tmp_path, full, 2)
    reader = TensorReader(tmp_path)
    reader.check_holds({"norm": whole((WIDTH,))})
    with pytest.raises(ConfigError, match=r"does not contain head\.weight \(1 parameters in all\)"):
        reader.check_holds({"norm": whole((WIDTH,)), "head.weight": whole((2, 2))})
    with pytest.raises(ConfigError, match=r"norm is \[8\] in .* and \[9\] in this model"):
        reader.check_holds({"norm": whole((9,))})


def test_a_damaged_index_is_refused(tmp_path: Path, full: dict[str, torch.Tensor]) -> None:
    write(tmp_path, full, 2)
    path = tmp_path / TENSORS
    index = json.loads(path.read_text())
    index["tensors"]["row"]["pieces"].pop()
    path.write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"tensors\.row: pieces overlap or do not cover"):
        TensorReader(tmp_path)
    del index["adam_step"]
    path.write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"tensors\.json .*adam_step: field required"):
        TensorReader(tmp_path)
    path.unlink()
    with pytest.raises(ConfigError, match=r"is damaged: tensors\.json is missing"):
        TensorReader(tmp_path)


def test_a_missing_or_torn_file_is_refused(tmp_path: Path, full: dict[str, torch.Tensor]) -> None:
    write(tmp_path, full, 2)
    (tmp_path / file_name(1)).write_bytes(b"torn")
    (tmp_path / file_name(0)).unlink()
    shard = cut(1, 0, 2, (ROWS, WIDTH))
    with pytest.raises(ConfigError, match=r"tensors_00000\.safetensors cannot be read"):
        TensorReader(tmp_path).read("weight", "row", shard)
    shard = cut(1, 1, 2, (ROWS, WIDTH))
    with pytest.raises(ConfigError, match=r"tensors_00001\.safetensors cannot be read"):
        TensorReader(tmp_path).read("weight", "row", shard)


def test_the_work_is_dealt_out_evenly() -> None:
    sizes = {"embedding": 40, **{f"matrix{i}": 12 for i in range(8)}, "bias": 1, "norm": 1}
    owners = deal(sizes, 3)
    assert owners.keys() == sizes.keys()
    loads = [sum(sizes[name] for name in sizes if owners[name] == rank) for rank in range(3)]
    assert max(loads) - min(loads) <= 12
    # The same on every rank, whatever the order of the names.
    assert deal(dict(reversed(sizes.items())), 3) == owners
    assert set(deal(sizes, 1).values()) == {0}
