"""The tables of docs/scaling.md: predictions over numbers of devices, in markdown."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from megatron_eslm.errors import ConfigError
from megatron_eslm.ops.keep_rule import num_to_keep
from megatron_eslm.planning.cost import step_cost
from megatron_eslm.planning.exchanges import Exchange, Group
from megatron_eslm.planning.hardware import Machine
from megatron_eslm.planning.imbalance import expected_largest, expected_moves
from megatron_eslm.planning.published import PUBLISHED, predicted
from megatron_eslm.planning.report import plans_values
from megatron_eslm.planning.request import Layout, Request
from megatron_eslm.planning.search import plan_layout, search
from megatron_eslm.planning.setting import rank_work
from megatron_eslm.planning.stage_clock import SELECTION

DEVICES = (1, 8, 32, 64, 128, 256, 512, 1024)
RANKS = (2, 4, 8, 16, 32, 64, 128, 256)
MICRO_BATCHES = (4, 8, 12)
MICRO_STEPS = 8
"""Of an optimizer step, in the tables that are about one layout."""
TOKENS_A_STEP = 4 * 2**20
"""Of the scaling table: the same batch on all numbers of devices."""
HISTOGRAM_BINS = 4096


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, numbers to the right."""
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join(['---:'] * len(head))}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def scaling(request: Request, machine: Machine) -> str:
    """One batch on 1 to 1024 devices: the best layout of each, and what selection does to it."""
    batch = request.global_batch_size or TOKENS_A_STEP // request.size.seq_length
    head = (
        *("GPUs", "TP x PP x DP", "micro-batch x steps", "ZeRO", "GiB", "clm s", "clm MFU"),
        *("eslm s", "eslm / clm", "count", "if ranks were equal", "selection", "sent a GPU, GB"),
    )
    rows = []
    for gpus in DEVICES:
        asked = dataclasses.replace(request, gpus=gpus, global_batch_size=batch)
        try:
            # The layout that is best for plain training: the same for what is compared with it.
            best = search(asked.with_selection("clm"), machine)[0]
        except ConfigError:
            rows.append([str(gpus), "does not fit", *[""] * (len(head) - 2)])
            continue
        plan = plan_layout(asked, best.layout, machine)
        (v,) = plans_values([plan], asked, machine)
        layout = best.layout
        rows.append(
            [
                str(gpus),
                f"{layout.tp} x {layout.pp} x {layout.dp}",
                f"{layout.micro_batch_size} x {v['micro_steps']}",
                f"{layout.zero_stage}" + (", checkpoints" if layout.checkpoint_interval else ""),
                f"{v['memory_bytes'] / 2**30:.1f}",
                f"{v['step_seconds_clm']:.3f}",
                f"{v['mfu_clm']:.1%}",
                f"{v['step_seconds']:.3f}",
                f"{v['ratio_to_clm']:.3f}",
                f"{v['ratio_of_flops']:.3f}",
                f"{v['step_seconds_balanced'] / v['step_seconds_clm']:.3f}",
                f"{v['selection_seconds'] / v['step_seconds']:.2%}",
                f"{sum(v['sent_bytes'].values()) / 1e9:.2f}",
            ]
        )
    return markdown(head, rows)


def imbalance(request: Request, machine: Machine) -> str:
    """Data parallelism alone: rows of the rank with most, and what a step costs in three ways."""
    head = (
        *("rows a rank", "DP", "kept on average", "rows stay: largest", "rows stay / clm"),
        *("dealt: largest", "rows moved", "dealt / clm", "if ranks were equal", "local keeps"),
        "local / clm",
    )
    rows = []
    for micro, dp, layout in _data_parallel(RANKS):
        asked = dataclasses.replace(
            request, gpus=dp, global_batch_size=micro * dp * MICRO_STEPS, scope="global"
        )

        def values(asked: Request, layout: Layout = layout) -> dict[str, Any]:
            (found,) = plans_values([plan_layout(asked, layout, machine)], asked, machine)
            return found

        stay, dealt = (values(dataclasses.replace(asked, balance=b)) for b in (False, True))
        alone = values(dataclasses.replace(asked, scope="local"))
        kept = num_to_keep(micro * dp, request.alpha)
        equal = stay["step_seconds_balanced"] / stay["step_seconds_clm"]
        rows.append(
            [
                str(micro),
                str(dp),
                f"{kept / dp:.2f}",
                f"{expected_largest(kept, micro, dp):.2f}",
                f"{stay['ratio_to_clm']:.3f}",
                str(math.ceil(kept / dp)),
                f"{expected_moves(kept, micro, dp) / kept:.1%}",
                f"{dealt['ratio_to_clm']:.3f}",
                f"{equal:.3f}",
                f"{num_to_keep(micro, request.alpha) / micro:.1%}",
                f"{alone['ratio_to_clm']:.3f}",
            ]
        )
    return markdown(head, rows)


