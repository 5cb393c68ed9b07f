"""Predict the time of one optimizer step of a layout, and how it splits up.

Times of the parts of a micro-step are summed per stage (stage_clock.py) and run through the
pipeline schedule. Then the parts that happen once per step are added: the proxy pass, which all
stages share, and the optimizer.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from megatron_eslm.planning.exchanges import Exchange, Exchanges, Groups
from megatron_eslm.planning.hardware import Machine
from megatron_eslm.planning.pipeline_time import pipeline_seconds
from megatron_eslm.planning.setting import Setting, rank_work
from megatron_eslm.planning.stage_clock import (
    PROXY_PASS,
    SELECTION,
    Clock,
    StageTime,
    communication,
)


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Cost of one optimizer step of one layout on one machine."""

    setting: Setting
    machine: Machine
    stages: tuple[StageTime, ...]
    exchanges: tuple[tuple[Exchange, ...], ...]
    """Exchanges of each stage."""
    micro_steps_seconds: float
    """Time of all micro-steps through the pipeline."""
    once: dict[str, float]
    """Seconds of the parts that happen once per step."""
    shared_cores_seconds: float
    """If processes share cores: computing time of all processes divided by the cores, plus
    communication time of one process; else 0."""
    computing_seconds: float
    """Computing time, summed over all processes."""

    @property
    def seconds(self) -> float:
        """Time of the step."""
        return max(self.micro_steps_seconds + sum(self.once.values()), self.shared_cores_seconds)

    @property
    def parts(self) -> dict[str, float]:
        """Breakdown of the time: the busiest stage, its waits, and parts once per step."""
        slowest = max(self.stages, key=lambda stage: stage.busy)
        steps = self.setting.micro_steps
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
        """Average share of the micro-steps' time in which stages are idle or send and receive."""
        steps = self.setting.micro_steps
        busy = sum(stage.busy for stage in self.stages) * steps / len(self.stages)
        return 1 - busy / self.micro_steps_seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization: model FLOPs over the peak FLOPs of all devices."""
        run = self.setting.run
        engine = run.engine
        ranks = (
            engine.tensor_model_parallel_size * engine.pipeline_model_parallel_size * run.dp_size
        )
        return self.setting.model_flops / (self.seconds * self.machine.peak_flops * ranks)

    def volumes(self) -> dict[str, float]:
        """Bytes sent per rank and step, by kind; for each kind, of the stage that sends most."""
        steps = self.setting.micro_steps
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
        """Time of selection per step: proxy pass, gathers of scores, keep rule, host waits."""
        steps = self.setting.micro_steps
        return self.once.get(PROXY_PASS, 0.0) + steps * sum(
            direction.get(name, 0.0)
            for stage in self.stages
            for direction in (stage.forward, stage.backward)
            for name in SELECTION
        )


def step_cost(setting: Setting, machine: Machine, *, balanced: bool = False) -> StepCost:
    """Predict a step.

    Args:
        setting: the run.
        machine: the machine to run on.
        balanced: assume that all ranks have the same number of rows and tokens.
    """
    works = rank_work(setting)
    work = works.fair if balanced else works.largest
    run, plan = setting.run, setting.plan
    groups = Groups.of(run, machine.gpus_per_node)
    exchanges = Exchanges(
        run=run,
        shape=setting.shape,
        plan=plan,
        traits=setting.traits,
        groups=groups,
    )
    lists = tuple(tuple(exchanges.of_stage(s, work)) for s in range(plan.num_stages))
    clock = Clock(setting, machine, work)
    stages = tuple(clock.stage(s, lists[s]) for s in range(plan.num_stages))
    steps = setting.micro_steps
    micro_steps = pipeline_seconds(
        [sum(stage.forward.values()) for stage in stages],
        [sum(stage.backward.values()) for stage in stages],
        steps,
        activations=[stage.send_forward for stage in stages[:-1]],
        gradients=[stage.send_backward for stage in stages[1:]],
    )
    once = [clock.once(s, lists[s]) for s in range(plan.num_stages)]
    slowest = max(once, key=lambda each: sum(each.values()))
    proxy = max(clock.proxy_pass(sent) for sent in lists)
    computing, communicating = _shared(setting, stages, once)
    ranks = run.dp_size * run.engine.tensor_model_parallel_size * plan.num_stages
    computing += proxy * ranks
    shared = 0.0 if machine.cores is None else computing / machine.cores + communicating
    return StepCost(
        setting=setting,
        machine=machine,
        stages=stages,
        exchanges=lists,
        micro_steps_seconds=micro_steps,
        once={**slowest, PROXY_PASS: proxy},
        shared_cores_seconds=shared,
        computing_seconds=computing,
    )


def _shared(
    setting: Setting, stages: tuple[StageTime, ...], once: list[dict[str, float]]
) -> tuple[float, float]:
    """(computing seconds over all processes, communication seconds of one process)."""
    run = setting.run
    ranks = run.dp_size * run.engine.tensor_model_parallel_size
    computing, communicating = 0.0, 0.0
    for stage, each in zip(stages, once, strict=True):
        steps = setting.micro_steps
        waits = steps * stage.communicating + communication(each)
        whole = steps * (stage.busy + stage.sending) + sum(each.values())
        computing += whole - waits
        communicating = max(communicating, waits)
    return computing * ranks, communicating


def ideal_bubble(stages: int, micro_steps: int) -> float:
    """Idle share with equal stages and free communication: (P - 1) / (n + P - 1)."""
    return (stages - 1) / (micro_steps + stages - 1)
