"""`--train-flops`: a run's length as a budget of FLOPs by the paper's count."""

from __future__ import annotations

import math

from megatron_eslm.config.run import RunConfig
from megatron_eslm.cost.of_run import build_flops, step_work
from megatron_eslm.selection.state import SelectionState

_SAME = 0.05
"""Steps cost the same if they do to this share: --eod-mask-loss makes them a little cheaper."""


def steps_of_budget(
    run: RunConfig, vocab_size: int, used: tuple[int, float] = (0, 0.0)
) -> int | None:
    """Steps until the budget is used up; None if steps differ or their cost is not known ahead.

    Steps differ while the batch grows, alpha changes or a reference may be overtaken, and after a
    run has been continued with other flags, such as a larger batch. The cost of
    teachers and of references that run in training is not known before they are found.

    Args:
        run: a run with --train-flops.
        vocab_size: of the data's tokenizer.
        used: steps before --load, and their FLOPs by the paper's count.
    """
    budget, s = run.training.train_flops, run.selection
    assert budget is not None
    alpha_changes = (
        s.eslm_adaptive
        or s.final_alpha is not None
        or s.eslm_start_iter > 0
        or s.eslm_alpha_warmup_iters > 0
    )
    has_teacher = run.objective.distill_teacher is not None or s.selection == "uncertainty"
    if alpha_changes or has_teacher or run.reference.given or run.training.rampup_batch_size:
        return None
    state = SelectionState(alpha=s.initial_alpha)
    flops = build_flops(run, run.shape(vocab_size), state, device_type="cpu")
    per_step = flops.paper_flops(step_work(run))
    if not math.isclose(used[1], used[0] * per_step, rel_tol=_SAME):
        return None
    # The loop adds step by step, with rounding of its own.
    return max(1, math.ceil(budget / per_step - 1e-9))


def is_complete(run: RunConfig, iteration: int, flops_paper: float) -> bool:
    """Whether a run ends here: --train-iters steps are done, or the budget is used up."""
    budget = run.training.train_flops
    return iteration >= run.training.train_iters or (budget is not None and flops_paper >= budget)
