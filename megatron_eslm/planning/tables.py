"""Tables of docs/scaling.md in markdown: predictions by number of devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from megatron_eslm.errors import ConfigError
from megatron_eslm.planning.hardware import Machine
from megatron_eslm.planning.published_throughputs import PUBLISHED, predicted
from megatron_eslm.planning.request import Request
from megatron_eslm.planning.search import Plan, search

DEVICES = (1, 8, 32, 64, 128, 256, 512, 1024)
TOKENS_A_STEP = 4 * 2**20
"""Tokens per step in the scaling table: the same batch for all numbers of devices."""


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Render a table with right-aligned columns."""
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join(['---:'] * len(head))}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def scaling(request: Request, machine: Machine) -> str:
    """Table of the best layouts on 1 to 1024 devices, for plain training and selection."""
    batch = request.global_batch_size or TOKENS_A_STEP // request.size.seq_length
    head = (
        *("GPUs", "clm: TP x PP x DP, micro-batch x steps", "s", "MFU"),
        *("eslm: TP x PP x DP, micro-batch x steps", "s", "dropped", "eslm / clm", "count"),
        "selection",
    )
    rows = []
    for gpus in DEVICES:
        asked = dataclasses.replace(request, gpus=gpus, global_batch_size=batch)
        try:
            plain = search(asked.with_selection("clm"), machine)[0]
            plan = search(asked, machine)[0]
        except ConfigError:
            rows.append([str(gpus), "does not fit", *[""] * (len(head) - 2)])
            continue
        setting, ratio = plan.cost.setting, plan.cost.seconds / plain.cost.seconds
        rows.append(
            [
                str(gpus),
                _layout_text(plain),
                f"{plain.cost.seconds:.3f}",
                f"{plain.cost.mfu:.1%}",
                _layout_text(plan),
                f"{plan.cost.seconds:.3f}",
                f"{1 - setting.work.tokens_deep / setting.work.tokens:.1%}",
                f"{ratio:.3f}",
                f"{setting.model_flops / plain.cost.setting.model_flops:.3f}",
                f"{plan.cost.selection_seconds / plan.cost.seconds:.2%}",
            ]
        )
    return markdown(head, rows)


def _layout_text(plan: Plan) -> str:
    layout, setting = plan.layout, plan.cost.setting
    read, kept = setting.run.step_shape, setting.run.step_shape_trained
    rows = _of(kept.rows, read.rows)
    extra = f", ZeRO {layout.zero_stage}" + (", ckpt" if layout.checkpoint_interval else "")
    steps = _of(kept.micro_steps, read.micro_steps)
    return f"{layout.tp} x {layout.pp} x {layout.dp}, {rows} x {steps}{extra}"


def _of(kept: int, read: int) -> str:
    return f"{kept} of {read}" if kept < read else str(read)


def published(request: Request, machine: Machine) -> str:
    """Table of published throughputs on this GPU beside the cost model's predictions."""
    head = ("model", "GPUs", "sequence", "rows", "published tokens/s a GPU", "predicted", "error")
    rows = []
    for line in PUBLISHED:
        if machine.name.startswith(f"{line.gpu},"):
            found = predicted(line, machine)
            error = found / line.tokens_per_second - 1
            facts = (line.gpus, line.seq_length, line.micro_batch_size)
            tokens_of_both = (f"{line.tokens_per_second:,.0f}", f"{found:,.0f}")
            rows.append([line.model, *map(str, facts), *tokens_of_both, f"{error:+.0%}"])
    if not rows:
        gpus = ", ".join(sorted({line.gpu for line in PUBLISHED}))
        raise ConfigError(f"--table published has rows for --gpu {gpus} only; use one of them.")
    return markdown(head, rows)


TABLES: dict[str, Callable[[Request, Machine], str]] = {
    "scaling": scaling,
    "published": published,
}
