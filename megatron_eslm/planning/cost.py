"""How long one optimizer step of one layout takes, and what it spends the time on.

Times of a rank's parts in one micro-step are added up stage by stage, put through the pipeline's
schedule, and what happens once a step is added. Matrix products are those of the ledger
(training/flops.py).
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_eslm.config.run import RunConfig
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.ops.keep_rule import num_to_keep
from megatron_eslm.planning.exchanges import Exchange, Exchanges, Groups
from megatron_eslm.planning.hardware import Machine
from megatron_eslm.planning.imbalance import expected_largest, expected_largest_tokens
from megatron_eslm.planning.pipeline_time import pipeline_seconds
from megatron_eslm.selection.policy import SelectionPolicy, build_policy
from megatron_eslm.selection.state import Peers, SelectionState
from megatron_eslm.training.build import build_flops
from megatron_eslm.training.estimate import MemoryEstimate, estimate_memory, step_work
from megatron_eslm.training.flops import FlopsModel, Work, block_forward
from megatron_eslm.training.stages import StagePlan, plan_stages, stage_params

# Elements of the residual stream and of each tensor-parallel rank's columns that the kernels of a
# block read and write, forward, for each D of a position: two norms (2 + 2), two biases (2 + 2),
# two sums (3 + 3); attention's output made contiguous (2), GELU (8). Backward about twice that.
RESIDUAL_TRAFFIC, COLUMN_TRAFFIC = 14, 10
KERNELS_OF_A_BLOCK = 90
"""Forward and backward, as torch's profiler counts launches of one block."""
KERNELS_OF_THE_HEAD = 60
OPTIMIZER_BYTES = 40
"""For a parameter: Adam reads gradient, master weight and moments and writes three of them and the
weight; norm and clipping read and write the gradient."""
ACCUMULATION_BYTES = 12
"""For a parameter and micro-step: its gradient read, added to a float32 sum."""
KEEP_RULE_BYTES = 100
"""For a score of all ranks: comparisons, k-th value, running sum of ties (ops/keep_rule.py)."""
GATHERS = "selection: gathers of scores"
WAITS_OF_A_THRESHOLD = 4
"""Numbers that the host waits for at one keep rule: counts, tau, kept indices twice."""


Plans = dict[tuple[FlopsModel, Work, int, str | None], StagePlan]
"""Stage plans by all that decides them."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A run and what follows from it before any time is known."""

    run: RunConfig
    shape: ModelShape
    policy: SelectionPolicy
    flops: FlopsModel
    work: Work
    """Of a step, over all ranks."""
    plan: StagePlan
    memory: MemoryEstimate

    @classmethod
    def of(cls, run: RunConfig, vocab_size: int, known: Plans | None = None) -> Setting:
        """From a resolved run, as training itself would have it.

        Args:
            run: the run.
            vocab_size: of its tokenizer.
            known: plans that were made before, to be used again and added to.
        """
        shape = run.shape(vocab_size)
        state = SelectionState(alpha=run.selection.initial_alpha)
        peers = Peers(0, run.dp_size, None)
        policy = build_policy(run.selection, state, peers, run.training.seed)
        flops, work = build_flops(run, shape, policy), step_work(run)
        known = {} if known is None else known
        key = (flops, work, run.engine.pipeline_model_parallel_size, run.engine.pipeline_split)
        if key not in known:
            known[key] = plan_stages(run, shape, flops, work)
        plan = known[key]
        return cls(
            run=run,
            shape=shape,
            policy=policy,
            flops=flops,
            work=work,
            plan=plan,
            memory=estimate_memory(run, shape, plan, flops),
        )

    @property
    def model_flops(self) -> float:
        """Of a step over all ranks: what the model and selection need, without computing twice."""
        once = dataclasses.replace(self.flops, blocks_recomputed=False, logits_recomputed=False)
        return once.executed(self.work)


