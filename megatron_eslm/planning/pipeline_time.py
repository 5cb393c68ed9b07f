"""Time of DeepSpeed's 1F1B schedule with unequal stages and links."""

from __future__ import annotations

from collections.abc import Sequence

MOST_CELLS = 8192
"""Largest stages x micro-steps to simulate one by one."""


def pipeline_seconds(
    forward: Sequence[float],
    backward: Sequence[float],
    micro_steps: int,
    *,
    activations: Sequence[float] = (),
    gradients: Sequence[float] = (),
) -> float:
    """Seconds until all stages have finished all micro-steps.

    Follows deepspeed.runtime.pipe.schedule.TrainSchedule. In step t, stage s runs forward of
    micro-step (t - s) / 2 if t and s have the same parity, else backward of micro-step
    (t + s + 1) / 2 - P. Before a forward pass, a stage sends a gradient to the previous stage and
    receives activations from it; both must have reached that point, because sends wait for their
    receivers.

    Beyond the simulated micro-steps, each further one takes as long as the busiest stage, including
    its communication on both sides.

    Args:
        forward: seconds of a micro-step's forward pass in each of P stages.
        backward: the same for backward passes.
        micro_steps: 1 or more.
        activations: seconds to send from stage s to s + 1, P - 1 of them; () if free.
        gradients: seconds to send back.
    """
    stages = len(forward)
    down = list(activations) or [0.0] * (stages - 1)
    up = list(gradients) or [0.0] * (stages - 1)
    walked = min(micro_steps, max(8 * stages, MOST_CELLS // stages))
    ends = _walk(forward, backward, walked, down, up)
    edges = [0.0, *(a + g for a, g in zip(down, up, strict=True)), 0.0]
    period = max(
        f + b + left + right
        for f, b, left, right in zip(forward, backward, edges, edges[1:], strict=False)
    )
    return max(ends) + (micro_steps - walked) * period


def _walk(
    forward: Sequence[float],
    backward: Sequence[float],
    micro_steps: int,
    down: Sequence[float],
    up: Sequence[float],
) -> list[float]:
    stages, known = len(forward), range(micro_steps)
    now = [0.0] * stages
    for step in range(2 * (micro_steps + stages - 1)):
        # Edges whose later stage runs forward in this step; each stage has one of them at most.
        for later in range(1 + (step + 1) % 2, stages, 2):
            returns, comes = (step + later) // 2 - stages in known, (step - later) // 2 in known
            if returns or comes:
                met = max(now[later - 1], now[later])
                met += returns * up[later - 1] + comes * down[later - 1]
                now[later - 1] = now[later] = met
        for stage in range(stages):
            if (step - stage) % 2 == 0:
                if (step - stage) // 2 in known:
                    now[stage] += forward[stage]
            elif (step + stage + 1) // 2 - stages in known:
                now[stage] += backward[stage]
    return now
