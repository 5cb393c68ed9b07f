"""A run to plan, the quantities derived from it without a machine, and each rank's share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_eslm.config.run import RunConfig
from megatron_eslm.cost.flops import FlopsModel, Work
from megatron_eslm.cost.memory import MemoryEstimate, estimate_memory
from megatron_eslm.cost.of_run import build_flops, step_work
from megatron_eslm.cost.stages import StagePlan, plan_stages
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.ops.keep_rule import num_to_keep
from megatron_eslm.planning.hardware import Machine
from megatron_eslm.planning.imbalance import expected_largest, expected_largest_tokens
from megatron_eslm.selection.build import policy_traits
from megatron_eslm.selection.state import SelectionState
from megatron_eslm.selection.traits import PolicyTraits

Plans = dict[tuple[FlopsModel, Work, int, str | None], StagePlan]
"""Cache of stage plans, by everything that determines them."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A run and the quantities derived from it without a machine."""

    run: RunConfig
    shape: ModelShape
    traits: PolicyTraits
    flops: FlopsModel
    work: Work
    """Work per step, over all ranks."""
    plan: StagePlan
    memory: MemoryEstimate

    @classmethod
    def of(
        cls,
        run: RunConfig,
        vocab_size: int,
        known: Plans | None = None,
        *,
        device_type: str = "cuda",
    ) -> Setting:
        """Derive the quantities from a resolved run, as training itself would.

        Args:
            run: the run.
            vocab_size: vocabulary size of the tokenizer.
            known: cache of stage plans; updated.
            device_type: device to run on.
        """
        shape = run.shape(vocab_size)
        state = SelectionState(alpha=run.selection.initial_alpha)
        flops, work = build_flops(run, shape, state, device_type=device_type), step_work(run)
        known = {} if known is None else known
        key = (flops, work, run.engine.pipeline_model_parallel_size, run.engine.pipeline_split)
        if key not in known:
            known[key] = plan_stages(run, shape, flops, work)
        plan = known[key]
        return cls(
            run=run,
            shape=shape,
            traits=policy_traits(run.selection),
            flops=flops,
            work=work,
            plan=plan,
            memory=estimate_memory(run, shape, plan, flops),
        )

    @property
    def micro_steps(self) -> int:
        """Micro-steps per step that train."""
        return self.run.step_shape_trained.micro_steps

    @property
    def model_flops(self) -> float:
        """FLOPs per step over all ranks that model and selection need, without recomputation."""
        once = dataclasses.replace(self.flops, blocks_recomputed=False, logits_recomputed=False)
        return once.executed(self.work)


@dataclass(frozen=True, kw_only=True)
class RankWork:
    """Work of one rank in a micro-step, without the proxy pass before a step."""

    fair: Work
    """Work if all ranks had the same number of rows and tokens."""
    largest: Work
    """Work of the rank with most, averaged over micro-steps."""


def rank_work(setting: Setting) -> RankWork:
    """Work per rank in a micro-step: the average, and that of the rank with most."""
    run, traits, work = setting.run, setting.traits, setting.work
    length, dp = run.model.seq_length, run.dp_size
    rows = run.step_shape_trained.rows
    shares = setting.micro_steps * dp

    def share(tokens: int) -> int:
        return round(tokens / shares)

    fair = Work(
        tokens=rows * length,
        tokens_deep=share(work.tokens_deep),
        tokens_scored=share(work.tokens_scored),
        tokens_trained=share(work.tokens_trained),
    )
    nothing = not (traits.selects_sequences or traits.selects_tokens)
    if traits.ranks_decide_alone or nothing or dp == 1:
        return RankWork(fair=fair, largest=fair)
    alpha = run.selection.initial_alpha
    rows_kept = rows * dp
    if traits.selects_in_model:
        rows_kept = num_to_keep(rows * dp, alpha)
    deep = trained = round(expected_largest(rows_kept, rows, dp) * length)
    if traits.selects_tokens:
        kept = num_to_keep(rows_kept * length, alpha)
        trained = round(expected_largest_tokens(kept, rows_kept, rows, dp, length))
    scored = deep if traits.token_source == "head" else trained
    largest = Work(
        tokens=fair.tokens, tokens_deep=deep, tokens_scored=scored, tokens_trained=trained
    )
    return RankWork(fair=fair, largest=largest)


def memory_fits(setting: Setting, machine: Machine) -> bool:
    """Whether every rank's data fits into memory."""
    return setting.memory.total <= machine.budget_bytes
