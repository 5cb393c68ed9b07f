"""What `--load` says of the run before anything is built: a few small files, no tensor."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from megatron_eslm.checkpoint.manifest import MANIFEST, list_checkpoints
from megatron_eslm.config.training_options import CheckpointOptions
from megatron_eslm.errors import ConfigError
from megatron_eslm.files.json_file import read_json
from megatron_eslm.files.schema import parse_as
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.selection.options import Scope


def holds_nothing_yet(options: CheckpointOptions) -> bool:
    """Whether the run is the first of a job that continues itself when it is requeued."""
    load = options.load
    return load is not None and options.continues_itself and not list_checkpoints(Path(load))


@dataclass(frozen=True)
class Stored:
    """What a run takes from the checkpoint that it starts from, where flags leave it open."""

    shape: ModelShape
    scope: Scope | None
    """--eslm-scope; None where no run is continued."""


def stored_run(options: CheckpointOptions) -> Stored | None:
    """That of the newest checkpoint of --load that tells it; None where none does.

    Whether that checkpoint is whole, and which one a run starts from, is found out later.
    """
    if options.load is None:
        return None
    load = Path(options.load)
    for folder in [load] if (load / MANIFEST).exists() else list_checkpoints(load):
        try:
            return _stored_in(folder / "run.json", continues=not options.finetune)
        except (ConfigError, FileNotFoundError):
            continue
    return None


def _stored_in(path: Path, *, continues: bool) -> Stored:
    run: Any = read_json(path)
    shape = run.get("shape") if isinstance(run, dict) else None
    scope: Scope | None = None
    if continues:
        with suppress(KeyError, TypeError):
            found = run["options"]["selection"]["eslm_scope"]
            scope = found if found in get_args(Scope) else None
    return Stored(parse_as(ModelShape, shape, f"the shape in {path}"), scope)
