"""Saving and loading: a checkpoint that any layout writes and any layout reads.

A folder `iter_0000100` holds master weights and Adam's moments (tensor_files.py), run.json (the
resolved options and the model's shape), state.json (TrainState), the tokenizer, and the manifest
that makes it complete. A weights-only checkpoint, as tools/convert_from_hf.py writes, has neither
moments nor state.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_eslm.errors import ConfigError
from megatron_eslm.model.init import WORD_EMBEDDING
from megatron_eslm.model.lora import is_adapter
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.parallel.collectives import on_every_rank, on_rank_zero
from megatron_eslm.parallel.mesh import Mesh
from megatron_eslm.training import manifest as manifests
from megatron_eslm.training import tensor_files
from megatron_eslm.training.finding import Found, find_checkpoint
from megatron_eslm.training.optimizer_state import OptimizerState
from megatron_eslm.training.parameter_shard import shards_of, whole
from megatron_eslm.training.state import TrainState
from megatron_eslm.training.tensor_shares import gather_share

if TYPE_CHECKING:
    from megatron_eslm.training.engine import Engine

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """Full weights on the CPU, whatever the layout they were saved from."""

    weights: dict[str, torch.Tensor]
    """float32, by parameter name; the vocabulary's padding rows are zero, adapters are merged."""
    shape: ModelShape
    tokenizer_dir: Path | None
    iteration: int
    data: dict[str, Any] | None = None
    """How the run that saved them read its data (`data_record`); None where that is not known."""


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"--save {folder}: {error.strerror or error}. The checkpoint was not written; earlier "
            "ones are untouched."
        ) from error


def prepare_save_folder(save: str, load: str | None) -> None:
    """Check, before anything is trained, that checkpoints can be written to `save`.

    Raises:
        ConfigError: no permission, or another run's checkpoints are there.
    """
    folder = Path(save)
    with _disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-probe"
        probe.write_bytes(b"\0" * 4096)
        probe.unlink()
    continues = load is not None and Path(load).resolve() in (
        folder.resolve(),
        *(p.resolve() for p in manifests.list_checkpoints(folder)),
    )
    if manifests.list_checkpoints(folder) and not continues:
        raise ConfigError(
            f"--save {folder} already holds checkpoints of a run. Continue that run with --load "
            f"{folder}, or save to another folder."
        )
    manifests.clean(folder)


def save_checkpoint(
    engine: Engine,
    save: str,
    *,
    state: TrainState,
    run: dict[str, Any],
    tokenizer: Any,
    keep_last: int,
) -> Path:
    """Write one checkpoint aside, publish it, remove the oldest. Collective over all ranks.

    Args:
        engine: what trains.
        save: folder of checkpoints.
        state, run: what state.json and run.json hold.
        tokenizer: saved with it, so that export and generation need no flags.
        keep_last: complete checkpoints to keep; 0 keeps all.
    """
    folder = Path(save) / manifests.checkpoint_name(state.iteration)
    temporary = manifests.aside(folder)

    def begin() -> None:
        with _disk_errors(folder):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            (temporary / "run.json").write_text(json.dumps(run, indent=1) + "\n")
            (temporary / "state.json").write_text(json.dumps(state.to_dict(), indent=1) + "\n")
            tokenizer.save(temporary / "tokenizer")

    def describe_share() -> dict[str, dict[str, int]]:
        with _disk_errors(folder):
            mine = manifests.files_of(temporary)[dist.get_rank() :: dist.get_world_size()]
            return {name: manifests.describe(temporary / name, sync=True) for name in mine}

    on_rank_zero(begin)
    _save_tensors(engine, folder, run["shape"]["vocab_size"])
    shares: list = [None] * dist.get_world_size()
    dist.all_gather_object(shares, on_every_rank(describe_share))

    def finish() -> None:
        with _disk_errors(folder):
            if folder.exists():  # the same step saved again, after going back to an earlier one
                manifests.remove(folder)
            head = {"kind": "training", "iteration": state.iteration}
            files = {name: facts for share in shares for name, facts in share.items()}
            manifests.publish(folder, head, dict(sorted(files.items())))
            if keep_last:
                # Never this one, although a run that went back to an earlier step has newer ones
                # beside it, or damaged ones.
                saved = manifests.list_checkpoints(Path(save))
                for old in saved[saved.index(folder) + 1 :][keep_last - 1 :]:
                    manifests.remove(old)

    on_rank_zero(finish)
    return folder


def _save_tensors(engine: Engine, folder: Path, vocab_size: int) -> None:
    """Write every rank's share of the tensors, and their index, aside. Collective."""
    temporary, rank = manifests.aside(folder), dist.get_rank()
    lora = engine.model.settings.lora
    scale = None if lora is None else lora.scale
    state = OptimizerState(engine)
    scalars = state.scalars()
    shards, tensors = gather_share(engine, state, vocab_size)

    def write() -> None:
        with _disk_errors(folder):
            if tensors:
                tensor_files.write_file(temporary / tensor_files.file_name(rank), tensors)

    on_every_rank(write)
    shares: list = [None] * dist.get_world_size()
    dist.all_gather_object(shares, (tensor_files.file_name(rank), shards, scalars))
    assert all(share[2] == scalars for share in shares), "ranks differ in Adam's step or loss scale"

    def write_index() -> None:
        with _disk_errors(folder):
            parts = ((file, part) for file, part, _ in shares)
            tensor_files.write_index(temporary, parts, scalars, scale)

    on_rank_zero(write_index)


