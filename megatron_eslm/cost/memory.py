"""Estimate the device memory of a run, for `--dry-run` and the planner."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from megatron_eslm.config.run import RunConfig
from megatron_eslm.cost.flops import FlopsModel
from megatron_eslm.cost.stages import StagePlan, copied_params
from megatron_eslm.model.arithmetic import adapter_params, linear_params, saved_widths, stage_params
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.ops.head.cross_entropy import LEAST_COLUMNS
from megatron_eslm.ops.head.statistics import CHUNK_BYTES


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on one rank."""

    stage: int
    """The rank's pipeline stage."""
    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    alignment: float = 0.0
    """Memory of GREATS' selection pass beyond activations and head, which do not exist at the same
    time."""
    teacher: float = 0.0
    reference: float = 0.0
    buckets: float = 0.0
    """DeepSpeed's buffers for reducing gradients as they come (ZeRO 2 and 3)."""

    @property
    def total(self) -> float:
        """Sum of all parts."""
        own = self.weights + self.gradients + self.optimizer + self.activations + self.head
        return own + self.alignment + self.teacher + self.reference + self.buckets


def estimate_memory(
    run: RunConfig, shape: ModelShape, plan: StagePlan, flops: FlopsModel
) -> MemoryEstimate:
    """Estimate device memory per rank, for the stage that needs most.

    Excludes the allocator's overhead and buffers of collectives. Activations assume a rank that
    keeps all of its rows, as one of several data-parallel ranks may.

    Args:
        run: the run.
        shape: the model's shape.
        plan: the pipeline stages.
        flops: gives frozen models and extra passes.
    """
    ranks = [_estimate_stage(run, shape, plan, stage) for stage in range(plan.num_stages)]
    if flops.reference is not None:
        reference = _frozen_bytes(run, flops.reference, run.dtype.itemsize)
        of_sequences, _ = flops.reference_scores
        for stage in range(0 if of_sequences else plan.num_stages - 1, plan.num_stages):
            ranks[stage] = dataclasses.replace(ranks[stage], reference=reference)
    last = ranks[-1]
    if flops.teacher is not None:
        element = 2 if run.objective.distill_teacher_dtype == "bf16" else 4
        last = dataclasses.replace(last, teacher=_frozen_bytes(run, flops.teacher.shape, element))
    if flops.alignment_rows is not None:
        excess = alignment_bytes(run, shape, flops.alignment_rows) - last.activations - last.head
        last = dataclasses.replace(last, alignment=max(0.0, excess))
    ranks[-1] = last
    return max(ranks, key=lambda rank: rank.total)


def copy_bytes(run: RunConfig, shape: ModelShape, plan: StagePlan) -> float:
    """Bytes of host memory in which the fullest rank copies what it saves (--async-save).

    Weights and both moments in float32, each written by one rank; of frozen weights, the weights.
    Whole parameters are dealt out, so no rank has less than its largest.
    """
    tp = run.engine.tensor_model_parallel_size
    embedding = shape.padded_vocab_size * shape.hidden_size / tp
    most = 0.0
    for stage, blocks in enumerate(plan.num_blocks):
        # Tied, the last stage's copy of the embedding is not saved, and its norm hardly counts.
        head = not shape.tied_head and stage == plan.num_stages - 1
        saved = stage_params(shape, blocks, first=stage == 0, last=head, tp=tp)
        largest = embedding if stage == 0 or head else 0.0
        if rank := run.model.lora_rank:
            size = 4.0 * saved + 12.0 * adapter_params(shape, blocks, rank, tp)
            most = max(most, size / run.dp_size, 4.0 * largest)
        else:
            most = max(most, 12.0 * saved / run.dp_size, 12.0 * largest)
    return most


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
    zero, dp = run.engine.zero_stage, run.dp_size
    # DeepSpeed's pipeline in bf16 shards the optimizer even in ZeRO stage 0.
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
        buckets=_bucket_bytes(run),
    )


def _bucket_bytes(run: RunConfig) -> float:
    zero = run.deepspeed["zero_optimization"]
    if zero["stage"] < 2:
        return 0.0
    # With overlap one is filled while another is sent; the default of stage 3.
    buffers = 2 if zero.get("overlap_comm", zero["stage"] == 3) else 1
    return float(buffers * zero["reduce_bucket_size"] * run.dtype.itemsize)


