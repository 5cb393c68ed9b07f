"""`--dry-run`: what a run will read, hold and compute, before any of it happens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megatron_eslm.config.run import RunConfig
from megatron_eslm.data.plan import MixtureReport
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.ops.head_statistics import CHUNK_BYTES
from megatron_eslm.ops.keep_rule import num_to_keep
from megatron_eslm.training.flops import FlopsModel, Work
from megatron_eslm.training.stages import StagePlan, plan_stages, plan_text, stage_params


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

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.head


def estimate_memory(run: RunConfig, shape: ModelShape, plan: StagePlan) -> MemoryEstimate:
    """Device memory of a rank of the stage that needs most, from what each part stores.

    Neither the allocator's overhead nor buffers of collectives are in it. Activations are those of
    a rank that keeps all of its rows, as one of several data-parallel ranks may.
    """
    ranks = [_estimate_stage(run, shape, plan, stage) for stage in range(plan.num_stages)]
    return max(ranks, key=lambda rank: rank.total)


def _estimate_stage(
    run: RunConfig, shape: ModelShape, plan: StagePlan, stage: int
) -> MemoryEstimate:
    first, last = stage == 0, stage == plan.num_stages - 1
    tp, element = run.engine.tensor_model_parallel_size, run.dtype.itemsize
    n = float(stage_params(shape, plan.num_blocks[stage], first=first, last=last, tp=tp))
    zero, dp = run.engine.zero_stage or 0, run.dp_size
    # DeepSpeed's pipeline in bf16 spreads the optimizer even in stage 0.
    spreads = zero >= 1 or (plan.num_stages > 1 and run.engine.bf16)
    master = 4 if element == 2 or spreads else 0
    optimizer = n * (8 + master) / (dp if spreads else 1)
    gradient_element = 4 if element == 2 and zero >= 1 else element
    return MemoryEstimate(
        stage=stage,
        weights=n * element / (dp if zero == 3 else 1),
        gradients=n * gradient_element / (dp if zero >= 2 else 1),
        optimizer=0.0 if run.engine.cpu_offload else optimizer,
        activations=_stage_activations(run, shape, plan, stage),
        head=_head_bytes(run, shape, early_exit=first and plan.early_exit > 0, last=last),
    )


def block_activations(run: RunConfig, shape: ModelShape) -> float:
    """Bytes that a block keeps for its backward pass over one micro-batch of one rank.

    Inputs and outputs of both norms, which all tensor-parallel ranks hold unless sequence parallel;
    qkv, attention output and the MLP's two wide tensors, of which each rank holds its columns;
    dropout masks; in float32 the norms' statistics and the attention's log-sum-exp.
    """
    tp = run.engine.tensor_model_parallel_size
    tp_residual = tp if run.engine.sequence_parallel else 1
    d, heads, length = shape.hidden_size, shape.num_attention_heads, run.model.seq_length
    assert length
    values = 4 * d / tp_residual + (4 * d + 2 * shape.ffn_hidden_size) / tp
    float32 = 4 / tp_residual
    if run.model.hidden_dropout:
        values += 2 * d
    if run.model.attention_dropout:
        # Without the fused kernel: the weights, their mask, and both together.
        values += 3 * heads / tp * length
    else:
        float32 += heads / tp
    return _tokens(run) * (values * run.dtype.itemsize + float32 * 4)


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
        gradient = torch.float32.itemsize * vocab * shape.hidden_size
        return logits + hidden + gradient + _chunks(tokens * vocab)
    if early_exit:
        scored = tokens / run.selection.eslm_proxy_stride
        return 2 * scored * shape.hidden_size * element + _chunks(scored * vocab)
    return 0.0


def _chunks(num_logits: float) -> float:
    """Two of the transient float32 blocks in which logits are looked at."""
    return 2 * min(float(CHUNK_BYTES), torch.float32.itemsize * num_logits)


def _tokens(run: RunConfig) -> int:
    """Positions of one micro-batch of one rank."""
    assert run.training.micro_batch_size and run.model.seq_length
    return run.training.micro_batch_size * run.model.seq_length


def step_work(run: RunConfig) -> Work:
    """Work of one step as the keep rule will have it, with nothing masked."""
    t, s = run.training, run.selection
    assert t.micro_batch_size and run.model.seq_length
    rows = t.micro_batch_size * (run.dp_size if s.eslm_scope == "global" else 1)
    groups = 1 if s.eslm_scope == "global" else run.dp_size
    steps = run.gradient_accumulation_steps * groups
    alpha = s.initial_alpha
    kept = rows if s.eslm_level == "token" else num_to_keep(rows, alpha)
    deep = kept * run.model.seq_length
    trained = deep if s.eslm_level == "instance" else num_to_keep(deep, alpha)
    scored = trained if s.selection == "random" else deep
    return Work(
        tokens=steps * rows * run.model.seq_length,
        tokens_deep=steps * deep,
        tokens_scored=steps * scored,
        tokens_trained=steps * trained,
    )


def _layout(run: RunConfig) -> str:
    engine, interval = run.engine, run.model.activation_checkpoint_interval
    facts = [
        f"{engine.tensor_model_parallel_size} tensor x {engine.pipeline_model_parallel_size} "
        f"pipeline x {run.dp_size} data-parallel ranks",
        f"ZeRO {engine.zero_stage}",
        *(["CPU offload"] if engine.cpu_offload else []),
        *(["sequence parallel"] if engine.sequence_parallel else []),
        *([f"activation checkpoints every {interval} blocks"] if interval else []),
    ]
    return ", ".join(facts)


def dry_run_text(
    run: RunConfig, shape: ModelShape, flops: FlopsModel, mixture: MixtureReport
) -> str:
    """The report of `--dry-run`, one fact a line."""
    t = run.training
    assert t.train_iters and t.global_batch_size and run.model.seq_length
    work = step_work(run)
    plan = plan_stages(run, shape, flops, work)
    memory = estimate_memory(run, shape, plan)
    gib = 2.0**30
    read = t.train_iters * work.tokens
    lines = [
        f"steps                {t.train_iters:,}",
        f"batch                {t.global_batch_size} sequences x {run.model.seq_length} tokens = "
        f"{run.gradient_accumulation_steps} micro-steps x {run.dp_size} ranks x "
        f"{t.micro_batch_size}",
        f"layout               {_layout(run)}",
        f"tokens read          {read:,}",
        f"tokens trained on    {t.train_iters * work.tokens_trained:,} "
        f"({work.tokens_trained / work.tokens:.1%})",
        f"parameters           {shape.num_params:,} (vocabulary {shape.vocab_size:,} padded to "
        f"{shape.padded_vocab_size:,})",
        f"FLOPs executed       {t.train_iters * flops.executed(work):.3e} "
        f"({flops.executed(work):.3e} a step)",
        f"FLOPs by the paper   {t.train_iters * flops.paper(work):.3e} "
        f"({flops.paper(work):.3e} a step)",
        f"memory a rank        {memory.total / gib:.2f} GiB = weights {memory.weights / gib:.2f} + "
        f"gradients {memory.gradients / gib:.2f} + optimizer {memory.optimizer / gib:.2f} + "
        f"activations {memory.activations / gib:.2f} + head {memory.head / gib:.2f}"
        + (f" (stage {memory.stage}, which needs most)" if plan.num_stages > 1 else ""),
    ]
    if plan.num_stages > 1:
        steps = run.gradient_accumulation_steps
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
