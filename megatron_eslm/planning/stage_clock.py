"""Predict the time of each part of a micro-step and of an optimizer step on one rank of a stage.

Matmuls are those counted in cost/flops.py; other kernels count by the bytes that they read and
write.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_eslm.cost.flops import Work
from megatron_eslm.model.architectures.registry import architecture_of
from megatron_eslm.model.arithmetic import block_forward, head_forward, stage_params
from megatron_eslm.planning.exchanges import Exchange
from megatron_eslm.planning.hardware import Machine
from megatron_eslm.planning.setting import Setting

# Elements read and written by a block's kernels, forward, in units of D per position. Residual
# stream: two norms (2 + 2), two biases (2 + 2), two sums (3 + 3). Columns of each tensor-parallel
# rank: attention's output made contiguous (2), GELU (8). Backward takes about twice as much.
RESIDUAL_TRAFFIC, COLUMN_TRAFFIC = 14, 10
KERNELS_OF_A_BLOCK = 90
"""Launches per block, forward and backward, counted with torch's profiler."""
KERNELS_OF_THE_HEAD = 60
OPTIMIZER_BYTES = 40
"""Per parameter: Adam reads gradient, master weight and moments and writes the last three and the
weight; norm and clipping read and write the gradient."""
ACCUMULATION_BYTES = 12
"""Per parameter and micro-step: read the gradient and add it to a float32 sum."""
KEEP_RULE_BYTES = 100
"""Per score of all ranks: comparisons, k-th value, running sum of ties (ops/keep_rule.py)."""
GATHERS = "selection: gathers of scores"
PROXY_PASS = "selection: proxy pass"
WAITS_OF_A_THRESHOLD = 4
"""Host waits per keep rule: counts, tau, kept indices twice."""
SELECTION = (GATHERS, "selection: thresholds")
"""Parts of selection besides scoring."""


@dataclass
class StageTime:
    """Seconds of one micro-step in one stage, by part."""

    forward: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    backward: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    send_forward: float = 0.0
    send_backward: float = 0.0

    @property
    def busy(self) -> float:
        """Seconds without communication between stages."""
        return sum(self.forward.values()) + sum(self.backward.values())

    @property
    def sending(self) -> float:
        """Seconds of communication with adjacent stages."""
        return self.send_forward + self.send_backward

    @property
    def communicating(self) -> float:
        """Seconds of all communication."""
        return communication(self.forward) + communication(self.backward) + self.sending


def communication(parts: Mapping[str, float]) -> float:
    return sum(s for name, s in parts.items() if name.startswith(("communication", GATHERS)))