@dataclass(frozen=True, kw_only=True)
class RankWork:
    """What one rank processes in a micro-step."""

    fair: Work
    """If all kept the same number of rows and tokens."""
    largest: Work
    """Of the rank that keeps most, on average over micro-steps."""


def rank_work(setting: Setting) -> RankWork:
    """Shares of a micro-step: of the scope's threshold, and of the unlucky rank."""
    run, policy, work = setting.run, setting.policy, setting.work
    rows, length, dp = run.training.micro_batch_size, run.model.seq_length, run.dp_size
    assert rows and length
    shares = run.gradient_accumulation_steps * dp

    def share(tokens: int) -> int:
        return round(tokens / shares)

    fair = Work(
        tokens=rows * length,
        tokens_deep=share(work.tokens_deep),
        tokens_scored=share(work.tokens_scored),
        tokens_trained=share(work.tokens_trained),
    )
    together = policy.options.eslm_scope == "global"
    nothing = policy.instance_source == policy.token_source == "nothing"
    if not together or nothing or dp == 1:
        return RankWork(fair=fair, largest=fair)
    alpha = run.selection.initial_alpha
    rows_kept = rows * dp
    if policy.instance_source != "nothing":
        rows_kept = num_to_keep(rows * dp, alpha)
    deep = round(expected_largest(rows_kept, rows, dp) * length)
    trained = deep
    if policy.token_source != "nothing":
        kept = num_to_keep(rows_kept * length, alpha)
        trained = round(expected_largest_tokens(kept, rows_kept, rows, dp, length))
    scored = deep if policy.token_source == "head" else trained
    largest = Work(
        tokens=fair.tokens, tokens_deep=deep, tokens_scored=scored, tokens_trained=trained
    )
    return RankWork(fair=fair, largest=largest)


