"""`--dry-run`: report what a run will read, store and compute, without training."""

from __future__ import annotations

import copy
import dataclasses
from typing import NamedTuple

from megatron_eslm.checkpoint.train_state import TrainState
from megatron_eslm.config.run import RunConfig
from megatron_eslm.cost.budget import is_complete
from megatron_eslm.cost.flops import FlopsModel
from megatron_eslm.cost.memory import copy_bytes, estimate_memory
from megatron_eslm.cost.of_run import build_flops, step_work
from megatron_eslm.cost.stages import plan_stages, plan_text
from megatron_eslm.data.plan import (
    MixtureReport,
)
from megatron_eslm.errors import ConfigError
from megatron_eslm.frozen.reference import find_run_reference
from megatron_eslm.frozen.teacher import find_teacher
from megatron_eslm.model.arithmetic import adapter_params, num_params
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.parallel.collectives import on_rank_zero
from megatron_eslm.selection.alpha import AlphaController
from megatron_eslm.selection.state import SelectionState
from megatron_eslm.training.build_objective import (
    teacher_shape,
)
from megatron_eslm.training.header import batch_text, layout_text, machine_text
from megatron_eslm.training.method import method_text
from megatron_eslm.training.reading_plan import ReadingPlan
from megatron_eslm.training.run_data import (
    check_reading,
    find_reading,
    open_run_data,
    open_stored_losses,
    plan_run,
)


def dry_run(run: RunConfig) -> tuple[str, ConfigError | None]:
    """Return the text of `--dry-run`, and the error if training would be refused, else None.

    A run refused for reading too much still gets its report, which says what it reads.
    """
    source, options = open_run_data(run)
    _, start, reading = find_reading(run, source)
    report = plan_run(run, source, reading)
    shape = run.shape(source.tokenizer.vocab_size)
    open_stored_losses(run, source)
    reference = on_rank_zero(lambda: find_run_reference(run, shape, source.tokenizer))
    state = SelectionState(alpha=run.selection.initial_alpha)
    named = run.objective.distill_teacher is not None
    teacher = on_rank_zero(lambda: find_teacher(run, shape, source.tokenizer)) if named else None
    flops = build_flops(
        run,
        shape,
        state,
        teacher_shape(run, shape, teacher),
        None if reference is None else reference.shape,
    )
    text = dry_run_text(run, shape, flops, report, reading, start)
    try:
        check_reading(run, options, reading, report)
    except ConfigError as error:
        return text, error
    return text, None


class _Totals(NamedTuple):
    """Sums over all steps to --train-iters or --train-flops."""

    steps: int
    tokens: int
    """Positions read."""
    executed: float
    """FLOPs."""
    by_paper: float
    """FLOPs."""
    trained: int
    """Tokens in the loss."""


def _totals(run: RunConfig, flops: FlopsModel, reading: ReadingPlan, start: TrainState) -> _Totals:
    """Sum over all steps.

    Steps before the start are known. Alpha follows the configured start, warm-up and schedule;
    ADA-ESLM's changes, and a reference that is overtaken, cannot be predicted and are ignored.
    SALT's later steps have no teacher.
    """
    steps, position = run.training.train_iters, reading.begin
    taught = min(steps, run.objective.salt_iters) if run.objective.distill == "salt" else steps
    state = copy.deepcopy(start.selection)
    controller = AlphaController(run.selection, state, steps)
    costs: dict[tuple[float, bool, int], tuple[float, float, int]] = {}
    executed, by_paper, trained = start.flops, start.flops_paper, start.tokens_trained
    tokens, iteration = start.tokens, start.iteration
    while not is_complete(run, iteration, by_paper):
        controller.begin_step(iteration)
        batch_size = reading.batch_size(position)
        kind = (state.alpha, iteration < taught, batch_size)
        if kind not in costs:
            costs[kind] = _cost(run, flops, *kind)
        of_step = costs[kind]
        executed, by_paper = executed + of_step[0], by_paper + of_step[1]
        trained += of_step[2]
        tokens += batch_size * run.model.seq_length
        position = reading.skipped.after(position, batch_size)
        iteration += 1
    return _Totals(iteration, tokens, executed, by_paper, trained)


def _cost(
    run: RunConfig, flops: FlopsModel, alpha: float, has_teacher: bool, batch_size: int
) -> tuple[float, float, int]:
    """FLOPs executed, FLOPs by the paper and tokens trained on of one step."""
    work = step_work(run, alpha, batch_size)
    ledgers = flops if has_teacher else dataclasses.replace(flops, teacher=None)
    if not alpha:  # the reference model does not run
        ledgers = dataclasses.replace(ledgers, reference=None)
    return ledgers.executed(work), ledgers.paper_flops(work), work.tokens_trained


