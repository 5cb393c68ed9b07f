"""Save checkpoints that do not depend on the layout.

A folder `iter_0000100` contains master weights and Adam's moments (tensor_files.py), run.json
(resolved options and model shape), state.json (TrainState), the tokenizer, and the manifest, which
marks it as complete (manifest.py). All files but the tokenizer's name their run and iteration.
Weights-only checkpoints (from tools/convert_from_hf.py) have neither moments nor state.

A save has two parts. Ranks agree on its contents (`begin_draft`), which is collective and needs the
model. Writing and publishing the files is not, so saver.py leaves it to a thread.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_eslm.checkpoint import manifest as manifests
from megatron_eslm.checkpoint import tensor_files, tensor_index
from megatron_eslm.checkpoint.host_copies import HostCopies
from megatron_eslm.checkpoint.manifest import RUN, STATE, TENSORS, TOKENIZER, Stamp
from megatron_eslm.checkpoint.optimizer_state import OptimizerState
from megatron_eslm.checkpoint.publish import publish, write_json
from megatron_eslm.checkpoint.save_folder import SaveFolder, disk_errors
from megatron_eslm.checkpoint.tensor_index import TensorIndex
from megatron_eslm.checkpoint.tensor_shares import gather_share, to_host
from megatron_eslm.checkpoint.train_state import TrainState
from megatron_eslm.errors import ConfigError, first_line
from megatron_eslm.parallel.collectives import on_rank_zero

if TYPE_CHECKING:
    from megatron_eslm.engine.engine import Engine


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """Contents of the files that only rank 0 writes."""

    run: dict[str, Any]
    """run.json."""
    state: dict[str, Any]
    """state.json."""
    index: TensorIndex
    tokenizer: Any
    """Stored too, so that export and generation need no flags."""


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A checkpoint before it is published: what one rank writes of it.

    The methods read memory and write files, and wait for no other rank.
    """

    saves: SaveFolder
    path: Path
    """The draft's folder, shared by all ranks."""
    stamp: Stamp
    tensors: dict[str, torch.Tensor]
    """On the CPU, by their name in the file; they must not change before `write` returns."""
    metadata: Metadata | None
    """On rank 0."""

    @property
    def folder(self) -> Path:
        """The checkpoint's folder, once it is published."""
        return self.saves.path / manifests.checkpoint_name(self.stamp.iteration)

    def write(self) -> dict[str, manifests.Entry]:
        """Write this rank's files, force them to disk, return sizes and checksums.

        Raises:
            ConfigError: the disk fails, or a tensor is not finite; names the file.
        """
        try:
            return self._write()
        except ConfigError:
            raise
        except Exception as error:  # an error of one rank only must end all of them
            raise ConfigError(
                f"--save {self.folder} could not be written: {type(error).__name__}: "
                f"{first_line(error)}. Earlier checkpoints are untouched."
            ) from error

    def _write(self) -> dict[str, manifests.Entry]:
        names = self._write_tensors()
        if self.metadata is not None:
            names += self._write_metadata(self.metadata)
        entries = {}
        for name in names:
            with disk_errors(self.folder / name):
                entries[name] = manifests.describe(self.path / name, sync=True)
        return entries

    def publish(self, files: dict[str, manifests.Entry], keep_last: int) -> None:
        """Make the draft a checkpoint, then remove the oldest ones; on rank 0.

        Args:
            files: sizes and checksums of all ranks' files.
            keep_last: number of complete checkpoints to keep; 0 keeps all.

        Raises:
            ConfigError: the disk fails, or what was written cannot be read back.
        """
        publish(self.saves, self.path, "training", self.stamp, files)
        self.saves.prune(self.folder, keep_last)

    def discard(self) -> None:
        """Remove the draft, once no rank writes to it any more."""
        self.saves.discard(self.path)

    def _write_tensors(self) -> list[str]:
        if odd := tensor_files.not_finite(self.tensors):
            # It must not replace earlier checkpoints, which are still good.
            raise ConfigError(
                f"--save {self.folder}: {odd} has values that are not finite. The checkpoint was "
                "not written; earlier ones are untouched. Continue from one of them with a "
                "lower --lr, or inspect the data that the run has read since."
            )
        if not self.tensors:
            return []
        name = tensor_files.file_name(dist.get_rank())
        with disk_errors(self.folder / name):
            metadata = tensor_files.metadata_of(self.stamp)
            tensor_files.write_file(self.path / name, self.tensors, metadata)
        return [name]

    def _write_metadata(self, metadata: Metadata) -> list[str]:
        with disk_errors(self.folder / RUN):
            write_json(self.path / RUN, {**asdict(self.stamp), **metadata.run})
        with disk_errors(self.folder / STATE):
            write_json(self.path / STATE, metadata.state)
        with disk_errors(self.folder / TENSORS):
            tensor_index.write_index(self.path, metadata.index)
        with disk_errors(self.folder / TOKENIZER):
            metadata.tokenizer.save(self.path / TOKENIZER)
            tokenizer = manifests.files_of(self.path / TOKENIZER)
        return [RUN, STATE, TENSORS, *(f"{TOKENIZER}/{name}" for name in tokenizer)]


def begin_draft(
    engine: Engine,
    saves: SaveFolder,
    *,
    state: TrainState,
    run: dict[str, Any],
    tokenizer: Any,
    copies: HostCopies | None,
) -> Draft:
    """Create a draft's folder and gather what each rank writes into it. Collective.

    Args:
        engine: the training engine.
        saves: folder of checkpoints, locked by rank 0.
        state: contents of state.json.
        run: contents of run.json.
        tokenizer: the tokenizer of the data.
        copies: memory for copies, so that training can go on. None: no step may be made before the
            draft is written.

    Raises:
        ConfigError: the folder cannot be created.
    """
    stamp = Stamp(run_id=state.run_id, iteration=state.iteration)

    def begin() -> Path:
        with disk_errors(saves.path / manifests.checkpoint_name(state.iteration)):
            return saves.begin(state.iteration)

    path = on_rank_zero(begin)
    optimizer = OptimizerState(engine)
    hold = to_host if copies is None else copies.hold
    shards, tensors = gather_share(engine, optimizer, run["shape"]["vocab_size"], hold)
    if copies is not None:
        copies.wait()
    rank, scalars = dist.get_rank(), optimizer.scalars()
    shares: list = [None] * dist.get_world_size()
    dist.all_gather_object(shares, (tensor_files.file_name(rank), shards, scalars))
    assert all(share[2] == scalars for share in shares), "ranks differ in Adam's step or loss scale"
    lora = engine.model.settings.lora
    index = tensor_index.index_of(
        stamp,
        ((file, part) for file, part, _ in shares),
        scalars,
        None if lora is None else lora.scale,
    )
    metadata = Metadata(run=run, state=state.to_dict(), index=index, tokenizer=tokenizer)
    return Draft(
        saves=saves,
        path=path,
        stamp=stamp,
        tensors=tensors,
        metadata=metadata if rank == 0 else None,
    )
