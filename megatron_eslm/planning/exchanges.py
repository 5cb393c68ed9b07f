"""Communication in a step: volumes, groups and times of all collectives.

Volumes follow the code: megatron-core's layers for tensor parallelism, DeepSpeed for gradients and
traffic between stages, ops/keep_rule.py and training/step_selection.py for selection. Candidates'
scores within a model-parallel group (4 bytes each, once per step) are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from megatron_eslm.config.run import RunConfig
from megatron_eslm.cost.flops import Work
from megatron_eslm.cost.stages import StagePlan, exit_params
from megatron_eslm.model.arithmetic import stage_params
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.planning.hardware import Machine, Protocol
from megatron_eslm.selection.traits import PolicyTraits

Collective = Literal["all-reduce", "all-gather", "reduce-scatter", "broadcast", "send"]
Phase = Literal["forward", "backward", "step"]
Kind = Literal["tensor", "pipeline", "gradients", "weights", "selection", "proxy"]

FLOAT32, INT64 = 4, 8


@dataclass(frozen=True, kw_only=True)
class Group:
    """A group of ranks that communicate."""

    size: int
    per_node: int
    """Ranks of the group per machine."""

    @property
    def num_nodes(self) -> int:
        """Number of machines that the group spans."""
        return math.ceil(self.size / self.per_node)


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Groups of a layout; ranks are ordered tensor, data, pipeline (parallel/mesh.py)."""

    tensor: Group
    data: Group
    neighbours: Group
    """Two adjacent stages."""
    ends: Group
    """The first and the last stage."""
    stages: Group
    """All stages of a pipeline."""

    @classmethod
    def of(cls, run: RunConfig, gpus_per_node: int) -> Groups:
        """Groups of a run on machines with `gpus_per_node` devices, filled one after another."""
        tp, pp = run.engine.tensor_model_parallel_size, run.engine.pipeline_model_parallel_size
        dp = run.dp_size
        one_node = tp * dp * pp <= gpus_per_node
        pair = Group(size=2, per_node=2 if one_node else 1)
        return cls(
            tensor=Group(size=tp, per_node=min(tp, gpus_per_node)),
            data=Group(size=dp, per_node=min(dp, max(1, gpus_per_node // tp))),
            neighbours=pair,
            ends=pair,
            stages=Group(size=pp, per_node=min(pp, max(1, gpus_per_node // (tp * dp)))),
        )


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """A collective or send of the ranks of a stage."""

    kind: Kind
    what: str
    collective: Collective
    group: Group
    num_bytes: float
    """Bytes of the full tensor: the operand of an all-reduce, reduce-scatter, broadcast or send;
    the result of an all-gather."""
    count: float
    """Number per forward or backward pass of a micro-step, or per optimizer step, by phase."""
    phase: Phase

    @property
    def sent_bytes(self) -> float:
        """Bytes sent per rank each time, with ring algorithms (Thakur et al. 2005)."""
        n = self.group.size
        if self.collective in ("send", "broadcast"):
            return self.num_bytes
        return (n - 1) / n * self.num_bytes * (2 if self.collective == "all-reduce" else 1)

    def times(self, micro_steps: int) -> float:
        """Number of executions per optimizer step."""
        return self.count * (1 if self.phase == "step" else micro_steps)

    def seconds(self, machine: Machine) -> float:
        """Time of one execution."""
        if self.group.size == 1:
            return 0.0
        return min(self._by(protocol, machine) for protocol in machine.protocols)

    def _by(self, protocol: Protocol, machine: Machine) -> float:
        bandwidth = link_bandwidth(machine, self.group) * protocol.bandwidth_share
        nodes, ranks = self.group.num_nodes, self.group.size
        if self.collective == "send":
            hop = protocol.hop_inter if nodes > 1 else protocol.hop_intra
            return protocol.base + hop + self.num_bytes / bandwidth
        rounds = 2 if self.collective == "all-reduce" else 1
        hops = (nodes - 1) * protocol.hop_inter + (ranks - nodes) * protocol.hop_intra
        ring = protocol.base + rounds * hops + self.sent_bytes / bandwidth
        if self.collective != "all-reduce":
            return ring  # NCCL uses trees for all-reduce only
        levels = (self.group.per_node - 1) * protocol.tree_hop_intra
        levels += math.log2(nodes) * protocol.tree_hop_inter
        return min(ring, protocol.base + 2 * levels + 2 * self.num_bytes / (0.9 * bandwidth))


def link_bandwidth(machine: Machine, group: Group) -> float:
    """Bandwidth of one ring of a group; groups on a machine share its network cards."""
    bandwidth = machine.intra_bandwidth
    if group.num_nodes > 1:
        share = group.per_node / machine.gpus_per_node
        bandwidth = min(bandwidth, machine.node_bandwidth * share)
    return bandwidth * machine.link_efficiency


@dataclass(frozen=True, kw_only=True)
class Exchanges:
    """Lists the exchanges of the ranks of one stage; see `of_stage`."""

    run: RunConfig
    shape: ModelShape
    plan: StagePlan
    traits: PolicyTraits
    groups: Groups

    def of_stage(self, stage: int, work: Work) -> list[Exchange]:
        """All exchanges of a stage, without groups of one rank.

        Args:
            stage: number of the stage in the plan.
            work: work of one rank in one micro-step.
        """
        found = [
            *self._tensor(stage, work),
            *self._pipeline(stage, work),
            *self._data(stage),
            *self._selection(stage, work),
            *self._proxy(stage),
        ]
        return [exchange for exchange in found if exchange.group.size > 1]

    def _is_first(self, stage: int) -> bool:
        return stage == 0

    def _is_last(self, stage: int) -> bool:
        return stage == self.plan.num_stages - 1

    def _tensor(self, stage: int, work: Work) -> Iterable[Exchange]:
        def exchange(
            what: str, collective: Collective, phase: Phase, num_bytes: float, count: float = 1
        ) -> Exchange:
            return Exchange(
                kind="tensor",
                what=what,
                collective=collective,
                group=self.groups.tensor,
                num_bytes=num_bytes,
                count=count,
                phase=phase,
            )

        d, element = self.shape.hidden_size, self.run.dtype.itemsize
        spread = self.run.engine.sequence_parallel
        interval = self.run.model.activation_checkpoint_interval
        depth = 0 if self.traits.selects_per_step else self.traits.early_exit_blocks
        before = sum(number < depth for number in self.plan.blocks(stage))
        behind = self.plan.num_blocks[stage] - before
        for blocks, tokens in ((before, work.tokens), (behind, work.tokens_deep)):
            if not blocks:
                continue
            size = tokens * d * element
            # Recomputed blocks communicate again, except the last output of each group.
            inputs = outputs = 0
            if interval:
                inputs, outputs = 2 * blocks, 2 * blocks - math.ceil(blocks / interval)
            if not spread:
                # Forward: outputs of attention and MLP; backward: gradients of both inputs.
                yield exchange("blocks", "all-reduce", "forward", size, 2 * blocks)
                yield exchange("blocks", "all-reduce", "backward", size, 2 * blocks + outputs)
                continue
            yield exchange("blocks", "all-gather", "forward", size, 2 * blocks)
            yield exchange("blocks", "reduce-scatter", "forward", size, 2 * blocks)
            # Inputs are gathered again for the weight gradients.
            yield exchange("blocks", "all-gather", "backward", size, 4 * blocks + inputs)
            yield exchange("blocks", "reduce-scatter", "backward", size, 2 * blocks + outputs)
            # Gradients of norms and row-parallel biases; each rank has only some positions.
            yield exchange("norms", "all-reduce", "backward", d * element, 6 * blocks)
        if self._is_first(stage):
            size = work.tokens * d * element
            yield exchange("embedding", "all-reduce", "forward", size)
            if spread:
                yield exchange("embedding", "all-gather", "backward", size)
            if self.traits.sequence_source == "head" and self.traits.selects_in_model:
                scored = work.tokens / self.traits.proxy_stride
                yield from self._statistics("early exit", exchange, scored)
                if spread:
                    yield exchange("early exit", "all-gather", "forward", size)
        if self._is_last(stage):
            yield from self._statistics("head", exchange, work.tokens_scored)
            if spread:
                size = work.tokens_deep * d * element
                yield exchange("head", "all-gather", "forward", size)
            yield exchange("head", "all-reduce", "backward", work.tokens_trained * d * element)

    def _statistics(
        self, what: str, exchange: Callable[..., Exchange], tokens: float
    ) -> Iterable[Exchange]:
        yield exchange(what, "all-reduce", "forward", FLOAT32 * tokens)
        yield exchange(what, "all-reduce", "forward", 3 * FLOAT32 * tokens)

    def _pipeline(self, stage: int, work: Work) -> Iterable[Exchange]:
        if self.plan.num_stages == 1:
            return
        engine = self.run.engine
        spread = engine.tensor_model_parallel_size if engine.sequence_parallel else 1
        hidden = work.tokens_deep * self.shape.hidden_size * self.run.dtype.itemsize / spread

        def send(what: str, phase: Phase, num_bytes: float) -> Exchange:
            return Exchange(
                kind="pipeline",
                what=what,
                collective="send",
                group=self.groups.neighbours,
                num_bytes=num_bytes,
                count=1,
                phase=phase,
            )

        if not self._is_last(stage):
            yield send("hidden states", "forward", hidden)
        if not self._is_first(stage):
            yield send("their gradients", "backward", hidden)
        if self._is_first(stage) or self._is_last(stage):
            tp = engine.tensor_model_parallel_size
            weight = self.shape.padded_vocab_size * self.shape.hidden_size / tp
            yield Exchange(
                kind="gradients",
                what="tied embedding",
                collective="all-reduce",
                group=self.groups.ends,
                num_bytes=FLOAT32 * weight,
                count=1,
                phase="step",
            )

    def _data(self, stage: int) -> Iterable[Exchange]:
        engine, zero = self.run.engine, self.run.engine.zero_stage
        params = stage_params(
            self.shape,
            self.plan.num_blocks[stage],
            first=self._is_first(stage),
            last=self._is_last(stage),
            tp=engine.tensor_model_parallel_size,
        )
        size = float(params * self.run.dtype.itemsize)

        def exchange(kind: Kind, collective: Collective, phase: Phase) -> Exchange:
            return Exchange(
                kind=kind,
                what=f"ZeRO {zero}",
                collective=collective,
                group=self.groups.data,
                num_bytes=size,
                count=1,
                phase=phase,
            )

        if zero == 3:
            yield exchange("weights", "all-gather", "forward")
            yield exchange("weights", "all-gather", "backward")
            yield exchange("gradients", "reduce-scatter", "backward")
            return
        # DeepSpeed all-reduces full buckets (use_multi_rank_bucket_allreduce). Stage 2 does so
        # after each micro-step, because a rank cannot store sums of other ranks' partitions.
        yield exchange("gradients", "all-reduce", "backward" if zero == 2 else "step")
        if zero:
            yield exchange("weights", "all-gather", "step")

    def _selection(self, stage: int, work: Work) -> Iterable[Exchange]:
        data = self.groups.data

        def exchange(what: str, collective: Collective, num_bytes: float) -> Exchange:
            return Exchange(
                kind="selection",
                what=what,
                collective=collective,
                group=data,
                num_bytes=num_bytes,
                count=1,
                phase="forward",
            )

        together = not self.traits.ranks_decide_alone
        rows = work.tokens / self.run.model.seq_length
        within = self.traits.selects_in_model
        if self._is_first(stage) and within and together:
            yield exchange("scores of rows", "all-gather", FLOAT32 * rows * data.size)
        if self._is_last(stage):
            if self.traits.selects_tokens and together:
                size = FLOAT32 * work.tokens * data.size
                yield exchange("scores of tokens", "all-gather", size)
            else:
                yield exchange("number of kept tokens", "all-reduce", INT64)

    def _proxy(self, stage: int) -> Iterable[Exchange]:
        """The proxy pass before a step: forward over the candidates, one micro-batch at a time."""
        if not self.traits.selects_per_step:
            return
        read, rows = self.run.gradient_accumulation_steps, self.run.training.micro_batch_size
        chunks = math.ceil(read / self.plan.num_stages)
        positions = rows * self.run.model.seq_length

        def exchange(
            what: str, collective: Collective, phase: Phase, num_bytes: float, count: float = 1
        ) -> Exchange:
            return Exchange(
                kind="proxy",
                what=what,
                collective=collective,
                group=self.groups.tensor,
                num_bytes=num_bytes,
                count=count * chunks,
                phase="step",
            )

        if self.traits.sequence_source == "head":
            tp, rank = self.groups.tensor.size, self.run.model.lora_rank
            copied = exit_params(self.shape, self.plan, rank, tp)
            yield Exchange(
                kind="proxy",
                what="copies of the early exit",
                collective="broadcast",
                group=self.groups.stages,
                num_bytes=copied * self.run.dtype.itemsize,
                count=1,
                phase="step",
            )
            size = positions * self.shape.hidden_size * self.run.dtype.itemsize
            depth = self.traits.early_exit_blocks
            yield exchange("embedding", "all-reduce", "step", size)
            if self.run.engine.sequence_parallel:
                yield exchange("blocks", "all-gather", "step", size, 2 * depth)
                yield exchange("blocks", "reduce-scatter", "step", size, 2 * depth)
                yield exchange("early exit", "all-gather", "step", size)
            else:
                yield exchange("blocks", "all-reduce", "step", size, 2 * depth)
            scored = positions / self.traits.proxy_stride
            yield from self._statistics("early exit", exchange, scored)
        yield Exchange(
            kind="proxy",
            what="scores of candidates",
            collective="all-gather",
            group=self.groups.data,
            num_bytes=FLOAT32 * read * rows * self.groups.data.size,
            count=1,
            phase="step",
        )
