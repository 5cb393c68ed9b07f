"""Settings read from the checkpoint of `--load` before anything is built; no tensor is read."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from megatron_eslm.checkpoint.manifest import MANIFEST, STATE, list_checkpoints
from megatron_eslm.config.training_options import CheckpointOptions
from megatron_eslm.errors import ConfigError
from megatron_eslm.files.json_file import read_json
from megatron_eslm.files.schema import parse_as
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.selection.selection_options import Scope


def holds_nothing_yet(options: CheckpointOptions) -> bool:
    """Whether this is the first start of a requeued job, with no checkpoint in --load yet."""
    load = options.load
    return load is not None and options.continues_itself and not list_checkpoints(Path(load))


@dataclass(frozen=True)
class Stored:
    """Settings that a run takes from its checkpoint if no flag gives them."""

    shape: ModelShape
    scope: Scope | None
    """--eslm-scope; None if no run is continued."""
    used: tuple[int, float] = (0, 0.0)
    """Steps so far, and their FLOPs by the paper's count; zeros if no run is continued."""


def stored_run(options: CheckpointOptions) -> Stored | None:
    """Read the settings of the newest readable checkpoint of --load; None if there is none.

    Does not verify that checkpoint; `find_start` later chooses the one to start from.
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
    used = (0, 0.0)
    if continues and (beside := path.with_name(STATE)).exists():  # weights alone have no state
        state: Any = read_json(beside)
        with suppress(KeyError, TypeError, ValueError):  # `find_start` says what is wrong
            used = int(state["iteration"]), float(state["flops_paper"])
    return Stored(parse_as(ModelShape, shape, f"the shape in {path}"), scope, used)
