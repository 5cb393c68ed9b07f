"""`--dump-selection`: write what each step read and kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_eslm.data.mixture import Mixture
from megatron_eslm.errors import ConfigError
from megatron_eslm.files.lock import FileLock
from megatron_eslm.parallel.mesh import Mesh
from megatron_eslm.training.step_batches import Records


def take_dump_folder(path: str) -> FileLock:
    """Create and lock the folder of `--dump-selection` before training.

    Raises:
        ConfigError: the folder cannot be created or written to, or another run writes there.
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


def read_tokens(dataset: Mixture, samples: Sequence[int], mesh: Mesh) -> np.ndarray | None:
    """Tokens of the sequences, for the dump by rank 0; None on other ranks."""
    return None if mesh.rank else np.stack([dataset[i]["tokens"].numpy() for i in samples])


def dump_selection(
    folder: Path,
    iteration: int,
    tokens: np.ndarray | None,
    samples: Sequence[int],
    records: Records,
    mesh: Mesh,
) -> None:
    """Write `iter{iteration:07d}.npz` on rank 0. Collective.

    Holds the C rows that the step read, in sample order: samples int64 [C], tokens int64 [C, T+1],
    instance_scores f32 [C] and token_scores f32 [C, T] (nan where nothing was scored),
    instance_kept bool [C], token_kept bool [C, T], tau_instance and tau_token f32 [C] (thresholds
    that apply to a row and its tokens; nan if none), and loss f32 (the step's).

    Args:
        folder: folder of the dumps.
        iteration: the step, from 1.
        tokens: int64 [C, T+1], the sequences; needed on rank 0 (`read_tokens`).
        samples: numbers of the C sequences.
        records: records of this rank and stage, with row numbers among the C.
        mesh: the mesh.

    Raises:
        OSError: on rank 0, if the disk is full or fails; no partial file is left.
    """
    if mesh.tp_rank:
        return  # tensor-parallel ranks have identical records
    everyone = _gathered([(rows, record.cpu()) for rows, record in records], mesh)
    if mesh.rank:
        return
    assert tokens is not None
    num_rows, positions = tokens.shape[0], tokens.shape[1] - 1

    def filled(value: float | bool, *shape: int) -> np.ndarray:
        dtype = np.float32 if isinstance(value, float) else bool
        return np.full((num_rows, *shape), value, dtype=dtype)

    arrays: dict[str, np.ndarray] = {
        "samples": np.array(samples),
        "tokens": tokens,
        "instance_scores": filled(np.nan),
        "instance_kept": filled(True),
        "tau_instance": filled(np.nan),
        "token_scores": filled(np.nan, positions),
        "token_kept": filled(False, positions),
        "tau_token": filled(np.nan),
    }
    losses = []
    for rows, record in everyone:
        for name, value in (
            ("instance_scores", record.instance_scores_M),
            ("instance_kept", record.instance_kept_M),
            ("tau_instance", record.tau_instance),
            ("token_scores", record.token_scores_MT),
            ("token_kept", record.token_kept_MT),
            ("tau_token", record.tau_token),
        ):
            if value is not None:
                arrays[name][rows] = value
        if record.loss is not None:
            losses.append(float(record.loss))
    arrays["loss"] = np.float32(sum(losses) / len(losses))
    _write(folder / f"iter{iteration:07d}.npz", arrays)


def _gathered(records: Records, mesh: Mesh) -> Records:
    """Gather the records of all stages and data-parallel ranks."""
    for group in (mesh.pp_group, mesh.dp_group):
        if group.size() > 1:
            several: list = [None] * group.size()
            dist.all_gather_object(several, records, group=group)
            records = [record for some in several for record in some]
    return records


def _write(path: Path, arrays: dict[str, Any]) -> None:
    """Write a file atomically, except for machine failures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}")
    try:
        with draft.open("wb") as file:
            np.savez_compressed(file, **arrays)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
