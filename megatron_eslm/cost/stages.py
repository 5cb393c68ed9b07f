"""Assign blocks to pipeline stages: minimize the cost of the most expensive stage.

All stages work at the same time on different micro-batches, so a step takes as long as its most
expensive stage. The cost of a stage is its FLOPs (cost/flops.py); the last stage has the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

from megatron_eslm.config.run import RunConfig
from megatron_eslm.cost.flops import FlopsModel, Work
from megatron_eslm.model.architectures.base import OUTPUT
from megatron_eslm.model.arithmetic import adapter_params, num_params_named, stage_params
from megatron_eslm.model.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """The stages of a pipeline in order; without a pipeline there is a single stage."""

    num_blocks: tuple[int, ...]
    flops: tuple[float, ...]
    """FLOPs of each stage per optimizer step, over all its ranks."""
    num_params: tuple[int, ...]
    """Parameters of each stage, over its tensor-parallel ranks; with a tied head, the first and the
    last stage both have the word embedding."""
    early_exit: int = 0
    """Blocks before the early exit; all other stages have copies of them. 0 without one."""

    @property
    def num_stages(self) -> int:
        """Number of stages."""
        return len(self.num_blocks)

    def blocks(self, stage: int) -> range:
        """Block numbers of a stage."""
        first = sum(self.num_blocks[:stage])
        return range(first, first + self.num_blocks[stage])


def plan_stages(run: RunConfig, shape: ModelShape, flops: FlopsModel, work: Work) -> StagePlan:
    """Plan the stages of a run: --pipeline-split, or the balanced split.

    Args:
        run: gives the number of stages and --pipeline-split.
        shape: the model's shape.
        flops: cost of each part.
        work: work of one step; the dropped share affects the balance.
    """
    stages = run.engine.pipeline_model_parallel_size
    blocks = [flops.block(work, number) for number in range(shape.num_layers)]
    head = flops.head(work)
    early_exit = flops.selector_depth if flops.proxy else 0
    split = run.engine.pipeline_blocks or balanced_split(
        blocks, stages, last=head, at_least=early_exit
    )
    bounds = [0, *accumulate(split)]
    # All stages share the scoring.
    costs = [sum(blocks[a:b]) + flops.scoring(work) / stages for a, b in pairwise(bounds)]
    costs[-1] += head
    params = [
        stage_params(shape, count, first=stage == 0, last=stage == stages - 1)
        for stage, count in enumerate(split)
    ]
    return StagePlan(
        num_blocks=split, flops=tuple(costs), num_params=tuple(params), early_exit=early_exit
    )


def balanced_split(
    blocks: list[float], stages: int, *, last: float, at_least: int = 0
) -> tuple[int, ...]:
    """Number of blocks per stage that minimizes the cost of the most expensive stage.

    Among the minimizing splits, picks the one with the smallest sum of squared costs. Exact, by
    dynamic programming over (stage, blocks assigned); each stage has at least one block.

    Args:
        blocks: cost of each block, in order.
        stages: 1 to len(blocks).
        last: cost of the last stage besides its blocks.
        at_least: minimum number of blocks in the first stage.
    """
    total = [0.0, *accumulate(blocks)]

    def cost(stage: int, begin: int, end: int) -> float:
        return total[end] - total[begin] + (last if stage == stages - 1 else 0.0)

    def begins(stage: int, end: int) -> range:
        if stage == 0:
            return range(1 if end >= max(1, at_least) else 0)
        return range(stage, end)

    # Optimize the two goals in turn. With both at once, a prefix with a smaller maximum would hide
    # one with a smaller sum of squares whose maximum a later stage exceeds anyway.
    inf = float("inf")
    largest = [[inf] * len(total) for _ in range(stages)]
    squares = [[inf] * len(total) for _ in range(stages)]
    begin_of = [[0] * len(total) for _ in range(stages)]
    for stage in range(stages):
        for end in range(1, len(total)):
            for begin in begins(stage, end):
                before = largest[stage - 1][begin] if stage else 0.0
                here = max(before, cost(stage, begin, end))
                largest[stage][end] = min(largest[stage][end], here)
    limit = largest[-1][-1] * (1 + 1e-9)
    for stage in range(stages):
        for end in range(1, len(total)):
            for begin in begins(stage, end):
                here = cost(stage, begin, end)
                square = (squares[stage - 1][begin] if stage else 0.0) + here**2
                if here <= limit and square < squares[stage][end]:
                    squares[stage][end], begin_of[stage][end] = square, begin
    split, end = [], len(blocks)
    for stage in reversed(range(stages)):
        split.append(end - begin_of[stage][end])
        end = begin_of[stage][end]
    return tuple(reversed(split))


def copied_params(
    shape: ModelShape, plan: StagePlan, stage: int, rank: int = 0, tp: int = 1
) -> int:
    """Number of other stages' parameters that a rank copies for the early exit.

    Args:
        shape: the model's shape.
        plan: the pipeline stages.
        stage: the rank's stage.
        rank: rank of adapters; 0 without adapters.
        tp: tensor-parallel ranks.
    """
    if not plan.early_exit or plan.num_stages == 1:
        return 0
    end = num_params_named(shape, "final_norm.", tp) + num_params_named(shape, OUTPUT, tp)
    if stage == 0:
        return end
    copied = exit_params(shape, plan, rank, tp)
    return copied - (end if stage == plan.num_stages - 1 else 0)


def exit_params(shape: ModelShape, plan: StagePlan, rank: int = 0, tp: int = 1) -> int:
    """Number of parameters of the early exit, per tensor-parallel rank."""
    exit_blocks = plan.early_exit
    own = stage_params(shape, exit_blocks, first=True, last=True, tp=tp)
    return own + adapter_params(shape, exit_blocks, rank, tp)


def plan_text(plan: StagePlan) -> str:
    """Render the plan as a table, one line per stage."""
    total, most = sum(plan.flops), max(plan.flops)
    lines = [
        f"{'stage':<6s} {'blocks':<12s} {'FLOPs / step':>12s} {'share':>6s} {'parameters':>14s}"
    ]
    for stage, (flops, params) in enumerate(zip(plan.flops, plan.num_params, strict=True)):
        blocks = plan.blocks(stage)
        numbers = f"{'-'.join(map(str, dict.fromkeys((blocks[0], blocks[-1]))))} ({len(blocks)})"
        also = [
            name
            for name, is_there in (
                ("embedding", stage == 0),
                (f"early exit behind block {plan.early_exit - 1}", stage == 0 and plan.early_exit),
                ("head", stage == plan.num_stages - 1),
            )
            if is_there
        ]
        line = f"{stage:<6d} {numbers:<12s} {flops:>12.3e} {flops / total:>6.1%} {params:>14,d}"
        lines.append(f"{line}  {', '.join(also)}".rstrip())
    lines.append(f"the most expensive stage costs {most * plan.num_stages / total:.2f} x the mean")
    return "\n".join(lines)
