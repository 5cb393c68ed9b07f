"""`--dry-run`: what a run will read, hold and compute, before any of it happens."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import Counter
from dataclasses import dataclass

import torch

from megatron_eslm.config.run import RunConfig
from megatron_eslm.data.plan import MixtureReport
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.ops.head_statistics import CHUNK_BYTES
from megatron_eslm.ops.keep_rule import StepShape, num_to_keep
from megatron_eslm.ops.selective_linear_cross_entropy import LEAST_COLUMNS
from megatron_eslm.selection.alpha import AlphaController
from megatron_eslm.selection.policy import build_policy
from megatron_eslm.selection.state import Peers, SelectionState
from megatron_eslm.training.flops import FlopsModel, Work
from megatron_eslm.training.header import batch_text, layout_text, machine_text
from megatron_eslm.training.method import method_text
from megatron_eslm.training.reading_plan import ReadingPlan
from megatron_eslm.training.stages import (
    StagePlan,
    adapter_params,
    copied_params,
    plan_stages,
    plan_text,
    stage_params,
)
from megatron_eslm.training.state import TrainState


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on one rank."""

    stage: int
    """The pipeline stage that the rank is in."""
    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    alignment: float = 0.0
    """What the pass by which GREATS chooses holds beyond activations and head: neither is there at
    the same time."""
    teacher: float = 0.0
    reference: float = 0.0

    @property
    def total(self) -> float:
        """Sum of all parts."""
        own = self.weights + self.gradients + self.optimizer + self.activations + self.head
        return own + self.alignment + self.teacher + self.reference


def estimate_memory(
    run: RunConfig, shape: ModelShape, plan: StagePlan, flops: FlopsModel
) -> MemoryEstimate:
    """Device memory of a rank of the stage that needs most, from what each part stores.

    Neither the allocator's overhead nor buffers of collectives are in it. Activations are those of
    a rank that keeps all of its rows, as one of several data-parallel ranks may.

    Args:
        run: the run.
        shape: of the model.
        plan: its stages.
        flops: says which frozen models and passes there are besides.
    """
    ranks = [_estimate_stage(run, shape, plan, stage) for stage in range(plan.num_stages)]
    last = ranks[-1]
    if flops.teacher is not None:
        element = 2 if run.objective.distill_teacher_dtype == "bf16" else 4
        last = dataclasses.replace(last, teacher=_frozen_bytes(run, flops.teacher.shape, element))
    if flops.reference is not None:
        reference = _frozen_bytes(run, flops.reference, run.dtype.itemsize)
        last = dataclasses.replace(last, reference=reference)
    if flops.alignment_rows is not None:
        excess = alignment_bytes(run, shape, flops.alignment_rows) - last.activations - last.head
        last = dataclasses.replace(last, alignment=max(0.0, excess))
    ranks[-1] = last
    return max(ranks, key=lambda rank: rank.total)


def _estimate_stage(
    run: RunConfig, shape: ModelShape, plan: StagePlan, stage: int
) -> MemoryEstimate:
    first, last = stage == 0, stage == plan.num_stages - 1
    tp, element = run.engine.tensor_model_parallel_size, run.dtype.itemsize
    n = trained = float(stage_params(shape, plan.num_blocks[stage], first=first, last=last, tp=tp))
    if rank := run.model.lora_rank:
        trained = float(adapter_params(shape, plan.num_blocks[stage], rank, tp))
        n += trained
    copies = copied_params(shape, plan, stage, run.model.lora_rank, tp)
    zero, dp = run.engine.zero_stage or 0, run.dp_size
    # DeepSpeed's pipeline in bf16 spreads the optimizer even in stage 0.
    spreads = zero >= 1 or (plan.num_stages > 1 and run.engine.bf16)
    master = 4 if element == 2 or spreads else 0
    optimizer = trained * (8 + master) / (dp if spreads else 1)
    gradient_element = 4 if element == 2 and zero >= 1 else element
    return MemoryEstimate(
        stage=stage,
        weights=n * element / (dp if zero == 3 else 1) + copies * element,
        gradients=trained * gradient_element / (dp if zero >= 2 else 1),
        optimizer=0.0 if run.engine.cpu_offload else optimizer,
        activations=_stage_activations(run, shape, plan, stage),
        head=_head_bytes(run, shape, early_exit=plan.early_exit > 0, last=last),
    )


