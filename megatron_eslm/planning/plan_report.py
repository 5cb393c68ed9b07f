"""Report plans as text and as plain values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from megatron_eslm.cost.stages import plan_text
from megatron_eslm.model.arithmetic import num_params
from megatron_eslm.planning.cost import ideal_bubble, step_cost
from megatron_eslm.planning.hardware import GIB, Machine, assumptions
from megatron_eslm.planning.request import Request
from megatron_eslm.planning.search import Plan, plan_layout
from megatron_eslm.planning.setting import rank_work


def plan_values(plan: Plan, clm: Plan) -> dict[str, Any]:
    """The numbers of one plan, for `--json` and tests.

    Args:
        plan: the plan.
        clm: the same layout with plain training.
    """
    cost, layout, setting = plan.cost, plan.layout, plan.cost.setting
    balanced = step_cost(setting, cost.machine, balanced=True)
    run, memory = setting.run, setting.memory
    return {
        "tensor_parallel": layout.tp,
        "pipeline_parallel": layout.pp,
        "data_parallel": layout.dp,
        "micro_batch_size": layout.micro_batch_size,
        "micro_steps": run.gradient_accumulation_steps,
        "micro_steps_trained": setting.micro_steps,
        "scope": run.selection.eslm_scope,
        "dropped_sequences": 1 - setting.work.tokens_deep / setting.work.tokens,
        "zero_stage": layout.zero_stage,
        "activation_checkpoint_interval": layout.checkpoint_interval,
        "flags": layout.flags,
        "memory_bytes": memory.total,
        "stages": list(setting.plan.num_blocks),
        "step_seconds": cost.seconds,
        "step_seconds_clm": clm.cost.seconds,
        "step_seconds_balanced": balanced.seconds,
        "ratio_to_clm": cost.seconds / clm.cost.seconds,
        "ratio_of_flops": setting.model_flops / clm.cost.setting.model_flops,
        "kept_tokens": setting.work.tokens_trained / setting.work.tokens,
        "tokens_per_second": setting.work.tokens / cost.seconds,
        "mfu": cost.mfu,
        "mfu_clm": clm.cost.mfu,
        "bubble": cost.bubble,
        "parts_seconds": cost.parts,
        "sent_bytes": cost.volumes(),
        "selection_seconds": cost.selection_seconds,
    }


def plans_values(plans: Sequence[Plan], request: Request, machine: Machine) -> list[dict[str, Any]]:
    """`plan_values` of several plans, each compared with plain training in its own layout."""
    clm = request.with_selection("clm")
    return [plan_values(plan, plan_layout(clm, plan.layout, machine)) for plan in plans]


def layouts_text(values: Sequence[dict[str, Any]]) -> str:
    """Render one line per plan."""
    head = f"{'TP':>3s} {'PP':>3s} {'DP':>5s} {'rows':>4s} {'ZeRO':>4s} {'ckpt':>4s} {'GiB':>6s} "
    head += f"{'s / step':>9s} {'tokens/s':>11s} {'MFU':>6s} {'kept':>6s} {'/ clm':>6s}"
    lines = [head]
    for v in values:
        lines.append(
            f"{v['tensor_parallel']:>3d} {v['pipeline_parallel']:>3d} {v['data_parallel']:>5d} "
            f"{v['micro_batch_size']:>4d} {v['zero_stage']:>4d} "
            f"{v['activation_checkpoint_interval']:>4d} {v['memory_bytes'] / GIB:>6.1f} "
            f"{v['step_seconds']:>9.4f} {v['tokens_per_second']:>11,.0f} {v['mfu']:>6.1%} "
            f"{v['kept_tokens']:>6.1%} {v['ratio_to_clm']:>6.3f}"
        )
    return "\n".join(lines)


def plan_report(plan: Plan, values: dict[str, Any], request: Request) -> str:
    """Render all details of one plan."""
    cost, setting = plan.cost, plan.cost.setting
    memory, shape, run = setting.memory, setting.shape, setting.run
    steps = setting.micro_steps
    parts = (
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "head",
    )
    held = " + ".join(f"{part} {getattr(memory, part) / GIB:.2f}" for part in parts)
    machine = cost.machine
    lines = [
        f"layout        {plan.layout}: {run.gradient_accumulation_steps} micro-steps"
        + (f", {steps} of them trained on" if steps < run.gradient_accumulation_steps else ""),
        f"flags         {' '.join(plan.layout.flags)}",
        f"parameters    {num_params(shape):,}",
        f"memory / GPU  {memory.total / GIB:.2f} GiB = {held} (stage {memory.stage}; "
        f"{machine.budget_bytes / GIB:.1f} can be filled)",
    ]
    if setting.plan.num_stages > 1:
        lines += [
            "",
            plan_text(setting.plan),
            f"bubble        {cost.bubble:.1%} of the micro-steps' time is idle or handing over "
            f"({ideal_bubble(setting.plan.num_stages, steps):.1%} if stages were equal and links "
            "free)",
        ]
    lines += ["", "Seconds per step (predicted)", *_parts_lines(cost.parts, cost.seconds)]
    lines += ["", "Communication per GPU and step (predicted)", *_exchange_lines(plan)]
    lines += ["", *_selection_lines(plan, values, request)]
    return "\n".join(lines)


def _parts_lines(parts: dict[str, float], total: float) -> list[str]:
    lines = [
        f"  {name:<34s} {seconds:>9.4f} {seconds / total:>6.1%}"
        for name, seconds in parts.items()
        if seconds > 0
    ]
    return [*lines, f"  {'all':<34s} {total:>9.4f}"]


def _exchange_lines(plan: Plan) -> list[str]:
    """Exchanges of the stage that sends most."""
    steps = plan.cost.setting.micro_steps
    stage = max(
        plan.cost.exchanges, key=lambda some: sum(e.times(steps) * e.sent_bytes for e in some)
    )
    rows: defaultdict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for exchange in stage:
        row = rows[exchange.kind, exchange.what, exchange.collective]
        times = exchange.times(steps)
        seconds = exchange.seconds(plan.cost.machine)
        for column, number in enumerate((1, exchange.sent_bytes, seconds)):
            row[column] += times * number
    if not rows:
        return ["  none"]
    return [
        f"  {f'{kind}: {what}':<38s} {collective:<15s} {times:>6,.0f} x  "
        f"{_bytes(sent):>10s} sent  {seconds:>8.4f} s"
        for (kind, what, collective), (times, sent, seconds) in rows.items()
    ]


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.2f} GB"


def _selection_lines(plan: Plan, values: dict[str, Any], request: Request) -> list[str]:
    cost = plan.cost
    if request.selection == "clm":
        return [f"MFU           {cost.mfu:.1%}"]
    seconds = values["selection_seconds"]
    return [
        f"MFU           {cost.mfu:.1%} ({values['mfu_clm']:.1%} with clm)",
        f"to clm        a step takes {values['ratio_to_clm']:.3f} x the same step with clm "
        f"({cost.seconds:.4f} s, {values['step_seconds_clm']:.4f} s); matrix products count "
        f"{values['ratio_of_flops']:.3f}",
        f"selection     scores and thresholds take {seconds:.4f} s of it "
        f"({seconds / cost.seconds:.2%})",
        f"imbalance     {_imbalance(plan, values)}",
    ]


def _imbalance(plan: Plan, values: dict[str, Any]) -> str:
    cost, setting, micro = plan.cost, plan.cost.setting, plan.layout.micro_batch_size
    works, length = rank_work(setting), setting.run.model.seq_length
    waits = cost.seconds / values["step_seconds_balanced"] - 1
    average, largest = (w.tokens_deep / length for w in (works.fair, works.largest))
    if works.fair == works.largest:
        return f"of {micro} rows every rank keeps {average:.2f}: no rank waits"
    end = (
        f"in tokens {works.fair.tokens_trained:,} and {works.largest.tokens_trained:,}. Waiting "
        f"for that rank lengthens a step by {waits:.1%} "
    )
    return (
        f"of {micro} rows a rank has {average:.2f} on average, the one with most {largest:.2f}; "
        f"{end}(--eslm-scope step: nothing, with enough micro-steps; local: nothing, with each "
        "rank's own thresholds)"
    )


def report(plans: Sequence[Plan], request: Request, machine: Machine, *, top: int = 5) -> str:
    """Render the best layouts, the best one in detail, and the assumptions."""
    values = plans_values(plans[:top], request, machine)
    size = request.size
    also = "" if request.selection == "clm" else f", alpha {request.alpha:g}"
    if also and request.eslm_scope is not None:
        also += f", {request.eslm_scope} scope"
    if request.selection == "eslm":
        also += (
            f", proxy of {request.eslm_proxy_layers} block(s), stride {request.eslm_proxy_stride}"
        )
    rows = [
        f"model         {request.model_size}: {size.num_layers} blocks of {size.hidden_size}, "
        f"{size.num_attention_heads} heads",
        f"batch         {request.batch} sequences x {size.seq_length} tokens per step, bf16",
        f"selection     {request.selection}{also}",
        f"machine       {request.gpus} x {machine.name}",
        "",
        f"Best of {len(plans)} layouts that fit, by time for a token in the loss (predicted)",
        layouts_text(values),
        "",
        plan_report(plans[0], values[0], request),
        "",
        "Assumed",
        *(f"- {text}" for text in assumptions(machine)),
    ]
    return "\n".join(rows)