def block_activations(run: RunConfig, shape: ModelShape) -> float:
    """Bytes that a block keeps for its backward pass, per micro-batch of one rank."""
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
    """Bytes that a block keeps for its backward pass, per position.

    Counts inputs and outputs of both norms, replicated on tensor-parallel ranks unless sequence
    parallel; the linear layers' wide sides, sharded by columns (arithmetic.saved_widths);
    activations between the factors of adapters; dropout masks; and in float32 the norms' statistics
    and the attention's log-sum-exp.
    """
    tp = run.engine.tensor_model_parallel_size
    tp_residual = tp if run.engine.sequence_parallel else 1
    d, heads, length = shape.hidden_size, shape.num_attention_heads, run.model.seq_length
    residual, sharded = saved_widths(shape)
    values = residual / tp_residual + sharded / tp
    values += 2 * run.model.lora_rank * (1 + 1 / tp_residual)  # between the factors of adapters
    float32 = 4 / tp_residual
    if hidden_dropout:
        values += 2 * d
    if attention_dropout:
        # Without the fused kernel: the weights, their mask, and the product of both.
        values += 3 * heads / tp * length
    else:
        float32 += heads / tp
    return values * run.dtype.itemsize + float32 * 4


def _stage_activations(run: RunConfig, shape: ModelShape, plan: StagePlan, stage: int) -> float:
    tp_residual = run.engine.tensor_model_parallel_size if run.engine.sequence_parallel else 1
    hidden = _tokens(run) * shape.hidden_size * run.dtype.itemsize / tp_residual
    block = block_activations(run, shape)
    # 1F1B: before its first backward pass, a stage starts one micro-step for itself and one per
    # stage after it. Its received and sent activations are kept as long.
    in_flight = min(plan.num_stages - stage, run.gradient_accumulation_steps)
    mask = _tokens(run) * run.model.seq_length if run.data.reset_attention_mask else 0
    ends = (stage > 0) + (stage < plan.num_stages - 1)
    blocks, interval = plan.num_blocks[stage], run.model.activation_checkpoint_interval
    if interval == 0:
        return in_flight * (blocks * block + ends * hidden + mask)
    # Groups of recomputed blocks do not cross the selector.
    before = plan.early_exit if stage == 0 else 0
    groups = math.ceil(before / interval) + math.ceil((blocks - before) / interval)
    return in_flight * ((groups + ends) * hidden + mask) + min(interval, blocks) * block


def _head_bytes(run: RunConfig, shape: ModelShape, *, early_exit: bool, last: bool) -> float:
    """Bytes of the head on the last stage, or of the early exit's head on other stages."""
    tokens, element = _tokens(run), run.dtype.itemsize
    vocab = shape.padded_vocab_size / run.engine.tensor_model_parallel_size
    if last:
        logits = tokens * vocab * element if run.keeps_logits(shape) else 0.0
        hidden = 3 * tokens * shape.hidden_size * element  # normed, its gradient, and before
        # The gradient accumulates in float32 only if the tokens do not fit into one block.
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
    """Bytes of weights, plus activations of one block in a forward pass without gradient."""
    tp, tokens = run.engine.tensor_model_parallel_size, _tokens(run)
    weights = stage_params(shape, shape.num_layers, first=True, last=True, tp=tp)
    hidden = 3 * shape.hidden_size + 2 * linear_params(shape, "mlp.up") / shape.hidden_size / tp
    logits = _chunks(tokens * shape.padded_vocab_size / tp)
    return element * (weights + tokens * hidden) + logits


def alignment_bytes(run: RunConfig, shape: ModelShape, rows: tuple[int, int]) -> float:
    """Bytes at the peak of GREATS' selection pass, at the head.

    Counts activations of all blocks (without dropout or activation checkpointing); the head's
    input before and after the norm and its gradient; the candidates' gradients at the logits; the
    validation rows' gradient of the head in float32; chunks.

    Args:
        run: the run.
        shape: the model's shape.
        rows: candidates and validation rows of one rank.
    """
    length, vocab, element = run.model.seq_length, shape.padded_vocab_size, run.dtype.itemsize
    blocks = shape.num_layers * _activations_of_token(run, shape) + 3 * shape.hidden_size * element
    logits = rows[0] * length * vocab * element
    gradient = torch.float32.itemsize * vocab * shape.hidden_size
    return sum(rows) * length * blocks + logits + gradient + _chunks(length * vocab)


def _chunks(num_logits: float) -> float:
    """Bytes of two transient float32 blocks of logits."""
    return 2 * min(float(CHUNK_BYTES), torch.float32.itemsize * num_logits)


def _tokens(run: RunConfig) -> int:
    """Positions per micro-batch of one rank."""
    return run.training.micro_batch_size * run.model.seq_length
