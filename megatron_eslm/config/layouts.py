"""Supported combinations of parallel sizes, ZeRO stages and CPU offload: one table.

`--help-layouts` and docs/layouts.md print the table; `resolve()` enforces it before anything is
built.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from megatron_eslm.errors import ConfigError
from megatron_eslm.selection.build import policy_traits
from megatron_eslm.selection.selection_options import SelectionOptions


@dataclass(frozen=True, kw_only=True)
class LayoutRequest:
    """The options of a run that decide whether its layout is supported."""

    tp: int
    """--tensor-model-parallel-size."""
    pp: int
    """--pipeline-model-parallel-size."""
    zero_stage: int
    cpu_offload: bool
    bf16: bool
    fp16: bool
    sequence_parallel: bool
    split: tuple[int, ...] | None
    """--pipeline-split."""
    micro_steps: int
    """Micro-steps per optimizer step."""
    early_exit: int
    """Blocks before the early exit that scores sequences; 0 without one."""
    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    ffn_hidden_size: int
    seq_length: int
    needs_gradients: bool
    """Whether --selection uses gradients of single sequences."""
    compiles: bool
    """--compile, given; whether it is the default depends on the device."""
    drops_out: bool
    """Whether dropout is on."""
    trains_adapters: bool
    """--lora-rank."""
    last_mlp_kept: bool
    """--last-mlp-backward kept."""


@dataclass(frozen=True, kw_only=True)
class Combination:
    """A row of the table: options that can be combined."""

    pipeline: bool
    """Whether the row is for runs with more than one pipeline stage."""
    zero_stages: tuple[int, ...]
    offload_stages: tuple[int, ...]
    """ZeRO stages that can keep optimizer state in CPU memory."""
    files: tuple[str, ...]
    """Matching files in ds_configs/."""


COMBINATIONS = (
    Combination(
        pipeline=False,
        zero_stages=(0, 1, 2, 3),
        offload_stages=(1, 2, 3),
        files=("zero{0,1,2,3}.json", "zero{1,2,3}_offload.json"),
    ),
    # DeepSpeed's pipeline engine keeps full gradients until the last micro-step; ZeRO 2 and 3 would
    # have sharded them by then. With offload in bf16 the copies of the tied embedding diverge, as
    # with fp16 (see _half).
    Combination(
        pipeline=True,
        zero_stages=(0, 1),
        offload_stages=(1,),
        files=(
            "pipeline_zero0.json",
            "pipeline_zero1_bf16.json",
            "zero1.json",
            "zero1_offload.json",
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A condition across flags."""

    flag: str
    holds_if: str
    """Condition that the flag requires, for the table."""
    refusal: Callable[[LayoutRequest], str | None]
    """Why a run is refused, with flags, values and remedy; None if it is not."""


def check_layout_rules(asked: LayoutRequest) -> None:
    """Raise ConfigError for the first row or rule that a run violates."""
    refusals = [_refused_by_combinations(asked), *(rule.refusal(asked) for rule in RULES)]
    for refusal in filter(None, refusals):
        raise ConfigError(refusal)


def layout_warnings(asked: LayoutRequest) -> list[str]:
    """Warnings about layouts that train, but inefficiently."""
    if asked.micro_steps < asked.pp:
        idle = (asked.pp - 1) / (asked.micro_steps + asked.pp - 1)
        return [
            f"--pipeline-model-parallel-size {asked.pp} with {asked.micro_steps} micro-steps per "
            f"optimizer step leaves every stage idle for {idle:.0%} of the time. Raise "
            "--global-batch-size, or use fewer stages."
        ]
    return []


def early_exit_layers(selection: SelectionOptions) -> int:
    """Blocks before the early exit; 0 if the policy has none."""
    return policy_traits(selection).early_exit_blocks


def layout_table() -> str:
    """Render the table as markdown that also reads well in a terminal."""
    rows = [
        (
            "2 or more" if row.pipeline else "1",
            "any",
            "any",
            ", ".join(map(str, row.zero_stages)),
            ("ZeRO " + ", ".join(map(str, row.offload_stages))) if row.offload_stages else "no",
            ", ".join(row.files),
        )
        for row in COMBINATIONS
    ]
    head = ("pipeline", "tensor", "data", "ZeRO", "CPU offload", "ds_configs/")
    rules = [(rule.flag, rule.holds_if) for rule in RULES]
    return "\n\n".join((_markdown(head, rows), _markdown(("with", "must hold"), rules)))