def _data_parallel(ranks: Iterable[int]) -> Iterator[tuple[int, int, Layout]]:
    """(rows a rank, ranks, layout)."""
    for micro in MICRO_BATCHES:
        for dp in ranks:
            yield (
                micro,
                dp,
                Layout(
                    tp=1, pp=1, dp=dp, micro_batch_size=micro, zero_stage=1, checkpoint_interval=0
                ),
            )


def tokens(request: Request, machine: Machine) -> str:
    """Tokens in the loss on the rank that has most: what the head's backward pass waits for."""
    head = [
        *("rows a rank", "DP"),
        *("rows stay: rows, largest / average", "rows stay: tokens, largest / average"),
        *("dealt: rows, largest / average", "dealt: tokens, largest / average"),
    ]
    rows = []
    for micro, dp, layout in _data_parallel(RANKS):
        row = [str(micro), str(dp)]
        for balance in (False, True):
            asked = dataclasses.replace(
                request, gpus=dp, global_batch_size=micro * dp, scope="global", balance=balance
            )
            works = rank_work(plan_layout(asked, layout, machine).cost.setting)
            row.append(f"{works.largest.tokens_deep / works.fair.tokens_deep:.3f}")
            row.append(f"{works.largest.tokens_trained / works.fair.tokens_trained:.3f}")
        rows.append(row)
    return markdown(head, rows)


def thresholds(request: Request, machine: Machine) -> str:
    """What global thresholds and dealing cost in a micro-step, and what a sketch would."""
    length = request.size.seq_length
    head = (
        *("rows a rank", "DP", "scores of tokens", "received a GPU, MB", "gathers ms"),
        *("keep rule ms", "rows sent ms", "dealing ms", "share of a micro-step"),
        *(f"sum of {HISTOGRAM_BINS} counts, ms", "gather in a machine, ms"),
    )
    rows = []
    for micro, dp, layout in _data_parallel((8, 32, 128, 256, 512, 1024)):
        asked = dataclasses.replace(
            request, gpus=dp, global_batch_size=micro * dp * MICRO_STEPS, scope="global"
        )
        cost = step_cost(plan_layout(asked, layout, machine).cost.setting, machine)
        dealing, stage = cost.setting.dealing, cost.stages[0]
        gathers, rule, sent, dealt = (
            stage.forward.get(name, 0.0) + stage.backward.get(name, 0.0) for name in SELECTION
        )
        held = (dealing.largest if dealing else micro) * length
        rows.append(
            [
                str(micro),
                str(dp),
                f"{held * dp:,}",
                f"{4 * held * (dp - 1) / 1e6:.1f}",
                f"{gathers * 1e3:.2f}",
                f"{rule * 1e3:.2f}",
                f"{sent * 1e3:.2f}",
                f"{dealt * 1e3:.2f}",
                f"{cost.selection_seconds / cost.seconds:.1%}",
                f"{_histogram(machine, dp) * 1e3:.2f}",
                f"{_two_levels(machine, dp, held) * 1e3:.2f}",
            ]
        )
    return markdown(head, rows)


def _gather(machine: Machine, group: Group, num_bytes: float) -> float:
    return Exchange(
        kind="selection",
        what="",
        collective="all-gather",
        group=group,
        num_bytes=num_bytes,
        count=1,
        phase="forward",
    ).seconds(machine)


def _histogram(machine: Machine, dp: int) -> float:
    """Counts of scores in bins, summed: the k-th score up to a bin, however many there are."""
    group = Group(size=dp, per_node=min(dp, machine.gpus_per_node))
    counts = Exchange(
        kind="selection",
        what="",
        collective="all-reduce",
        group=group,
        num_bytes=8 * HISTOGRAM_BINS,
        count=1,
        phase="forward",
    )
    return counts.seconds(machine)


def _two_levels(machine: Machine, dp: int, scores: int) -> float:
    """A threshold in each machine: its ranks gather theirs, and nothing leaves it."""
    inside = min(dp, machine.gpus_per_node)
    return _gather(machine, Group(size=inside, per_node=inside), 4.0 * scores * inside)


def published(request: Request, machine: Machine) -> str:
    """What the cost model gives for runs whose throughput others have published, on this GPU."""
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
        raise ConfigError(f"--table published has lines for --gpu {gpus} only; take one of them.")
    return markdown(head, rows)


TABLES: dict[str, Callable[[Request, Machine], str]] = {
    "scaling": scaling,
    "imbalance": imbalance,
    "tokens": tokens,
    "thresholds": thresholds,
    "published": published,
}