def _reading(run: RunConfig, reading: ReadingPlan, start: TrainState) -> list[str]:
    """Lines about what is read per step and in total."""
    t = run.training
    done = f" ({start.iteration:,} of them done)" if start.iteration else ""
    lines = [
        f"steps                {t.train_iters:,}{done}",
        f"batch                {batch_text(run)}",
    ]
    if t.rampup_batch_size:
        first, increment, samples = t.rampup_batch_size
        lines.append(
            f"ramp                 from {first} sequences in increments of {increment} over "
            f"{samples:,} samples"
        )
    if start.iteration:
        lines.append(f"reading continues    with sample {reading.begin:,}")
    if reading.skipped.ranges:
        count = reading.skipped.between(0, reading.end)
        lines.append(f"skipped              {count:,} samples ({reading.skipped})")
    return lines


def dry_run_text(
    run: RunConfig,
    shape: ModelShape,
    flops: FlopsModel,
    mixture: MixtureReport,
    reading: ReadingPlan,
    start: TrainState,
) -> str:
    """Render the report of `--dry-run`, one item per line.

    Args:
        run: the run.
        shape: the model's shape.
        flops: FLOPs model of the run.
        mixture: what the run reads of each domain.
        reading: what the run has left to read.
        start: state at which the run starts or continues.
    """
    t = run.training
    work = step_work(run)
    plan = plan_stages(run, shape, flops, work)
    memory = estimate_memory(run, shape, plan, flops)
    total = _totals(run, flops, reading, start)
    gib = 2.0**30
    micro_batches = total.tokens / (t.micro_batch_size * run.model.seq_length)  # of all ranks
    lines = [
        *_reading(run, reading, start),
        *(
            [f"ends early           after step {total.steps:,}, by --train-flops {t.train_flops:g}"]
            if total.steps < t.train_iters
            else []
        ),
        f"method               {method_text(run.selection, run.objective.distill)}",
        f"computes in          {machine_text(run)}",
        f"layout               {layout_text(run)}",
        f"tokens read          {total.tokens:,}",
        f"tokens trained on    {total.trained:,} ({total.trained / total.tokens:.1%})",
        f"parameters           {num_params(shape):,} (vocabulary {shape.vocab_size:,} padded to "
        f"{shape.padded_vocab_size:,})",
        *(
            [f"trained              {adapter_params(shape, shape.num_layers, rank):,} (adapters)"]
            if (rank := run.model.lora_rank)
            else []
        ),
        f"FLOPs executed       {total.executed:.3e} ({total.executed / total.steps:.3e} per step)",
        f"FLOPs by the paper   {total.by_paper:.3e} ({total.by_paper / total.steps:.3e} per step, "
        f"{total.by_paper / micro_batches:.3e} per micro-batch)",
        f"memory per rank      {memory.total / gib:.2f} GiB = weights {memory.weights / gib:.2f} + "
        f"gradients {memory.gradients / gib:.2f} + optimizer {memory.optimizer / gib:.2f} + "
        f"activations {memory.activations / gib:.2f} + head {memory.head / gib:.2f}"
        + "".join(
            f" + {name} {part / gib:.2f}"
            for name in ("alignment", "teacher", "reference", "buckets")
            if (part := getattr(memory, name))
        )
        + (f" (stage {memory.stage}, which needs most)" if plan.num_stages > 1 else ""),
    ]
    if run.checkpoint.save is not None and run.checkpoint.async_save:
        copies = copy_bytes(run, shape, plan) / gib
        lines.append(
            f"host memory          {copies:.2f} GiB per rank for copies of what is saved "
            "(--async-save)"
        )
    if plan.num_stages > 1:
        steps = run.step_shape_trained.micro_steps
        idle = (plan.num_stages - 1) / (steps + plan.num_stages - 1)
        lines.append(f"pipeline             each stage idle for {idle:.1%} of a step at best")
        lines.append(plan_text(plan))
    for domain in mixture.domains:
        lines.append(
            f"domain {domain.name:<13s} weight {domain.weight:.4f}, "
            f"{domain.documents['train']:,} documents, {domain.tokens['train']:,} tokens, "
            f"{domain.epochs:.3f} epochs"
        )
    for split, name, samples in (
        ("valid", "validation", mixture.valid_samples),
        ("test", "test", mixture.test_samples),
    ):
        if samples or split == "valid":
            of = [domain.name for domain in mixture.by_split.get(split, ())]
            apart = f" of {', '.join(of)}" if samples and mixture.has_files_apart else ""
            lines.append(f"{name:<20s} {samples:,} sequences per evaluation{apart}")
    return "\n".join(lines)
