"""Saving and loading: a checkpoint that any layout writes and any layout reads.

A folder `iter_0000100` holds master weights and Adam's moments (tensor_files.py), run.json (the
resolved options and the model's shape), state.json (TrainState), the tokenizer, and the manifest
that makes it complete (manifest.py). All but the tokenizer say which run and iteration they are of.
A weights-only checkpoint, as tools/convert_from_hf.py writes, has neither moments nor state.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist

from megatron_eslm.errors import ConfigError
from megatron_eslm.model.init import WORD_EMBEDDING
from megatron_eslm.model.lora import is_adapter
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.parallel.collectives import on_every_rank, on_rank_zero
from megatron_eslm.parallel.mesh import Mesh
from megatron_eslm.training import manifest as manifests
from megatron_eslm.training import tensor_files, tensor_index
from megatron_eslm.training.finding import Found, find_checkpoint, read_contents
from megatron_eslm.training.manifest import Stamp, new_run_id
from megatron_eslm.training.optimizer_state import OptimizerState
from megatron_eslm.training.parameter_shard import shards_of, whole
from megatron_eslm.training.save_folder import SaveFolder, disk_errors
from megatron_eslm.training.state import TrainState
from megatron_eslm.training.tensor_files import KINDS
from megatron_eslm.training.tensor_shares import gather_share

if TYPE_CHECKING:
    from megatron_eslm.training.engine import Engine


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


def save_checkpoint(
    engine: Engine,
    saves: SaveFolder,
    *,
    state: TrainState,
    run: dict[str, Any],
    tokenizer: Any,
    keep_last: int,
) -> Path:
    """Write one checkpoint aside, publish it, remove the oldest. Collective over all ranks.

    Args:
        engine: what trains.
        saves: folder of checkpoints, taken by rank 0.
        state, run: what state.json and run.json hold.
        tokenizer: saved with it, so that export and generation need no flags.
        keep_last: complete checkpoints to keep; 0 keeps all.
    """
    stamp = Stamp(run_id=state.run_id, iteration=state.iteration)
    folder = saves.path / manifests.checkpoint_name(state.iteration)

    def begin() -> Path:
        with disk_errors(folder):
            return saves.begin(state.iteration)

    def write_facts() -> None:
        with disk_errors(folder):
            _write_json(draft / manifests.RUN, {**asdict(stamp), **run})
            _write_json(draft / manifests.STATE, state.to_dict())
            tokenizer.save(draft / manifests.TOKENIZER)

    def finish() -> None:
        _publish(saves, draft, "training", stamp, files)
        saves.prune(folder, keep_last)

    draft = on_rank_zero(begin)
    try:
        on_rank_zero(write_facts)
        _save_tensors(engine, draft, folder, stamp, run["shape"]["vocab_size"])
        files = _describe(draft, folder)
        on_rank_zero(finish)
    except ConfigError:  # on every rank: nobody writes there any more
        if dist.get_rank() == 0:
            saves.discard(draft)
        raise
    return folder


def _describe(draft: Path, folder: Path) -> dict[str, manifests.Entry]:
    """Sizes and sums of all files of a draft, which are then on disk. Collective."""

    def describe_share() -> dict[str, manifests.Entry]:
        with disk_errors(folder):
            mine = manifests.files_of(draft)[dist.get_rank() :: dist.get_world_size()]
            return {name: manifests.describe(draft / name, sync=True) for name in mine}

    shares: list = [None] * dist.get_world_size()
    dist.all_gather_object(shares, on_every_rank(describe_share))
    return {name: entry for share in shares for name, entry in share.items()}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n")


def _publish(
    saves: SaveFolder,
    draft: Path,
    kind: Literal["training", "weights"],
    stamp: Stamp,
    files: dict[str, manifests.Entry],
) -> Path:
    """Publish a draft that can be read back: older ones are removed once it is there."""
    files = dict(sorted(files.items()))
    manifest = manifests.Manifest(kind=kind, files=files, **asdict(stamp))
    read_contents(draft, manifest)
    with disk_errors(saves.path / manifests.checkpoint_name(stamp.iteration)):
        return saves.publish(draft, manifest)


def _save_tensors(engine: Engine, draft: Path, folder: Path, stamp: Stamp, vocab_size: int) -> None:
    """Write every rank's share of the tensors, and their index, aside. Collective."""
    rank = dist.get_rank()
    lora = engine.model.settings.lora
    scale = None if lora is None else lora.scale
    state = OptimizerState(engine)
    scalars = state.scalars()
    shards, tensors = gather_share(engine, state, vocab_size)

    def write() -> None:
        with disk_errors(folder):
            if odd := tensor_files.not_finite(tensors):
                # It must not take the place of earlier ones, which are still good.
                raise ConfigError(
                    f"--save {folder}: {odd} holds numbers that are not finite. The checkpoint was "
                    "not written; earlier ones are untouched. Continue from one of them with a "
                    "lower --lr, or look at what the run read since."
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


def load_engine(engine: Engine, found: Found, *, optimizer: bool = True) -> TrainState:
    """Restore weights, optimizer and loss scale; return the state. Collective over all ranks.

    Args:
        engine: newly built.
        found: a checkpoint with a state.
        optimizer: whether moments, step count and loss scale are restored or stay as they are.

    Raises:
        ConfigError: a parameter is missing there or has another shape.
    """
    state = OptimizerState(engine)

    def restore() -> None:
        reader = tensor_files.TensorReader(found.folder, merged=False)
        shards = shards_of(engine.model, engine.mesh, found.shape.vocab_size)
        reader.check_holds(shards)
        for name, parameter in engine.model.named_parameters():
            for kind in state.kinds(parameter) if optimizer else KINDS[:1]:
                begin, end, part = state.part(parameter, kind)
                if begin < end:
                    part.copy_(reader.read(kind, name, shards[name], begin, end))
        if optimizer:
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
    data = found.run.get("data") if found.kind == "training" else None
    return Weights(weights, shape, found.tokenizer_dir, found.manifest.iteration, data)


def write_weights(
    save: str | Path,
    weights: dict[str, torch.Tensor],
    shape: ModelShape,
    tokenizer_dir: Path | None,
    source: str,
    iteration: int = 0,
) -> Path:
    """Write a weights-only checkpoint that `--load` starts a run from.

    Args:
        save: folder to hold it; must hold no checkpoint.
        weights: float32, by parameter name; the vocabulary's padding rows are left out.
        shape: of the model.
        tokenizer_dir: what its ids mean; a folder that `Tokenizer.save` made.
        source: where they come from, for run.json.
        iteration: which gives the checkpoint its name.

    Raises:
        ConfigError: checkpoints are there already, it cannot be written, or the weights are not
            finite or not of that shape.
    """
    stamp = Stamp(run_id=new_run_id(), iteration=iteration)
    weights = {**weights, WORD_EMBEDDING: weights[WORD_EMBEDDING][: shape.vocab_size]}
    file = tensor_files.file_name(0)
    shards = {name: whole(tuple(tensor.shape)) for name, tensor in weights.items()}
    index = tensor_index.index_of(stamp, [(file, shards)], tensor_index.Scalars())
    tensor_index.check_holds_model(Path(source), index, shape, lora=None)
    tensors = {f"weight/{n}": t.contiguous() for n, t in weights.items()}
    if odd := tensor_files.not_finite(tensors):
        raise ConfigError(f"{source}: {odd} holds numbers that are not finite; it is damaged.")
    folder = Path(save) / manifests.checkpoint_name(iteration)
    saves = SaveFolder(save)
    saves.take(load=None)
    try:
        with disk_errors(folder):
            draft = saves.begin(iteration)
            try:
                tensor_files.write_file(draft / file, tensors, tensor_files.metadata_of(stamp))
                tensor_index.write_index(draft, index)
                run = {**asdict(stamp), "source": source, "shape": shape.to_dict()}
                _write_json(draft / manifests.RUN, run)
                if tokenizer_dir is not None:
                    shutil.copytree(tokenizer_dir, draft / manifests.TOKENIZER)
                files = {
                    name: manifests.describe(draft / name, sync=True)
                    for name in manifests.files_of(draft)
                }
                return _publish(saves, draft, "weights", stamp, files)
            except BaseException:
                saves.discard(draft)
                raise
    finally:
        saves.release()
