"""Find and open a checkpoint; checks everything but the tensors' values."""

from __future__ import annotations

import copy
import dataclasses
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pydantic

from megatron_eslm.checkpoint import manifest as manifests
from megatron_eslm.checkpoint.manifest import RUN, STATE, TENSORS, Manifest, Stamp, damaged
from megatron_eslm.checkpoint.tensor_files import check_file
from megatron_eslm.checkpoint.tensor_index import check_holds_model, read_index
from megatron_eslm.checkpoint.train_state import TrainState
from megatron_eslm.errors import ConfigError
from megatron_eslm.files.json_file import read_json
from megatron_eslm.files.schema import STRICT, Count, Size, parse_as
from megatron_eslm.model.model_options import Lora, ModelOptions
from megatron_eslm.model.shape import ModelShape

logger = logging.getLogger(__name__)

# run.json has more fields than are read here, and later versions may add others.
_USED = pydantic.ConfigDict(**{**STRICT, "extra": "ignore"})


@dataclass(frozen=True, kw_only=True)
class _Model:
    __pydantic_config__ = _USED
    lora_rank: Annotated[int, pydantic.Field(ge=0, lt=2**31)] = 0
    lora_alpha: float | None = None


@dataclass(frozen=True, kw_only=True)
class _Training:
    __pydantic_config__ = _USED
    train_iters: Size


@dataclass(frozen=True, kw_only=True)
class _Selection:
    __pydantic_config__ = _USED
    selection: str
    eslm_score: str = "loss"
    eslm_level: str = "both"


@dataclass(frozen=True, kw_only=True)
class _Objective:
    __pydantic_config__ = _USED
    distill: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Checkpoint:
    __pydantic_config__ = _USED
    reset_optimizer: bool = False


@dataclass(frozen=True, kw_only=True)
class _Options:
    __pydantic_config__ = _USED
    model: _Model
    training: _Training
    selection: _Selection
    optimizer: dict[str, Any] = field(default_factory=dict)
    reference: dict[str, Any] = field(default_factory=dict)
    objective: _Objective = field(default_factory=_Objective)
    checkpoint: _Checkpoint = field(default_factory=_Checkpoint)


@dataclass(frozen=True, kw_only=True)
class _Domain:
    __pydantic_config__ = _USED
    name: str
    epochs: Annotated[float, pydantic.Field(ge=0)]


@dataclass(frozen=True, kw_only=True)
class _Run(Stamp):
    """Fields used of run.json."""

    __pydantic_config__ = _USED
    shape: ModelShape


def _is_range(part: tuple[int, int]) -> tuple[int, int]:
    if part[0] >= part[1]:
        raise ValueError("a range begins before it ends")
    return part


@dataclass(frozen=True, kw_only=True)
class _TrainingRun(_Run):
    """Fields used of run.json in a training checkpoint."""

    __pydantic_config__ = _USED
    options: _Options
    data: dict[str, Any]
    domains: Annotated[list[_Domain], pydantic.Field(min_length=1)]
    skipped_samples: list[Annotated[tuple[Count, Count], pydantic.AfterValidator(_is_range)]] = (
        field(default_factory=list)
    )
    optimizer_resets: list[Count] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """A complete and consistent checkpoint."""

    folder: Path
    manifest: Manifest
    run: dict[str, Any]
    """run.json: "options", "data" (fingerprint), "domains" and more. A checkpoint of kind
    "weights" has no options and no data."""
    shape: ModelShape
    """Shape of the model."""
    lora: Lora | None = None
    """Adapters of the model, if any."""
    train_state: TrainState | None = None

    @property
    def kind(self) -> str:
        """ "training", or "weights" for a checkpoint without optimizer and state."""
        return self.manifest.kind

    @property
    def tokenizer_dir(self) -> Path | None:
        """Folder of the stored tokenizer; None if there is none."""
        inside = f"{manifests.TOKENIZER}/"
        if any(name.startswith(inside) for name in self.manifest.files):
            return self.folder / manifests.TOKENIZER
        return None

    def as_weights(self) -> CheckpointInfo:
        """View it as a weights-only checkpoint; adapters are merged into the weights on reading."""
        files = {name: entry for name, entry in self.manifest.files.items() if name != STATE}
        manifest = dataclasses.replace(self.manifest, kind="weights", files=files)
        return dataclasses.replace(self, manifest=manifest, lora=None, train_state=None)

    def state(self) -> TrainState:
        """A copy of the stored TrainState."""
        assert self.train_state is not None, "a checkpoint of weights has no state"
        return copy.deepcopy(self.train_state)


