"""What thresholds over sequences are taken over: `--eslm-scope`, resolved."""

from __future__ import annotations

import dataclasses
import logging
from typing import Literal

from megatron_eslm.errors import ConfigError
from megatron_eslm.ops.keep_rule import micro_steps_to_keep
from megatron_eslm.selection.options import SelectionOptions
from megatron_eslm.selection.policy import build_policy
from megatron_eslm.selection.state import Peers, SelectionState

Scope = Literal["step", "global", "local"]

logger = logging.getLogger(__name__)


def fill_scope(
    selection: SelectionOptions,
    *,
    dp_size: int,
    pp_size: int,
    micro_batch_size: int,
    micro_steps: int,
    stored: Scope | None,
) -> SelectionOptions:
    """Fill --eslm-scope where it was not given, and refuse one that cannot be or saves nothing.

    Args:
        selection: as parsed.
        dp_size: data-parallel ranks.
        pp_size: pipeline stages.
        micro_batch_size: sequences of a micro-batch of one rank.
        micro_steps: of a step that reads --global-batch-size.
        stored: scope of the run that is continued, where one is.

    Raises:
        ConfigError: sequences cannot be selected within a micro-batch in a pipeline, or no whole
            micro-step would be dropped.
    """
    given = selection.eslm_scope or stored
    state, alone = SelectionState(alpha=selection.initial_alpha), Peers(0, 1, None)
    policy = build_policy(selection, state, alone, seed=0)
    if policy.instance_source == "nothing" or not policy.chooses_together:
        # Tokens alone have no step; greats refuses what it cannot do in its own words.
        return dataclasses.replace(selection, eslm_scope=given or "global")
    alpha = selection.initial_alpha
    drops = micro_steps_to_keep(micro_steps, alpha) < micro_steps
    # By the batch and never by the layout, so that every layout trains the same model.
    scope: Scope = given or ("step" if drops or pp_size > 1 else "global")
    if pp_size > 1 and scope != "step":
        raise ConfigError(
            f"--eslm-scope {scope} selects sequences in mid-model and a pipeline (here "
            f"--pipeline-model-parallel-size {pp_size}) carries whole micro-batches. Use "
            "--eslm-scope step."
        )
    if drops or not alpha:
        return dataclasses.replace(selection, eslm_scope=scope)
    text = _no_whole_micro_step(alpha, micro_steps, dp_size, micro_batch_size)
    if scope == "step":
        instead = "" if pp_size > 1 else "; or use --eslm-scope global"
        raise ConfigError(f"--eslm-scope step drops whole micro-steps, and {text}{instead}.")
    if not given and dp_size > 1:
        logger.warning(
            "--eslm-scope global: selection within each micro-batch, where ranks keep unequal "
            "numbers of sequences. To select once a step: %s.",
            text,
        )
    return dataclasses.replace(selection, eslm_scope=scope)


def _no_whole_micro_step(alpha: float, micro_steps: int, dp_size: int, rows: int) -> str:
    enough = next(n for n in range(micro_steps + 1, 10**9) if micro_steps_to_keep(n, alpha) < n)
    more_alpha = f"raise --eslm-alpha above {0.5 / micro_steps:.3g}, or " if micro_steps > 1 else ""
    return (
        f"--eslm-alpha {alpha:g} of {micro_steps} ({micro_steps * dp_size * rows} sequences a step "
        f"/ {dp_size} data-parallel ranks / --micro-batch-size {rows}) rounds to none: "
        f"{more_alpha}have {enough} micro-steps or more by a smaller --micro-batch-size or a "
        "larger --global-batch-size"
    )
