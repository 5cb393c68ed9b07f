"""What `--load` says of the model before anything is built: a few small files, no tensor."""

from __future__ import annotations

from pathlib import Path

from megatron_eslm.errors import ConfigError
from megatron_eslm.files.json_file import read_json
from megatron_eslm.files.schema import parse_as
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.training.manifest import MANIFEST, list_checkpoints
from megatron_eslm.training.options import CheckpointOptions


def holds_nothing_yet(options: CheckpointOptions) -> bool:
    """Whether the run is the first of a job that continues itself when it is requeued."""
    load = options.load
    return load is not None and options.continues_itself and not list_checkpoints(Path(load))


def stored_shape(options: CheckpointOptions) -> ModelShape | None:
    """Shape of the model in the newest checkpoint of --load that tells it; None where none does.

    Whether that checkpoint is whole, and which one a run starts from, is found out later.
    """
    if options.load is None:
        return None
    load = Path(options.load)
    for folder in [load] if (load / MANIFEST).exists() else list_checkpoints(load):
        try:
            return _shape_in(folder / "run.json")
        except (ConfigError, FileNotFoundError):
            continue
    return None


def _shape_in(path: Path) -> ModelShape:
    run = read_json(path)
    shape = run.get("shape") if isinstance(run, dict) else None
    return parse_as(ModelShape, shape, f"the shape in {path}")
