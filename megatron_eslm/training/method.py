"""A run's method in a few words: what it trains on, and what it minimises there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_eslm.config.run import RunConfig
from megatron_eslm.errors import ConfigError
from megatron_eslm.selection.options import SelectionOptions
from megatron_eslm.selection.policy import described_policy
from megatron_eslm.training.finding import Found

_LEVELS = {
    (True, True): "both",
    (True, False): "instance",
    (False, True): "token",
    (False, False): None,
}
"""By whether sequences and tokens are selected."""


def selection_summary(options: SelectionOptions) -> dict[str, Any]:
    """What is selected and how; None for what a policy does not have, whatever its flag says."""
    policy = described_policy(options)
    by_instance, by_token = (
        source != "nothing" for source in (policy.instance_source, policy.token_source)
    )
    return {
        "selection": options.selection,
        "alpha": options.initial_alpha,
        "score": options.eslm_score if options.selection == "eslm" else None,
        "level": _LEVELS[by_instance, by_token],
        "proxy_layers": options.eslm_proxy_layers if policy.instance_source == "head" else None,
    }


def method_text(selection: SelectionOptions, distill: str | None) -> str:
    """Of a run, for its log: `eslm, alpha 0.1, by loss, sequences and tokens, early exit 1`."""
    found = selection_summary(selection)
    if found["level"] is None:
        words = [f"{found['selection']} (all sequences, all tokens)"]
    else:
        what = {"both": "sequences and tokens", "instance": "sequences", "token": "tokens"}
        words = [f"{found['selection']} of {what[found['level']]}", f"alpha {found['alpha']:g}"]
    if found["score"] is not None:
        words.append(f"by {found['score']}")
    if found["proxy_layers"] is not None:
        words.append(f"early exit after block {found['proxy_layers']}")
    if selection.eslm_adaptive:
        words.append("adaptive")
    if distill is not None:
        words.append(f"distillation {distill}")
    return ", ".join(words)


def check_same_method(run: RunConfig, found: Found) -> None:
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
    if name == "eslm":
        flags["--eslm-score"] = selection["eslm_score"]
    if name in ("eslm", "random"):
        flags["--eslm-level"] = selection["eslm_level"]
    if (distill := objective.get("distill")) is not None:
        flags["--distill"] = distill
    return flags


def _text(flags: Mapping[str, str], but: Mapping[str, str] | None = None) -> str:
    return " ".join(f"{k} {v}" for k, v in flags.items() if but is None or but.get(k) != v)