def block_activations(run: RunConfig, shape: ModelShape) -> float:
    """Bytes that a block keeps for its backward pass over one micro-batch of one rank."""
    model = run.model
    return _tokens(run) * _activations_of_token(
        run, shape, hidden_dropout=model.hidden_dropout, attention_dropout=model.attention_dropout
    )


def _activations_of_token(
    run: RunConfig,
    shape: ModelShape,
    *,
    hidden_dropout: float = 0.0,
    attention_dropout: float = 0.0,
) -> float:
    """Bytes that a block keeps for its backward pass, a position.

    Inputs and outputs of both norms, which all tensor-parallel ranks hold unless sequence parallel;
    qkv, attention output and the MLP's two wide tensors, of which each rank holds its columns;
    what is between the factors of adapters; dropout masks; in float32 the norms' statistics and the
    attention's log-sum-exp.
    """
    tp = run.engine.tensor_model_parallel_size
    tp_residual = tp if run.engine.sequence_parallel else 1
    d, heads, length = shape.hidden_size, shape.num_attention_heads, run.model.seq_length
    assert length
    values = 4 * d / tp_residual + (4 * d + 2 * shape.ffn_hidden_size) / tp
    values += 2 * run.model.lora_rank * (1 + 1 / tp_residual)  # between the factors of adapters
    float32 = 4 / tp_residual
    if hidden_dropout:
        values += 2 * d
    if attention_dropout:
        # Without the fused kernel: the weights, their mask, and both together.
        values += 3 * heads / tp * length
    else:
        float32 += heads / tp
    return values * run.dtype.itemsize + float32 * 4


def _stage_activations(run: RunConfig, shape: ModelShape, plan: StagePlan, stage: int) -> float:
    tp_residual = run.engine.tensor_model_parallel_size if run.engine.sequence_parallel else 1
    hidden = _tokens(run) * shape.hidden_size * run.dtype.itemsize / tp_residual
    block = block_activations(run, shape)
    # 1F1B: a stage has begun as many micro-steps as stages come behind it before the first one
    # returns. What it received and what it hands on are kept as long.
    in_flight = min(plan.num_stages - stage, run.gradient_accumulation_steps)
    ends = (stage > 0) + (stage < plan.num_stages - 1)
    blocks, interval = plan.num_blocks[stage], run.model.activation_checkpoint_interval
    if interval == 0:
        return in_flight * (blocks * block + ends * hidden)
    # No group of recomputed blocks reaches over the selector.
    before = plan.early_exit if stage == 0 else 0
    groups = math.ceil(before / interval) + math.ceil((blocks - before) / interval)
    return in_flight * (groups + ends) * hidden + min(interval, blocks) * block


def _head_bytes(run: RunConfig, shape: ModelShape, *, early_exit: bool, last: bool) -> float:
    """What the head holds where it is, or the early exit's where only that is."""
    tokens, element = _tokens(run), run.dtype.itemsize
    vocab = shape.padded_vocab_size / run.engine.tensor_model_parallel_size
    if last:
        logits = tokens * vocab * element if run.keeps_logits(shape) else 0.0
        hidden = 3 * tokens * shape.hidden_size * element  # normed, its gradient, and before
        # Added up in float32 only where its tokens do not fit into one block.
        in_one = tokens * LEAST_COLUMNS * torch.float32.itemsize <= CHUNK_BYTES
        in_one = in_one and run.objective.distill is None
        gradient = (element if in_one else torch.float32.itemsize) * vocab * shape.hidden_size
        if run.model.lora_rank:
            gradient = 0.0  # frozen
        return logits + hidden + gradient + _chunks(tokens * vocab)
    if early_exit:
        scored = tokens / run.selection.eslm_proxy_stride
        return 2 * scored * shape.hidden_size * element + _chunks(scored * vocab)
    return 0.0


