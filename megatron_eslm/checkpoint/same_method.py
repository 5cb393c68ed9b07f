"""Whether a checkpoint goes on with the method that it was trained with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_eslm.checkpoint.find import CheckpointInfo
from megatron_eslm.config.run import RunConfig
from megatron_eslm.errors import ConfigError
from megatron_eslm.selection.registry import POLICIES


def check_same_method(run: RunConfig, found: CheckpointInfo) -> None:
    """Refuse to continue a checkpoint by another method that nobody has asked for.

    Numbers, such as alpha, may change: they are schedules of one method.

    Args:
        run: the run.
        found: a checkpoint of training.

    Raises:
        ConfigError: the method is another one, without --allow-method-change.
    """
    if run.checkpoint.allow_method_change:
        return
    ours = _flags(dataclasses.asdict(run.selection), dataclasses.asdict(run.objective))
    options = found.run["options"]
    theirs = _flags(options["selection"], options.get("objective", {}))
    if ours == theirs:
        return
    give = [f"give {_text(theirs, but=ours)}"] if theirs.items() - ours.items() else []
    leave = [f"leave out {name}" for name in ours if name not in theirs and name == "--distill"]
    raise ConfigError(
        f"{found.folder} was trained with {_text(theirs)}, and this run would go on with "
        f"{_text(ours)}. To go on as before {' and '.join(give + leave)}; to change the method "
        "consent with --allow-method-change, or start a new run from its weights with --finetune."
    )


def _flags(selection: Mapping[str, Any], objective: Mapping[str, Any]) -> dict[str, str]:
    """The flags that make a method, those that its policy looks at."""
    name = selection["selection"]
    flags = {"--selection": name}
    reads = POLICIES[name].reads if name in POLICIES else frozenset()
    for field in ("eslm_score", "eslm_level"):
        if field in reads:
            flags["--" + field.replace("_", "-")] = selection[field]
    if (distill := objective.get("distill")) is not None:
        flags["--distill"] = distill
    return flags


def _text(flags: Mapping[str, str], but: Mapping[str, str] | None = None) -> str:
    return " ".join(f"{k} {v}" for k, v in flags.items() if but is None or but.get(k) != v)
