"""`--dump-selection`: what each micro-step kept, for the whole global micro-batch."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_eslm.errors import ConfigError
from megatron_eslm.files.lock import FileLock
from megatron_eslm.parallel.mesh import Mesh
from megatron_eslm.selection.state import MicroStepRecord


def take_dump_folder(path: str) -> FileLock:
    """Make the folder of `--dump-selection` before anything is trained, for this run alone.

    Raises:
        ConfigError: it cannot be made or written to, or another run writes there.
    """
    lock = FileLock(Path(path) / ".dump.lock")
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        lock.take(f"--dump-selection {path}", "Name another folder.")
    except OSError as error:
        raise ConfigError(
            f"--dump-selection {path} cannot be written: {error.strerror}. Name another folder."
        ) from error
    return lock


def dump_selection(
    folder: Path,
    iteration: int,
    micro_step: int,
    tokens_MS: torch.Tensor | None,
    record: MicroStepRecord,
    mesh: Mesh,
) -> None:
    """Write `iter{iteration:07d}_micro{m:04d}.npz` on rank 0. Collective.

    The record is this stage's and is put together over the pipeline; `tokens_MS` is needed on the
    first stage. Rows are in sampler order over all data-parallel ranks (B of them): tokens int
    [B, T+1], instance_scores f32 [B], instance_kept bool [B], tau_instance, token_scores f32 [B, T]
    (nan where nothing was scored), token_kept bool [B, T], tau_token, loss. With scope `local` the
    thresholds are rank 0's.

    Raises:
        OSError: on rank 0; the disk does not take it, and nothing is left of it.
    """
    if mesh.tp_rank:
        return  # tensor-parallel ranks hold the same
    record = _over_pipeline(record, mesh)
    if not mesh.is_first_stage:
        return
    assert tokens_MS is not None and record.loss is not None
    rows, positions = tokens_MS.shape[0], tokens_MS.shape[1] - 1
    nan_M, all_M = torch.full((rows,), torch.nan), torch.ones(rows, dtype=torch.bool)
    nan_MT = torch.full((rows, positions), torch.nan)

    def or_else(value: torch.Tensor | None, default: torch.Tensor) -> np.ndarray:
        return (default if value is None else value).detach().cpu().numpy()

    mine = {
        "tokens": tokens_MS.cpu().numpy(),
        "instance_scores": or_else(record.instance_scores_M, nan_M),
        "instance_kept": or_else(record.instance_kept_M, all_M),
        "token_scores": or_else(record.token_scores_MT, nan_MT),
        "token_kept": or_else(record.token_kept_MT, torch.zeros(nan_MT.shape, dtype=torch.bool)),
        "loss": float(record.loss) / mesh.dp_size,
    }
    everyone: list = [None] * mesh.dp_size
    dist.all_gather_object(everyone, mine, group=mesh.dp_group)
    if mesh.dp_rank:
        return
    arrays: dict[str, Any] = {
        key: np.concatenate([part[key] for part in everyone]) for key in mine if key != "loss"
    }
    arrays["tau_instance"] = _number(record.tau_instance)
    arrays["tau_token"] = _number(record.tau_token)
    arrays["loss"] = np.float32(sum(part["loss"] for part in everyone))
    _write(folder / f"iter{iteration:07d}_micro{micro_step:04d}.npz", arrays)


def _number(value: float | None) -> np.float32:
    return np.float32(np.nan if value is None else value)


def _write(path: Path, arrays: dict[str, Any]) -> None:
    """A file that is whole or not there, unless the machine fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}")
    try:
        with draft.open("wb") as file:
            np.savez_compressed(file, **arrays)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _over_pipeline(record: MicroStepRecord, mesh: Mesh) -> MicroStepRecord:
    """The record with what the other stages know of the micro-step, on the CPU. Collective."""
    if mesh.pp_size == 1:
        return record
    stages: list = [None] * mesh.pp_size
    dist.all_gather_object(stages, record.cpu(), group=mesh.pp_group)
    return functools.reduce(MicroStepRecord.merge, stages)