def _frozen_bytes(run: RunConfig, shape: ModelShape, element: int) -> float:
    """Weights, and what one block of a forward pass without gradient holds at a time."""
    tp, tokens = run.engine.tensor_model_parallel_size, _tokens(run)
    weights = stage_params(shape, shape.num_layers, first=True, last=True, tp=tp)
    hidden = 3 * shape.hidden_size + 2 * shape.ffn_hidden_size / tp
    logits = _chunks(tokens * shape.padded_vocab_size / tp)
    return element * (weights + tokens * hidden) + logits


def alignment_bytes(run: RunConfig, shape: ModelShape, rows: tuple[int, int]) -> float:
    """What is there where the pass by which GREATS chooses turns back at the head.

    Activations of all blocks, without dropout and whatever checkpoints training has; the head's
    input before and after the norm and its gradient; the candidates' gradients at the logits;
    the validation rows' gradient of the head in float32; chunks.

    Args:
        run: the run.
        shape: of the model.
        rows: candidates and validation rows of one rank.
    """
    assert run.model.seq_length
    length, vocab, element = run.model.seq_length, shape.padded_vocab_size, run.dtype.itemsize
    blocks = shape.num_layers * _activations_of_token(run, shape) + 3 * shape.hidden_size * element
    logits = rows[0] * length * vocab * element
    gradient = torch.float32.itemsize * vocab * shape.hidden_size
    return sum(rows) * length * blocks + logits + gradient + _chunks(length * vocab)


def _chunks(num_logits: float) -> float:
    """Two of the transient float32 blocks in which logits are looked at."""
    return 2 * min(float(CHUNK_BYTES), torch.float32.itemsize * num_logits)


def _tokens(run: RunConfig) -> int:
    """Positions of one micro-batch of one rank."""
    assert run.training.micro_batch_size and run.model.seq_length
    return run.training.micro_batch_size * run.model.seq_length