@dataclass
class StageTime:
    """Seconds of one micro-step in one stage, by what they go to."""

    forward: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    backward: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    send_forward: float = 0.0
    send_backward: float = 0.0

    @property
    def busy(self) -> float:
        """Without what is handed over between stages."""
        return sum(self.forward.values()) + sum(self.backward.values())

    @property
    def sending(self) -> float:
        """To neighbours."""
        return self.send_forward + self.send_backward

    @property
    def communicating(self) -> float:
        """With all others."""
        return _communication(self.forward) + _communication(self.backward) + self.sending


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """One optimizer step of one layout on one machine."""

    setting: Setting
    machine: Machine
    stages: tuple[StageTime, ...]
    exchanges: tuple[tuple[Exchange, ...], ...]
    """Of each stage."""
    micro_steps_seconds: float
    """All micro-steps, through the pipeline."""
    once: dict[str, float]
    """What happens once a step."""
    shared_cores_seconds: float
    """Computing of all processes over the cores there are, and communication of one of them; 0
    where each has its own."""
    computing_seconds: float
    """Of all processes together."""

    @property
    def seconds(self) -> float:
        """Of the step."""
        return max(self.micro_steps_seconds + sum(self.once.values()), self.shared_cores_seconds)

    @property
    def parts(self) -> dict[str, float]:
        """Where the time goes: the busiest stage, what it waits for, what comes once."""
        slowest = max(self.stages, key=lambda stage: stage.busy)
        steps = self.setting.run.gradient_accumulation_steps
        parts: defaultdict[str, float] = defaultdict(float)
        for direction in (slowest.forward, slowest.backward):
            for name, seconds in direction.items():
                parts[name] += steps * seconds
        if len(self.stages) > 1:
            parts["pipeline: bubble and hand-overs"] = self.micro_steps_seconds - sum(
                parts.values()
            )
        for name, seconds in self.once.items():
            parts[name] += seconds
        if (waiting := self.seconds - sum(parts.values())) > 1e-12:
            parts["waiting for a core"] = waiting
        return dict(parts)

    @property
    def bubble(self) -> float:
        """Share of the micro-steps' time in which stages are idle or hand over, on average."""
        steps = self.setting.run.gradient_accumulation_steps
        busy = sum(stage.busy for stage in self.stages) * steps / len(self.stages)
        return 1 - busy / self.micro_steps_seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs over what all devices could have done at their peak."""
        run = self.setting.run
        engine = run.engine
        ranks = (
            engine.tensor_model_parallel_size * engine.pipeline_model_parallel_size * run.dp_size
        )
        return self.setting.model_flops / (self.seconds * self.machine.peak_flops * ranks)

    def volumes(self) -> dict[str, float]:
        """Bytes that one rank sends in a step, by kind; of the stage that sends most of it."""
        steps = self.setting.run.gradient_accumulation_steps
        most: dict[str, float] = {}
        for stage in self.exchanges:
            sums: defaultdict[str, float] = defaultdict(float)
            for exchange in stage:
                sums[exchange.kind] += exchange.times(steps) * exchange.sent_bytes
            for kind, num_bytes in sums.items():
                most[kind] = max(most.get(kind, 0.0), num_bytes)
        return most

    @property
    def selection_seconds(self) -> float:
        """Of a step: gathers of scores, keep rule and waiting for its numbers."""
        steps = self.setting.run.gradient_accumulation_steps
        names = (GATHERS, "selection: thresholds")
        return steps * sum(stage.forward[name] for stage in self.stages for name in names)


def step_cost(setting: Setting, machine: Machine, *, balanced: bool = False) -> StepCost:
    """Predict a step.

    Args:
        setting: the run.
        machine: where it would run.
        balanced: as if all ranks kept the same number of rows and tokens.
    """
    works = rank_work(setting)
    work = works.fair if balanced else works.largest
    run, plan = setting.run, setting.plan
    groups = Groups.of(run, machine.gpus_per_node)
    exchanges = Exchanges(
        run=run, shape=setting.shape, plan=plan, policy=setting.policy, groups=groups
    )
    lists = tuple(tuple(exchanges.of_stage(s, work)) for s in range(plan.num_stages))
    clock = _Clock(setting, machine, work)
    stages = tuple(clock.stage(s, lists[s]) for s in range(plan.num_stages))
    steps = run.gradient_accumulation_steps
    micro_steps = pipeline_seconds(
        [sum(stage.forward.values()) for stage in stages],
        [sum(stage.backward.values()) for stage in stages],
        steps,
        activations=[stage.send_forward for stage in stages[:-1]],
        gradients=[stage.send_backward for stage in stages[1:]],
    )
    once = [clock.once(s, lists[s]) for s in range(plan.num_stages)]
    computing, communicating = _shared(setting, stages, once)
    shared = 0.0 if machine.cores is None else computing / machine.cores + communicating
    return StepCost(
        setting=setting,
        machine=machine,
        stages=stages,
        exchanges=lists,
        micro_steps_seconds=micro_steps,
        once=max(once, key=lambda each: sum(each.values())),
        shared_cores_seconds=shared,
        computing_seconds=computing,
    )


def _shared(
    setting: Setting, stages: tuple[StageTime, ...], once: list[dict[str, float]]
) -> tuple[float, float]:
    """Seconds of (all processes' computing together, the communication of one of them)."""
    run = setting.run
    ranks = run.dp_size * run.engine.tensor_model_parallel_size
    computing, communicating = 0.0, 0.0
    for stage, each in zip(stages, once, strict=True):
        steps = run.gradient_accumulation_steps
        waits = steps * stage.communicating + _communication(each)
        whole = steps * (stage.busy + stage.sending) + sum(each.values())
        computing += whole - waits
        communicating = max(communicating, waits)
    return computing * ranks, communicating


def _communication(parts: Mapping[str, float]) -> float:
    return sum(s for name, s in parts.items() if name.startswith(("communication", GATHERS)))


class _Clock:
    """Seconds of the parts of one rank that processes `work` in a micro-step."""

    def __init__(self, setting: Setting, machine: Machine, work: Work) -> None:
        self.setting, self.machine, self.work = setting, machine, work
        self.tp = setting.run.engine.tensor_model_parallel_size
        self.element = setting.run.dtype.itemsize

    def stage(self, stage: int, exchanges: tuple[Exchange, ...]) -> StageTime:
        """One micro-step of a stage."""
        time, setting = StageTime(), self.setting
        first, last = stage == 0, stage == setting.plan.num_stages - 1
        for number in setting.plan.blocks(stage):
            self._block(number, time)
        if first:
            self._early_exit(time)
        if last:
            self._head(time)
        self._gradients(stage, time)
        self._communicate(exchanges, time)
        self._select(first, last, time)
        self._host(stage, first, last, time)
        return time

    def once(self, stage: int, exchanges: tuple[Exchange, ...]) -> dict[str, float]:
        """What a rank of a stage does once a step."""
        run, params = self.setting.run, self._params(stage)
        spread = (run.engine.zero_stage or 0) >= 1
        own = params / (run.dp_size if spread else 1)
        parts = {"optimizer": own * OPTIMIZER_BYTES / self.machine.memory_bandwidth}
        for exchange in exchanges:
            if exchange.phase == "step":
                name = f"communication: {exchange.kind}"
                parts[name] = parts.get(name, 0.0) + exchange.count * exchange.seconds(self.machine)
        return parts

    def _params(self, stage: int) -> int:
        plan = self.setting.plan
        return stage_params(
            self.setting.shape,
            plan.num_blocks[stage],
            first=stage == 0,
            last=stage == plan.num_stages - 1,
            tp=self.tp,
        )

    def _pace(self, products: list[tuple[float, float, float]]) -> float:
        """FLOP/s over products of [m, k] and [k, n], with their operands' way through memory."""
        flops = sum(2 * m * k * n for m, k, n in products)
        moved = sum(m * k + k * n + m * n for m, k, n in products) * self.element
        peak = self.machine.peak_flops * self.machine.efficiency
        return flops / (flops / peak + moved / self.machine.memory_bandwidth)

    def _block(self, number: int, time: StageTime) -> None:
        setting, machine, tp = self.setting, self.machine, self.tp
        behind = number >= setting.policy.selector_depth
        tokens = self.work.tokens_deep if behind else self.work.tokens
        if not tokens:
            return
        d, f = setting.shape.hidden_size, setting.shape.ffn_hidden_size
        pace = self._pace(
            [(tokens, d, 3 * d / tp), (tokens, d / tp, d), (tokens, d, f / tp), (tokens, f / tp, d)]
        )
        again = 1 if setting.flops.blocks_recomputed else 0
        products = setting.flops.block(self.work, number) / tp / pace
        once = tokens * sum(block_forward(setting.shape, setting.flops.seq_length)) / tp / pace
        time.forward["blocks: matrix products"] += once
        time.backward["blocks: matrix products"] += products - once
        spread = tp if setting.run.engine.sequence_parallel else 1
        moved = tokens * d * self.element * (RESIDUAL_TRAFFIC / spread + COLUMN_TRAFFIC / tp)
        seconds = moved / machine.memory_bandwidth
        time.forward["blocks: elementwise"] += seconds
        time.backward["blocks: elementwise"] += (2 + again) * seconds

    def _early_exit(self, time: StageTime) -> None:
        setting = self.setting
        if not setting.flops.proxy:
            return
        scored = self.work.tokens / setting.flops.proxy_stride
        products = setting.flops.scoring(self.work) / self.tp / self._head_pace(scored)
        time.forward["early exit"] += products + self._logits(scored, 0)

    def _head(self, time: StageTime) -> None:
        setting, work = self.setting, self.work
        pace = self._head_pace(work.tokens_scored)
        all_products = setting.flops.head(work) / self.tp / pace
        once = dataclasses.replace(work, tokens_trained=0)
        forward = setting.flops.head(once) / self.tp / pace
        time.forward["head"] += forward + self._logits(work.tokens_scored, 0)
        time.backward["head"] += all_products - forward + self._logits(work.tokens_trained, 1)

    def _head_pace(self, tokens: float) -> float:
        shape = self.setting.shape
        return self._pace([(tokens, shape.hidden_size, shape.padded_vocab_size / self.tp)])

    def _logits(self, tokens: float, direction: int) -> float:
        logits = tokens * self.setting.shape.padded_vocab_size / self.tp
        return logits * self.machine.logit_bytes[direction] / self.machine.memory_bandwidth

    def _gradients(self, stage: int, time: StageTime) -> None:
        moved = ACCUMULATION_BYTES * self._params(stage)
        time.backward["gradients added up"] += moved / self.machine.memory_bandwidth

    def _communicate(self, exchanges: tuple[Exchange, ...], time: StageTime) -> None:
        machine = self.machine
        for exchange in exchanges:
            seconds = exchange.count * exchange.seconds(machine)
            forward = exchange.phase == "forward"
            if exchange.phase == "step":
                continue
            if exchange.kind == "pipeline":
                if forward:
                    time.send_forward += seconds
                else:
                    time.send_backward += seconds
                continue
            name = f"communication: {exchange.kind}"
            if exchange.kind == "selection":
                name = GATHERS
            (time.forward if forward else time.backward)[name] += seconds
        if time.send_forward:
            # The receiver's host reads the shapes before it knows what to receive.
            time.send_forward += machine.wait_seconds
        if self.setting.run.engine.zero_stage == 3:
            _hide_behind_computing(time.forward, machine.hidden_share)
            _hide_behind_computing(time.backward, machine.hidden_share)

    def _select(self, first: bool, last: bool, time: StageTime) -> None:
        policy, machine = self.setting.policy, self.machine
        dp = self.setting.run.dp_size if policy.options.eslm_scope == "global" else 1
        rows = self.work.tokens / (self.setting.run.model.seq_length or 1)
        for here, source, scores in (
            (first, policy.instance_source, rows * dp),
            (last, policy.token_source, self.work.tokens * dp),
        ):
            if here and source != "nothing":
                seconds = scores * KEEP_RULE_BYTES / machine.memory_bandwidth
                seconds += WAITS_OF_A_THRESHOLD * machine.wait_seconds
                time.forward["selection: thresholds"] += seconds

    def _host(self, stage: int, first: bool, last: bool, time: StageTime) -> None:
        setting = self.setting
        again = 1 if setting.flops.blocks_recomputed else 0
        kernels = setting.plan.num_blocks[stage] * KERNELS_OF_A_BLOCK * (3 + again) / 3
        kernels += KERNELS_OF_THE_HEAD * (last + (first and setting.flops.proxy))
        host = kernels * self.machine.launch_seconds
        waits = max(0.0, host - time.busy) if self.machine.host_overlaps else host
        time.forward["host"] += waits / 3
        time.backward["host"] += waits * 2 / 3


def _hide_behind_computing(parts: defaultdict[str, float], share: float) -> None:
    """ZeRO 3 gathers the next layers' weights while this one computes."""
    computing = sum(s for name, s in parts.items() if not name.startswith("communication"))
    for name in ("communication: weights", "communication: gradients"):
        if name in parts:
            hidden = min(share * parts[name], computing)
            parts[name] -= hidden
            computing -= hidden


def memory_fits(setting: Setting, machine: Machine) -> bool:
    """Whether each rank finds room for what it holds."""
    return setting.memory.total <= machine.budget_bytes


def ideal_bubble(stages: int, micro_steps: int) -> float:
    """Idle share of equal stages without hand-overs: (P - 1) of (n + P - 1)."""
    return (stages - 1) / (micro_steps + stages - 1)