class Clock:
    """Predicts times of a rank that processes `work` in a micro-step."""

    def __init__(self, setting: Setting, machine: Machine, work: Work) -> None:
        self.setting, self.machine, self.work = setting, machine, work
        self.tp = setting.run.engine.tensor_model_parallel_size
        self.element = setting.run.dtype.itemsize

    def stage(self, stage: int, exchanges: tuple[Exchange, ...]) -> StageTime:
        """Time of one micro-step of a stage."""
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
        """Seconds of the parts that a rank of a stage runs once per step."""
        run, params = self.setting.run, self._params(stage)
        spread = run.engine.zero_stage >= 1
        own = params / (run.dp_size if spread else 1)
        parts = {"optimizer": own * OPTIMIZER_BYTES / self.machine.memory_bandwidth}
        for exchange in exchanges:
            if exchange.phase == "step" and exchange.kind != "proxy":
                name = f"communication: {exchange.kind}"
                parts[name] = parts.get(name, 0.0) + exchange.count * exchange.seconds(self.machine)
        return parts

    def proxy_pass(self, exchanges: tuple[Exchange, ...]) -> float:
        """Seconds of the proxy pass before a step, whose candidates all stages share."""
        setting, machine = self.setting, self.machine
        if not setting.flops.scoring(setting.work) or not setting.flops.ahead:
            return 0.0
        depth, run = setting.traits.early_exit_blocks, setting.run
        tokens = run.training.micro_batch_size * run.model.seq_length
        scored = tokens / setting.flops.proxy_stride
        one_block = sum(block_forward(setting.shape, setting.flops.seq_length)) / self.tp
        seconds = depth * (
            tokens * one_block / self._block_pace(tokens) + self._elementwise(tokens)
        )
        products = scored * head_forward(setting.shape) / self.tp / self._head_pace(scored)
        seconds += products + self._logits(scored, 0)
        host = (depth * KERNELS_OF_A_BLOCK / 3 + KERNELS_OF_THE_HEAD) * machine.launch_seconds
        seconds += max(0.0, host - seconds) if machine.host_overlaps else host
        sent = sum(e.count * e.seconds(machine) for e in exchanges if e.kind == "proxy")
        chunks = math.ceil(setting.run.gradient_accumulation_steps / setting.plan.num_stages)
        return chunks * seconds + sent + machine.wait_seconds

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
        """FLOP/s of matmuls of [m, k] and [k, n], including memory traffic of the operands."""
        flops = sum(2 * m * k * n for m, k, n in products)
        moved = sum(m * k + k * n + m * n for m, k, n in products) * self.element
        peak = self.machine.peak_flops * self.machine.efficiency
        return flops / (flops / peak + moved / self.machine.memory_bandwidth)

    def _block(self, number: int, time: StageTime) -> None:
        setting, tp = self.setting, self.tp
        behind = number >= setting.traits.early_exit_blocks or setting.flops.ahead
        tokens = self.work.tokens_deep if behind else self.work.tokens
        if not tokens:
            return
        pace = self._block_pace(tokens)
        again = 1 if setting.flops.blocks_recomputed else 0
        products = setting.flops.block(self.work, number) / tp / pace
        once = tokens * sum(block_forward(setting.shape, setting.flops.seq_length)) / tp / pace
        time.forward["blocks: matrix products"] += once
        time.backward["blocks: matrix products"] += products - once
        seconds = self._elementwise(tokens)
        time.forward["blocks: elementwise"] += seconds
        time.backward["blocks: elementwise"] += (2 + again) * seconds

    def _block_pace(self, tokens: float) -> float:
        products = []
        for weight in architecture_of(self.setting.shape).linears(self.setting.shape):
            sizes: list[float] = list(weight.size(self.setting.shape))
            if weight.sharded is not None:
                sizes[weight.sharded] /= self.tp
            products.append((tokens, sizes[1], sizes[0]))
        return self._pace(products)

    def _elementwise(self, tokens: float) -> float:
        """Forward seconds of a block's kernels other than matmuls."""
        spread = self.tp if self.setting.run.engine.sequence_parallel else 1
        traffic = RESIDUAL_TRAFFIC / spread + COLUMN_TRAFFIC / self.tp
        moved = tokens * self.setting.shape.hidden_size * self.element * traffic
        return moved / self.machine.memory_bandwidth

    def _early_exit(self, time: StageTime) -> None:
        setting = self.setting
        if not setting.flops.scoring(setting.work) or setting.flops.ahead:
            return
        scored = self.work.tokens / setting.flops.proxy_stride
        products = scored * head_forward(setting.shape) / self.tp / self._head_pace(scored)
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
        if self.setting.run.engine.zero_stage == 3:
            _hide_behind_computing(time.forward, machine.hidden_share)
            _hide_behind_computing(time.backward, machine.hidden_share)

    def _select(self, first: bool, last: bool, time: StageTime) -> None:
        traits, machine = self.setting.traits, self.machine
        dp = 1 if traits.ranks_decide_alone else self.setting.run.dp_size
        rows = self.work.tokens / self.setting.run.model.seq_length
        for here, source, scores in (
            (
                first and not traits.selects_per_step,
                traits.sequence_source,
                rows * dp,
            ),
            (last, traits.token_source, self.work.tokens * dp),
        ):
            if here and source != "nothing":
                seconds = scores * KEEP_RULE_BYTES / machine.memory_bandwidth
                seconds += WAITS_OF_A_THRESHOLD * machine.wait_seconds
                time.forward["selection: thresholds"] += seconds

    def _host(self, stage: int, first: bool, last: bool, time: StageTime) -> None:
        setting = self.setting
        again = 1 if setting.flops.blocks_recomputed else 0
        kernels = setting.plan.num_blocks[stage] * KERNELS_OF_A_BLOCK * (3 + again) / 3
        kernels += KERNELS_OF_THE_HEAD * (
            last + (first and setting.flops.proxy and not setting.flops.ahead)
        )
        host = kernels * self.machine.launch_seconds
        waits = max(0.0, host - time.busy) if self.machine.host_overlaps else host
        time.forward["host"] += waits / 3
        time.backward["host"] += waits * 2 / 3


def _hide_behind_computing(parts: defaultdict[str, float], share: float) -> None:
    """Subtract communication that ZeRO 3 overlaps: it gathers the next layers' weights early."""
    computing = sum(s for name, s in parts.items() if not name.startswith("communication"))
    for name in ("communication: weights", "communication: gradients"):
        if name in parts:
            hidden = min(share * parts[name], computing)
            parts[name] -= hidden
            computing -= hidden