def step_work(run: RunConfig, alpha: float | None = None, batch_size: int | None = None) -> Work:
    """Work of one step as the keep rule will have it, with nothing masked.

    Args:
        run: the run.
        alpha: of the step; that which the run begins or warms up to where it is left out.
        batch_size: sequences of the step over all ranks; --global-batch-size where it is left out.
    """
    t, s = run.training, run.selection
    assert t.micro_batch_size and run.model.seq_length
    micro_steps = run.gradient_accumulation_steps
    if batch_size is not None:
        micro_steps = batch_size // (t.micro_batch_size * run.dp_size)
    alpha = s.initial_alpha if alpha is None else alpha
    policy = build_policy(s, SelectionState(alpha=alpha), Peers(0, run.dp_size, None), t.seed)
    ranks = 1 if policy.decides_alone else run.dp_size
    rows, steps = t.micro_batch_size * ranks, micro_steps * (run.dp_size // ranks)
    kept, steps_kept = rows, steps
    if policy.selects_per_step:
        shape = StepShape(micro_steps, t.micro_batch_size).kept(alpha)
        kept, steps_kept = shape.rows * ranks, shape.micro_steps
    elif policy.instance_source != "nothing":
        kept = num_to_keep(rows, alpha)
    deep = kept * run.model.seq_length
    # The uncertainty objective has a loss for what selection drops, too.
    all_tokens = policy.token_source == "nothing" or s.selection == "uncertainty"
    trained = deep if all_tokens else num_to_keep(deep, alpha)
    scored = deep if policy.token_source == "head" else trained
    return Work(
        tokens=steps * rows * run.model.seq_length,
        tokens_deep=steps_kept * deep,
        tokens_scored=steps_kept * scored,
        tokens_trained=steps_kept * trained,
    )


def _totals(
    run: RunConfig, flops: FlopsModel, reading: ReadingPlan, start: TrainState
) -> tuple[float, float, int]:
    """Of all steps: FLOPs by both ledgers, and tokens that are trained on.

    What was done before the start is known. Alpha begins and rises as it is told to; where ADA-ESLM
    will move it nobody knows. SALT's later steps have no teacher.
    """
    steps, position = run.training.train_iters, reading.begin
    assert steps
    taught = min(steps, run.objective.salt_iters) if run.objective.distill == "salt" else steps
    state = copy.deepcopy(start.selection)
    controller = AlphaController(run.selection, state)
    kinds = Counter[tuple[float, bool, int]]()
    for iteration in range(start.iteration, steps):
        controller.begin_step(iteration)
        batch_size = reading.batch_size(position)
        kinds[state.alpha, iteration < taught, batch_size] += 1
        position = reading.skipped.after(position, batch_size)
    executed, by_paper, trained = start.flops, start.flops_paper, start.tokens_trained
    for (alpha, has_teacher, batch_size), count in kinds.items():
        work = step_work(run, alpha, batch_size)
        ledgers = flops if has_teacher else dataclasses.replace(flops, teacher=None)
        if not alpha:  # nothing is compared then
            ledgers = dataclasses.replace(ledgers, reference=None)
        executed += count * ledgers.executed(work)
        by_paper += count * ledgers.paper(work)
        trained += count * work.tokens_trained
    return executed, by_paper, trained


def _reading(run: RunConfig, reading: ReadingPlan, start: TrainState) -> list[str]:
    """What is read in a step and in all."""
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
        lines.append(f"reading goes on      with sample {reading.begin:,}")
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
    """The report of `--dry-run`, one fact a line.

    Args:
        run: the run.
        shape: of its model.
        flops: its ledgers.
        mixture: what it reads of each domain.
        reading: what it has still to read.
        start: where it starts or goes on.
    """
    t = run.training
    assert t.train_iters and t.global_batch_size and run.model.seq_length
    work = step_work(run)
    plan = plan_stages(run, shape, flops, work)
    memory = estimate_memory(run, shape, plan, flops)
    executed, by_paper, trained = _totals(run, flops, reading, start)
    gib = 2.0**30
    read = start.tokens + reading.samples_left(reading.begin) * run.model.seq_length
    lines = [
        *_reading(run, reading, start),
        f"method               {method_text(run.selection, run.objective.distill)}",
        f"computes in          {machine_text(run)}",
        f"layout               {layout_text(run)}",
        f"tokens read          {read:,}",
        f"tokens trained on    {trained:,} ({trained / read:.1%})",
        f"parameters           {shape.num_params:,} (vocabulary {shape.vocab_size:,} padded to "
        f"{shape.padded_vocab_size:,})",
        *(
            [f"trained              {adapter_params(shape, shape.num_layers, rank):,} (adapters)"]
            if (rank := run.model.lora_rank)
            else []
        ),
        f"FLOPs executed       {executed:.3e} ({executed / t.train_iters:.3e} a step)",
        f"FLOPs by the paper   {by_paper:.3e} ({by_paper / t.train_iters:.3e} a step)",
        f"memory a rank        {memory.total / gib:.2f} GiB = weights {memory.weights / gib:.2f} + "
        f"gradients {memory.gradients / gib:.2f} + optimizer {memory.optimizer / gib:.2f} + "
        f"activations {memory.activations / gib:.2f} + head {memory.head / gib:.2f}"
        + "".join(
            f" + {name} {part / gib:.2f}"
            for name in ("alignment", "teacher", "reference")
            if (part := getattr(memory, name))
        )
        + (f" (stage {memory.stage}, which needs most)" if plan.num_stages > 1 else ""),
    ]
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
    lines.append(f"validation           {mixture.valid_samples:,} sequences an evaluation")
    return "\n".join(lines)