def load_model(model: torch.nn.Module, mesh: Mesh, found: Found) -> None:
    """Fill a model, or a pipeline stage of one, with this rank's part of the weights. Collective.

    Adapters stay as they are; those of the checkpoint, if it has any, are merged.

    Args:
        model: not yet in an engine; any tensor-parallel size, any type.
        mesh: this rank's place.
        found: a checkpoint of either kind.

    Raises:
        ConfigError: a parameter is missing there or has another shape.
    """

    @torch.no_grad()
    def fill() -> None:
        reader = tensor_files.TensorReader(found.folder)
        shards = shards_of(model, mesh, found.shape.vocab_size)
        shards = {name: shard for name, shard in shards.items() if not is_adapter(name)}
        reader.check_holds(shards)
        parameters = dict(model.named_parameters())
        for name, shard in shards.items():
            parameter = parameters[name]
            parameter.copy_(reader.read("weight", name, shard).view(parameter.shape))

    on_every_rank(fill)


def load_engine(engine: Engine, found: Found) -> TrainState:
    """Restore weights, optimizer and loss scale; return the state. Collective over all ranks.

    Raises:
        ConfigError: a parameter is missing there or has another shape.
    """
    state = OptimizerState(engine)

    def restore() -> None:
        reader = tensor_files.TensorReader(found.folder, merged=False)
        shards = shards_of(engine.model, engine.mesh, found.shape.vocab_size)
        reader.check_holds(shards)
        for name, parameter in engine.model.named_parameters():
            for kind in state.kinds(parameter):
                begin, end, part = state.part(parameter, kind)
                if begin < end:
                    part.copy_(reader.read(kind, name, shards[name], begin, end))
        state.set_scalars(reader.scalars)

    on_every_rank(restore)
    state.publish()
    train_state = found.state()
    # DeepSpeed's own monitors count with these.
    engine.ds.global_steps = train_state.iteration
    engine.ds.global_samples = train_state.consumed_samples
    return train_state


def read_weights(load: str | Path, tag: str | None = None) -> Weights:
    """Full float32 weights of a checkpoint of any kind and layout, for export and generation.

    Adapters are merged.

    Raises:
        ConfigError: no complete checkpoint there.
    """
    found = find_checkpoint(load, tag)
    shape = found.shape
    weights = tensor_files.TensorReader(found.folder).read_whole("weight")
    word = weights[WORD_EMBEDDING]
    padding = word.new_zeros(shape.padded_vocab_size - shape.vocab_size, word.shape[1])
    weights[WORD_EMBEDDING] = torch.cat([word, padding])
    iteration = found.state().iteration if found.kind == "training" else 0
    data = found.run.get("data") if found.kind == "training" else None
    return Weights(weights, shape, found.tokenizer_dir, iteration, data)


def write_weights(
    save: str | Path,
    weights: dict[str, torch.Tensor],
    shape: ModelShape,
    tokenizer_dir: Path | None,
    source: str,
) -> Path:
    """Write a weights-only checkpoint that `--load` starts a run from.

    Args:
        save: folder to hold it, as iter_0000000; must hold no checkpoint.
        weights: float32, by parameter name; the vocabulary's padding rows are left out.
        source: where they come from, for run.json.

    Raises:
        ConfigError: checkpoints are there already, or it cannot be written.
    """
    folder = Path(save) / manifests.checkpoint_name(0)
    if manifests.list_checkpoints(Path(save)):
        raise ConfigError(f"--save {save} already holds checkpoints; choose another folder.")
    temporary = manifests.aside(folder)
    with _disk_errors(folder):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        weights = {**weights, WORD_EMBEDDING: weights[WORD_EMBEDDING][: shape.vocab_size]}
        file = tensor_files.file_name(0)
        tensors = {f"weight/{n}": t.contiguous() for n, t in weights.items()}
        tensor_files.write_file(temporary / file, tensors)
        shards = {name: whole(tuple(tensor.shape)) for name, tensor in weights.items()}
        tensor_files.write_index(temporary, [(file, shards)], tensor_files.Scalars())
        run = {"source": source, "shape": shape.to_dict()}
        (temporary / "run.json").write_text(json.dumps(run, indent=1) + "\n")
        if tokenizer_dir is not None:
            shutil.copytree(tokenizer_dir, temporary / "tokenizer")
        files = {
            name: manifests.describe(temporary / name, sync=True)
            for name in manifests.files_of(temporary)
        }
        manifests.publish(folder, {"kind": "weights", "iteration": 0}, files)
    return folder
