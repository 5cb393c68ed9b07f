"""Search all layouts that the rules allow and that fit into memory.

Layouts are ranked by time per token in the loss, not per step: the keep rule rounds down, so small
micro-batches drop more than alpha (1 of 2 rows), and their steps are short because they do less.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_eslm.errors import ConfigError
from megatron_eslm.parallel.mesh import check_layout
from megatron_eslm.planning.cost import StepCost, step_cost
from megatron_eslm.planning.hardware import GIB, Machine
from megatron_eslm.planning.request import GPT2_VOCAB_SIZE, Layout, Request, with_layout
from megatron_eslm.planning.setting import Plans, Setting, memory_fits

LARGEST_MICRO_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Pins:
    """What of a layout is decided already; by default nothing."""

    tensor_model_parallel_size: int | None = None
    """Ranks that share a layer; default: all sizes that are allowed."""

    pipeline_model_parallel_size: int | None = None
    """Stages; default: all numbers that are allowed."""

    micro_batch_size: int | None = None
    """Sequences of a rank; default: all that fit."""

    zero_stage: int | None = None
    """Of DeepSpeed; default: all that are allowed."""

    activation_checkpoint_interval: int | None = None
    """Blocks between checkpoints of activations, 0 for none; default: both none and one."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A layout and its predicted cost."""

    layout: Layout
    cost: StepCost

    @property
    def seconds_of_a_token(self) -> float:
        """Time per token in the loss."""
        return self.cost.seconds / self.cost.setting.work.tokens_trained


def divisors(number: int, at_most: int | None = None) -> list[int]:
    """Divisors of a number, ascending."""
    return [n for n in range(1, min(number, at_most or number) + 1) if number % n == 0]


def layouts(request: Request, machine: Machine, pins: Pins) -> Iterator[Layout]:
    """Yield all layouts that divide devices and batch evenly; other rules are not checked yet.

    Tensor-parallel ranks stay within a machine.
    """
    one_tp, one_pp = pins.tensor_model_parallel_size, pins.pipeline_model_parallel_size
    check_layout(request.gpus, one_tp or 1, one_pp or 1)
    tps = [one_tp] if one_tp else divisors(request.gpus, machine.gpus_per_node)
    for tp in tps:
        pps = [one_pp] if one_pp else divisors(request.gpus // tp, request.size.num_layers)
        for pp in pps:
            dp, rest = divmod(request.gpus, tp * pp)
            if rest or request.batch % dp:
                continue
            sizes = divisors(request.batch // dp, LARGEST_MICRO_BATCH)
            if pins.micro_batch_size:
                sizes = [size for size in sizes if size == pins.micro_batch_size]
            for size in sizes:
                for zero in (0, 1, 2, 3) if pins.zero_stage is None else (pins.zero_stage,):
                    one = pins.activation_checkpoint_interval
                    for interval in (0, 1) if one is None else (one,):
                        yield Layout(
                            tp=tp,
                            pp=pp,
                            dp=dp,
                            micro_batch_size=size,
                            zero_stage=zero,
                            checkpoint_interval=interval,
                        )


def search(request: Request, machine: Machine, pins: Pins | None = None) -> list[Plan]:
    """Return all plans, best first.

    Raises:
        ConfigError: devices and batch cannot be divided, the rules refuse everything, or nothing
            fits into memory; the message says what would help.
    """
    pins = pins or Pins()
    options = request.options()
    plans: list[Plan] = []
    refusals: list[str] = []
    least: tuple[float, Layout] | None = None
    tried, known = False, Plans()
    for layout in layouts(request, machine, pins):
        tried = True
        try:
            setting = Setting.of(with_layout(options, layout), GPT2_VOCAB_SIZE, known)
        except ConfigError as refusal:
            refusals.append(str(refusal))
            continue
        if memory_fits(setting, machine):
            plans.append(Plan(layout=layout, cost=step_cost(setting, machine)))
        elif least is None or setting.memory.total < least[0]:
            least = setting.memory.total, layout
    if plans:
        return sorted(plans, key=lambda plan: plan.seconds_of_a_token)
    if not tried:
        raise ConfigError(_indivisible(request, pins))
    if least is None:
        raise ConfigError(refusals[0])
    raise ConfigError(
        f"--model-size {request.model_size} does not fit on --gpus {request.gpus}: the smallest "
        f"layout ({least[1]}) needs {least[0] / GIB:.1f} GiB per GPU, but {machine.name} leaves "
        f"{machine.budget_bytes / GIB:.1f} of {machine.memory_bytes / GIB:.0f} GiB. Use more GPUs, "
        "GPUs with more memory, or leave out flags that fix the layout (--micro-batch-size, "
        "--zero-stage, --activation-checkpoint-interval)."
    )


def _indivisible(request: Request, pins: Pins) -> str:
    micro = pins.micro_batch_size or 1
    fitting = [n for n in divisors(request.batch) if n % micro == 0]
    near = min(fitting, key=lambda n: abs(n // micro - request.gpus), default=micro)
    return (
        f"--global-batch-size {request.batch} cannot be divided over --gpus {request.gpus} in "
        f"micro-batches of {pins.micro_batch_size or '1 or more'}: no TP x PP of the model leaves "
        f"a data-parallel size that divides it. Use {near // micro} GPUs, or a --global-batch-size "
        f"that is a multiple of {request.gpus * micro}."
    )


def plan_layout(request: Request, layout: Layout, machine: Machine) -> Plan:
    """Plan one layout, whether it fits into memory or not; ConfigError if the rules refuse it."""
    setting = Setting.of(with_layout(request.options(), layout), GPT2_VOCAB_SIZE)
    return Plan(layout=layout, cost=step_cost(setting, machine))
