"""Saving and loading: what a checkpoint holds and which one is used.

A folder `iter_0000100` holds DeepSpeed's files (weights, optimizer), run.json (the resolved
options and the model's shape), state.json (TrainState), the tokenizer, and the manifest that makes
it complete. A weights-only checkpoint, as tools/convert_from_hf.py writes, holds
weights.safetensors in place of DeepSpeed's files.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_eslm.errors import ConfigError
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.parallel.bootstrap import quiet_imports
from megatron_eslm.parallel.collectives import on_every_rank, on_rank_zero
from megatron_eslm.training import manifest as manifests
from megatron_eslm.training.state import TrainState

logger = logging.getLogger(__name__)

WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class Found:
    """A complete checkpoint."""

    folder: Path
    kind: str
    """"training", or "weights" for one without optimizer and state."""
    run: dict[str, Any]
    """run.json: "options", "shape", "data" (fingerprint) and more."""

    @property
    def shape(self) -> ModelShape:
        """Shape of the model in it."""
        return ModelShape(**self.run["shape"])

    @property
    def tokenizer_dir(self) -> Path | None:
        """The tokenizer it carries."""
        folder = self.folder / "tokenizer"
        return folder if folder.is_dir() else None

    def state(self) -> TrainState:
        """The TrainState it holds."""
        return TrainState.from_dict(json.loads((self.folder / "state.json").read_text()))


@dataclass(frozen=True)
class Weights:
    """Full weights on the CPU, whatever the layout they were saved from."""

    weights: dict[str, torch.Tensor]
    """float32, by parameter name."""
    shape: ModelShape
    tokenizer_dir: Path | None
    iteration: int


def _open(folder: Path) -> Found:
    manifest = manifests.verify(folder)
    run = json.loads((folder / "run.json").read_text())
    return Found(folder, manifest["kind"], run)


def find_checkpoint(load: str | Path, tag: str | None = None) -> Found:
    """The newest complete checkpoint under a folder, or exactly the one that is named.

    Raises:
        ConfigError: nothing there, or nothing that is whole; every refused one with its reason.
    """
    path = Path(load)
    if tag is not None:
        path = path / tag
    if (path / manifests.MANIFEST).exists() or tag is not None:
        return _open(path)
    if not path.is_dir():
        raise ConfigError(f"--load {path}: there is no such folder.")
    candidates = manifests.list_checkpoints(path)
    if not candidates:
        raise ConfigError(
            f"--load {path} holds no checkpoint (folders iter_0000100 and the like). A folder "
            "written by another system comes in through tools/convert_from_hf.py."
        )
    reasons = []
    for folder in candidates:
        try:
            return _open(folder)
        except ConfigError as error:
            logger.warning("%s Trying the one before it.", error)
            reasons.append(str(error))
    raise ConfigError(f"--load {path} holds no complete checkpoint. " + " ".join(reasons))


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
    ds_engine: Any,
    save: str,
    *,
    state: TrainState,
    run: dict[str, Any],
    tokenizer: Any,
    keep_last: int,
) -> Path:
    """Write one checkpoint aside, publish it, remove the oldest. Collective over all ranks.

    Args:
        ds_engine: DeepSpeedEngine.
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

    def write() -> None:
        with _disk_errors(folder):
            try:
                ds_engine.save_checkpoint(save, tag=temporary.name, save_latest=False)
            except RuntimeError as error:  # torch.save reports a full disk this way
                raise OSError(str(error)) from error

    def describe_share() -> dict[str, dict[str, int]]:
        with _disk_errors(folder):
            mine = manifests.files_of(temporary)[dist.get_rank() :: dist.get_world_size()]
            return {name: manifests.describe(temporary / name, sync=True) for name in mine}

    on_rank_zero(begin)
    on_every_rank(write)
    dist.barrier()
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


def load_engine(ds_engine: Any, found: Found) -> TrainState:
    """Restore weights, optimizer and loss scale; return the state. Collective over all ranks.

    Raises:
        ConfigError: the checkpoint was saved with another number of ranks or ZeRO stage.
    """
    try:
        path, _ = ds_engine.load_checkpoint(
            str(found.folder.parent), tag=found.folder.name, load_lr_scheduler_states=False
        )
    except (AssertionError, RuntimeError, KeyError, ValueError, FileNotFoundError) as error:
        raise ConfigError(f"DeepSpeed cannot load {found.folder} into this run: {error}") from error
    if path is None:
        raise ConfigError(f"DeepSpeed found no state for this layout in {found.folder}.")
    return found.state()


def read_weights(load: str | Path, tag: str | None = None) -> Weights:
    """Full float32 weights of a checkpoint of any kind, for export and generation.

    Raises:
        ConfigError: no complete checkpoint there.
    """
    found = find_checkpoint(load, tag)
    if found.kind == "weights":
        from safetensors.torch import load_file

        weights = load_file(found.folder / WEIGHTS)
        return Weights(weights, found.shape, found.tokenizer_dir, 0)
    quiet_imports()  # reading DeepSpeed's files imports it
    zero_stage = found.run["options"]["engine"]["zero_stage"]
    if zero_stage == 0:
        content = torch.load(
            found.folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False
        )
        weights = content["module"]
    elif (masters := _bf16_masters(found.folder)) is not None:
        weights = masters
    else:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        weights = get_fp32_state_dict_from_zero_checkpoint(
            str(found.folder.parent), tag=found.folder.name
        )
    weights = {
        name: tensor.detach().float().contiguous()
        for name, tensor in weights.items()
        if isinstance(tensor, torch.Tensor) and not name.endswith("_extra_state")
    }
    return Weights(weights, found.shape, found.tokenizer_dir, found.state().iteration)


def _bf16_masters(folder: Path) -> dict[str, torch.Tensor] | None:
    """float32 weights that DeepSpeed's BF16_Optimizer (bf16 under ZeRO 1) saved; None for others.

    DeepSpeed's own converter reads those of the other optimizers, not these.
    """
    parts: dict[str, list[torch.Tensor]] = {}
    for rank in range(len(list(folder.glob("bf16_zero_pp_rank_*_optim_states.pt")))):
        file = folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        state = torch.load(file, map_location="cpu", weights_only=False)["optimizer_state_dict"]
        if "zero_stage" in state:
            return None
        for flat, pieces in zip(
            state["single_partition_of_fp32_groups"], state["param_slice_mappings"], strict=True
        ):
            for name, piece in pieces.items():
                parts.setdefault(name, []).append(flat[piece.start : piece.start + piece.numel])
    if not parts:
        return None
    model = torch.load(
        folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False
    )
    return {
        name: torch.cat(parts[name]).view(shape)
        for group in model["param_shapes"]
        for name, shape in group.items()
    }


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
        weights: float32, by parameter name.
        source: where they come from, for run.json.

    Raises:
        ConfigError: checkpoints are there already, or it cannot be written.
    """
    from safetensors.torch import save_file

    folder = Path(save) / manifests.checkpoint_name(0)
    if manifests.list_checkpoints(Path(save)):
        raise ConfigError(f"--save {save} already holds checkpoints; choose another folder.")
    temporary = manifests.aside(folder)
    with _disk_errors(folder):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file({n: t.contiguous() for n, t in weights.items()}, temporary / WEIGHTS)
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
