"""Resolve `--eslm-scope`: the set of sequences over which thresholds are computed."""

from __future__ import annotations

import dataclasses
import logging
import math

from megatron_eslm.data.batch_schedule import BatchSchedule
from megatron_eslm.errors import ConfigError
from megatron_eslm.ops.keep_rule import StepShape
from megatron_eslm.selection.build import policy_traits
from megatron_eslm.selection.selection_options import Scope, SelectionOptions

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
    """Fill in --eslm-scope if not given; refuse one that is unsupported or drops nothing.

    Args:
        selection: as parsed.
        dp_size: data-parallel ranks.
        pp_size: pipeline stages.
        micro_batch_size: sequences per micro-batch of one rank.
        micro_steps: micro-steps per step that reads --global-batch-size.
        stored: scope of the run to continue, if any.

    Raises:
        ConfigError: sequences cannot be selected within a micro-batch in a pipeline, or nothing
            would be dropped.
    """
    given, alpha = selection.eslm_scope, selection.largest_alpha
    traits = policy_traits(selection)
    if not traits.selects_sequences or traits.needs_gradients or not alpha:
        # The scope has no effect here; greats has checks and messages of its own.
        return selection
    read = StepShape(micro_steps, micro_batch_size)
    kept = read.kept(alpha)
    dropped = 1 - kept.sequences / read.sequences
    # Depend on the micro-steps only, not on the number of ranks, so that by default every layout
    # trains the same model.
    near = _is_near(dropped, alpha)
    whole = kept.micro_steps < micro_steps and near
    if pp_size > 1 and given is None and stored in ("global", "local"):
        logger.warning(
            "--eslm-scope step is used because pipelines support no other; the run was begun with "
            "%s.",
            stored,
        )
        stored = None
    scope: Scope = given or stored or ("step" if whole or pp_size > 1 else "global")
    if pp_size > 1 and scope != "step":
        raise ConfigError(
            f"--eslm-scope {scope} selects sequences inside the model, but a pipeline (here "
            f"--pipeline-model-parallel-size {pp_size}) carries full micro-batches. Use "
            "--eslm-scope step."
        )
    if scope == "step" and kept == read:
        instead = "" if pp_size > 1 else "; or use --eslm-scope global"
        more_alpha = f"raise --eslm-alpha above {0.5 / max(read):.3g}, " if max(read) > 1 else ""
        raise ConfigError(
            f"--eslm-scope step drops full micro-steps, or rows of each rank's micro-batches, but "
            f"--eslm-alpha {alpha:g} of {micro_steps} micro-step(s) of {micro_batch_size} row(s) "
            f"rounds to none. To drop some, {more_alpha}have {_least_that_drops(alpha)} "
            f"micro-steps or more (larger --global-batch-size) or more rows (larger "
            f"--micro-batch-size){instead}."
        )
    if scope == "step" and not near:
        logger.warning(
            "--eslm-scope step drops %.1f %% of the sequences where --eslm-alpha is %g: %d "
            "micro-steps of %d rows become %d of %d. With more micro-steps the share comes nearer.",
            100 * dropped,
            alpha,
            *read,
            *kept,
        )
    if given is None and stored is None and scope == "global" and dp_size > 1:
        logger.warning(
            "--eslm-scope global: %d micro-steps per step are too few to drop about --eslm-alpha "
            "%g of them, so sequences are selected within each micro-batch, where ranks wait for "
            "the one that keeps most. Have %d micro-steps or more (smaller --micro-batch-size or "
            "larger --global-batch-size)%s.",
            micro_steps,
            alpha,
            _fewest_by_default(alpha, micro_batch_size),
            f", or give --eslm-scope step, which drops {dropped:.1%} here" if dropped else "",
        )
    return dataclasses.replace(selection, eslm_scope=scope)


def warn_of_ramp(
    selection: SelectionOptions, schedule: BatchSchedule, micro_batch_size: int, dp_size: int
) -> None:
    """Warn if the first batches of a ramp are too small to drop anything."""
    alpha = selection.largest_alpha
    if not (alpha and policy_traits(selection).selects_per_step):
        return
    whole = []
    for size in schedule.sizes:
        read = StepShape(size // (micro_batch_size * dp_size), micro_batch_size)
        if read.kept(alpha) == read:
            whole.append(size)
    if whole:
        logger.warning(
            "--rampup-batch-size: batches of up to %d sequences are trained on in full; they have "
            "too few micro-steps to drop one at --eslm-alpha %g.",
            max(whole),
            alpha,
        )


def _is_near(dropped: float, alpha: float) -> bool:
    return abs(dropped - alpha) <= alpha / 3 + 1e-9


def _fewest_by_default(alpha: float, rows: int) -> int:
    """The fewest micro-steps with which the scope is step by default."""
    micro_steps = _least_that_drops(alpha)
    while not _is_near(
        1 - StepShape(micro_steps, rows).kept(alpha).micro_steps / micro_steps, alpha
    ):
        micro_steps += 1
    return micro_steps


def _least_that_drops(alpha: float) -> int:
    """The fewest micro-steps of which one is dropped: alpha of them is more than half of one."""
    return max(2, math.floor((0.5 + 1e-9) / alpha) + 1)