def open_checkpoint(folder: Path) -> CheckpointInfo:
    """Open a checkpoint after verifying that its files are intact and belong together.

    Raises:
        ConfigError: it is foreign, incomplete, damaged, or mixed from several checkpoints.
    """
    return read_contents(folder, manifests.verify(folder))


def read_contents(folder: Path, manifest: Manifest) -> CheckpointInfo:
    """Read and cross-check everything in a checkpoint but the tensors' values.

    Args:
        folder: a checkpoint, or a draft about to be published.
        manifest: its manifest; the checksums in it are not verified.

    Raises:
        ConfigError: its files do not fit together.
    """
    try:
        run, shape, lora = _read_run(folder, manifest)
        state = _read_state(folder, manifest) if manifest.kind == "training" else None
        _check_tensors(folder, manifest, shape, lora)
    except FileNotFoundError as error:  # removed since it was verified
        raise damaged(folder, f"{error.filename} is missing") from error
    return CheckpointInfo(
        folder=folder, manifest=manifest, run=run, shape=shape, lora=lora, train_state=state
    )


def _read_run(folder: Path, manifest: Manifest) -> tuple[dict[str, Any], ModelShape, Lora | None]:
    try:
        values = read_json(folder / RUN)
        if manifest.kind == "weights":
            run, lora = parse_as(_Run, values, RUN), None
        else:
            run = trained = parse_as(_TrainingRun, values, RUN)
            model = trained.options.model
            lora = ModelOptions(lora_rank=model.lora_rank, lora_alpha=model.lora_alpha).lora
    except ConfigError as error:
        raise damaged(folder, error) from error
    manifests.check_stamp(folder, RUN, run, manifest)
    return values, run.shape, lora


def _read_state(folder: Path, manifest: Manifest) -> TrainState:
    try:
        state = TrainState.from_dict(read_json(folder / STATE), STATE)
    except ConfigError as error:
        raise damaged(folder, error) from error
    manifests.check_stamp(folder, STATE, state, manifest)
    return state


def _check_tensors(folder: Path, manifest: Manifest, shape: ModelShape, lora: Lora | None) -> None:
    index = read_index(folder)
    manifests.check_stamp(folder, TENSORS, index, manifest)
    check_holds_model(folder, index, shape, lora)
    if index.adam_step > (manifest.iteration if manifest.kind == "training" else 0):
        raise damaged(
            folder,
            f"{TENSORS} counts {index.adam_step} steps of Adam, more than the run has made",
        )
    if unlisted := index.files - manifest.files.keys():
        raise damaged(
            folder, f"{TENSORS} names {min(unlisted)}, which {manifests.MANIFEST} does not"
        )
    for file in sorted(index.files):
        check_file(folder, file, index, moments=manifest.kind == "training")


def find_checkpoint(load: str | Path, tag: str | None = None) -> CheckpointInfo:
    """Find the newest complete checkpoint under a folder, or open the one that is named.

    Raises:
        ConfigError: there is no complete checkpoint; gives the reason for each refused one.
    """
    path = Path(load)
    if tag is not None:
        path = path / tag
    try:
        if (path / manifests.MANIFEST).exists() or tag is not None:
            return open_checkpoint(path)
        if not path.is_dir():
            raise ConfigError(f"--load {path}: there is no such folder.")
        candidates = manifests.list_checkpoints(path)
    except OSError as error:
        raise ConfigError(f"--load {path} cannot be read: {error.strerror}.") from error
    if not candidates:
        raise ConfigError(
            f"--load {path} contains no checkpoint (folders such as iter_0000100). Convert Hugging "
            "Face models with tools/convert_from_hf.py."
        )
    reasons = []
    for folder in candidates:
        try:
            return open_checkpoint(folder)
        except ConfigError as error:
            logger.warning("%s Trying the previous checkpoint.", error)
            reasons.append(str(error))
    raise ConfigError(f"--load {path} contains no complete checkpoint. " + " ".join(reasons))