def _markdown(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    cells = [[c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _refused_by_combinations(asked: LayoutRequest) -> str | None:
    row = next(row for row in COMBINATIONS if row.pipeline == (asked.pp > 1))
    stage = asked.zero_stage
    if stage not in row.zero_stages:
        return (
            f"--zero-stage {stage} needs --pipeline-model-parallel-size 1, but this run has "
            f"{asked.pp}; use --zero-stage {row.zero_stages[-1]} with a pipeline."
        )
    if not asked.cpu_offload or stage in row.offload_stages:
        return None
    return (
        f"--cpu-offload keeps ZeRO's partitions in CPU memory, but --zero-stage {stage} has none. "
        f"Use --zero-stage {_one_of(row.offload_stages)}."
    )


def _one_of(values: Iterable[int]) -> str:
    *some, last = map(str, values)
    return f"{', '.join(some)} or {last}" if some else last


def _tensor(asked: LayoutRequest) -> str | None:
    common = math.gcd(asked.num_query_groups, asked.ffn_hidden_size)
    fitting = _one_of(n for n in range(1, common + 1) if common % n == 0)
    for flag, value in (
        ("--num-attention-heads", asked.num_attention_heads),
        ("--num-query-groups", asked.num_query_groups),
        ("--ffn-hidden-size", asked.ffn_hidden_size),
    ):
        if value % asked.tp:
            return (
                f"{flag} {value} is not a multiple of --tensor-model-parallel-size {asked.tp}. For "
                f"this model it can be {fitting}; or change {flag}."
            )
    return None


def _sequence(asked: LayoutRequest) -> str | None:
    if not asked.sequence_parallel:
        return None
    if asked.tp == 1:
        return (
            "--sequence-parallel shards positions over tensor-parallel ranks, but "
            "--tensor-model-parallel-size is 1. Raise it, or leave out --sequence-parallel."
        )
    if asked.seq_length % asked.tp:
        return (
            f"--sequence-parallel needs --seq-length {asked.seq_length} to be a multiple of "
            f"--tensor-model-parallel-size {asked.tp}; change one of them, or leave out "
            "--sequence-parallel."
        )
    return None


def _depth(asked: LayoutRequest) -> str | None:
    if asked.num_layers < asked.pp:
        return (
            f"--pipeline-model-parallel-size {asked.pp} needs one block per stage, but "
            f"--num-layers is {asked.num_layers}; use at most {asked.num_layers} stages."
        )
    first = asked.num_layers - asked.pp + 1
    if asked.pp > 1 and asked.early_exit > first:
        return (
            f"--eslm-proxy-layers {asked.early_exit} must lie in the first stage, which has at "
            f"most {first} of --num-layers {asked.num_layers} blocks when "
            f"--pipeline-model-parallel-size is {asked.pp}. Lower one of the two."
        )
    return None


def _half(asked: LayoutRequest) -> str | None:
    # DeepSpeed's half-precision optimizers without ZeRO accumulate gradients in 16 bits, run one
    # extra step before the first, and count gradients of parameters that tensor-parallel ranks
    # replicate once per rank.
    if (asked.bf16 or asked.fp16) and asked.zero_stage == 0:
        return (
            f"--{'bf16' if asked.bf16 else 'fp16'} needs ZeRO, but --zero-stage is 0; use "
            "--zero-stage 1, which on one rank costs nothing."
        )
    return None


def _fp16(asked: LayoutRequest) -> str | None:
    # Untested: it needs a GPU, and loss scaling interacts with the sum of the tied gradients.
    if asked.fp16 and asked.pp > 1:
        return (
            f"--fp16 needs --pipeline-model-parallel-size 1, but this run has {asked.pp}; use "
            "--bf16 with a pipeline."
        )
    return None


def _split(asked: LayoutRequest) -> str | None:
    if asked.split is None:
        return None
    given = f"--pipeline-split {','.join(map(str, asked.split))}"
    if len(asked.split) != asked.pp:
        return (
            f"{given} names {len(asked.split)} stages, but --pipeline-model-parallel-size is "
            f"{asked.pp}; give one number per stage, or leave out --pipeline-split."
        )
    if sum(asked.split) != asked.num_layers:
        return (
            f"{given} has {sum(asked.split)} blocks, but --num-layers is {asked.num_layers}; make "
            "them equal."
        )
    if asked.early_exit > asked.split[0]:
        return (
            f"{given} gives the first stage {asked.split[0]} blocks, but --eslm-proxy-layers "
            f"{asked.early_exit} must lie in it. Give it more, or lower --eslm-proxy-layers."
        )
    return None


def _greats(asked: LayoutRequest) -> str | None:
    # Gradient products need unsharded layers and the activations of full sequences on one rank.
    if not asked.needs_gradients:
        return None
    for flag, value in (
        ("--tensor-model-parallel-size", asked.tp),
        ("--pipeline-model-parallel-size", asked.pp),
    ):
        if value > 1:
            return (
                f"--selection greats computes inner products of full gradients on each rank, but "
                f"{flag} is {value}. Set it to 1; greats supports data parallelism with ZeRO 0 or "
                "1."
            )
    if asked.zero_stage > 1:
        return (
            f"--selection greats computes inner products of full gradients on each rank, but "
            f"--zero-stage is {asked.zero_stage}; use --zero-stage 0 or 1."
        )
    return None


def why_eager(asked: LayoutRequest) -> tuple[str, str] | None:
    """Why the blocks of a run cannot be compiled, and what would let them be; None if they can."""
    if asked.zero_stage == 3:
        return (
            "--zero-stage 3: the engine gathers weights layer by layer in hooks, which compiled "
            "blocks would not call",
            "Use --zero-stage 2 or less",
        )
    if asked.drops_out:
        return (
            "--hidden-dropout or --attention-dropout: each row draws its own dropout mask, which "
            "would recompile the blocks again and again",
            "Set both to 0",
        )
    return None


def _compile(asked: LayoutRequest) -> str | None:
    found = why_eager(asked) if asked.compiles else None
    if found is None:
        return None
    reason, remedy = found
    return f"--compile with {reason}. {remedy}, or leave out --compile."


def _last_mlp(asked: LayoutRequest) -> str | None:
    if not asked.last_mlp_kept:
        return None
    for reason, holds in {
        "--sequence-parallel shards that MLP's positions": asked.sequence_parallel,
        "--zero-stage 3 gathers weights layer by layer": asked.zero_stage == 3,
        "--lora-rank trains adapters there": asked.trains_adapters,
    }.items():
        if holds:
            return f"--last-mlp-backward kept: {reason}. Leave one of them out."
    return None


RULES = (
    Rule(
        flag="--tensor-model-parallel-size T",
        holds_if="--num-attention-heads and --ffn-hidden-size are multiples of T",
        refusal=_tensor,
    ),
    Rule(
        flag="--sequence-parallel",
        holds_if="T is above 1 and --seq-length a multiple of T",
        refusal=_sequence,
    ),
    Rule(
        flag="--pipeline-model-parallel-size P",
        holds_if="every stage has a block, and the first one --eslm-proxy-layers if it scores",
        refusal=_depth,
    ),
    Rule(flag="--bf16, --fp16", holds_if="the ZeRO stage is 1 or more", refusal=_half),
    Rule(flag="--fp16", holds_if="P is 1", refusal=_fp16),
    Rule(
        flag="--pipeline-split",
        holds_if="P numbers, --num-layers in all, --eslm-proxy-layers in the first if it scores",
        refusal=_split,
    ),
    Rule(
        flag="--selection greats",
        holds_if="T and P are 1 and the ZeRO stage is 0 or 1",
        refusal=_greats,
    ),
    Rule(
        flag="--compile",
        holds_if="the ZeRO stage is 2 or less, and there is no dropout",
        refusal=_compile,
    ),
    Rule(
        flag="--last-mlp-backward kept",
        holds_if="the ZeRO stage is 2 or less, without --sequence-parallel and --lora-rank",
        refusal=_last_mlp,
    ),
)
