"""Check that a checkpoint is continued with the method that trained it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_eslm.checkpoint.find import CheckpointInfo
from megatron_eslm.config.run import RunConfig
from megatron_eslm.errors import ConfigError
from megatron_eslm.selection.registry import POLICIES


def check_same_method(run: RunConfig, found: CheckpointInfo) -> None:
    """Refuse to change the training method of a checkpoint without an explicit flag.

    Numbers such as alpha may change: they are schedules of one method.

    Args:
        run: the run.
        found: a training checkpoint.

    Raises:
        ConfigError: the method differs and --allow-method-change is not given.
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
        f"{found.folder} was trained with {_text(theirs)}, but this run would continue with "
        f"{_text(ours)}. To keep the method, {' and '.join(give + leave)}; to change it, "
        "give --allow-method-change, or start a new run from its weights with --finetune."
    )


def _flags(selection: Mapping[str, Any], objective: Mapping[str, Any]) -> dict[str, str]:
    """Flags that define the method, restricted to those that the policy reads."""
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
