"""Save checkpoints that do not depend on the layout.

A folder `iter_0000100` contains master weights and Adam's moments (tensor_files.py), run.json
(resolved options and model shape), state.json (TrainState), the tokenizer, and the manifest, which
marks it as complete (manifest.py). All files but the tokenizer's name their run and iteration.
Weights-only checkpoints (from tools/convert_from_hf.py) have neither moments nor state.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megatron_eslm.checkpoint import manifest as manifests
from megatron_eslm.checkpoint import tensor_files, tensor_index
from megatron_eslm.checkpoint.manifest import Stamp
from megatron_eslm.checkpoint.optimizer_state import OptimizerState
from megatron_eslm.checkpoint.publish import publish, write_json
from megatron_eslm.checkpoint.save_folder import SaveFolder, disk_errors
from megatron_eslm.checkpoint.tensor_shares import gather_share
from megatron_eslm.checkpoint.train_state import TrainState
from megatron_eslm.errors import ConfigError
from megatron_eslm.parallel.collectives import on_every_rank, on_rank_zero

if TYPE_CHECKING:
    from megatron_eslm.engine.engine import Engine


def save_checkpoint(
    engine: Engine,
    saves: SaveFolder,
    *,
    state: TrainState,
    run: dict[str, Any],
    tokenizer: Any,
    keep_last: int,
) -> Path:
    """Write a checkpoint draft, publish it, remove the oldest checkpoints. Collective.

    Args:
        engine: the training engine.
        saves: folder of checkpoints, locked by rank 0.
        state: contents of state.json.
        run: contents of run.json.
        tokenizer: stored too, so that export and generation need no flags.
        keep_last: number of complete checkpoints to keep; 0 keeps all.
    """
    stamp = Stamp(run_id=state.run_id, iteration=state.iteration)
    folder = saves.path / manifests.checkpoint_name(state.iteration)

    def begin() -> Path:
        with disk_errors(folder):
            return saves.begin(state.iteration)

    def write_metadata() -> None:
        with disk_errors(folder):
            write_json(draft / manifests.RUN, {**asdict(stamp), **run})
            write_json(draft / manifests.STATE, state.to_dict())
            tokenizer.save(draft / manifests.TOKENIZER)

    def finish() -> None:
        publish(saves, draft, "training", stamp, files)
        saves.prune(folder, keep_last)

    draft = on_rank_zero(begin)
    try:
        on_rank_zero(write_metadata)
        _save_tensors(engine, draft, folder, stamp, run["shape"]["vocab_size"])
        files = _describe(draft, folder)
        on_rank_zero(finish)
    except ConfigError:  # raised on every rank, so nobody writes there any more
        if dist.get_rank() == 0:
            saves.discard(draft)
        raise
    return folder


def _describe(draft: Path, folder: Path) -> dict[str, manifests.Entry]:
    """Sync all files of a draft to disk; return sizes and checksums. Collective."""

    def describe_share() -> dict[str, manifests.Entry]:
        with disk_errors(folder):
            mine = manifests.files_of(draft)[dist.get_rank() :: dist.get_world_size()]
            return {name: manifests.describe(draft / name, sync=True) for name in mine}

    shares: list = [None] * dist.get_world_size()
    dist.all_gather_object(shares, on_every_rank(describe_share))
    return {name: entry for share in shares for name, entry in share.items()}


def _save_tensors(engine: Engine, draft: Path, folder: Path, stamp: Stamp, vocab_size: int) -> None:
    """Write every rank's share of the tensors, and their index, into a draft. Collective."""
    rank = dist.get_rank()
    lora = engine.model.settings.lora
    scale = None if lora is None else lora.scale
    state = OptimizerState(engine)
    scalars = state.scalars()
    shards, tensors = gather_share(engine, state, vocab_size)

    def write() -> None:
        with disk_errors(folder):
            if odd := tensor_files.not_finite(tensors):
                # It must not replace earlier checkpoints, which are still good.
                raise ConfigError(
                    f"--save {folder}: {odd} has values that are not finite. The checkpoint was "
                    "not written; earlier ones are untouched. Continue from one of them with a "
                    "lower --lr, or inspect the data that the run has read since."
                )
            if tensors:
                path = draft / tensor_files.file_name(rank)
                tensor_files.write_file(path, tensors, tensor_files.metadata_of(stamp))

    on_every_rank(write)
    shares: list = [None] * dist.get_world_size()
    dist.all_gather_object(shares, (tensor_files.file_name(rank), shards, scalars))
    assert all(share[2] == scalars for share in shares), "ranks differ in Adam's step or loss scale"

    def write_index() -> None:
        with disk_errors(folder):
            parts = ((file, part) for file, part, _ in shares)
            tensor_index.write_index(draft, tensor_index.index_of(stamp, parts, scalars, scale))

    on_rank_zero(write_index)
