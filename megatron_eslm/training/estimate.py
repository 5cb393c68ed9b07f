"""`--dry-run`: what a run will read, hold and compute, before any of it happens."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_eslm.config.run import RunConfig
from megatron_eslm.data.plan import MixtureReport
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.ops.head_statistics import CHUNK_BYTES
from megatron_eslm.ops.keep_rule import num_to_keep
from megatron_eslm.training.flops import FlopsModel, Work


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on one rank."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.head


def estimate_memory(run: RunConfig, shape: ModelShape) -> MemoryEstimate:
    """Device memory of one rank, from what each part stores; allocator overhead is not in it.

    Activations count what a block keeps for its backward pass: 2 norm inputs and outputs, qkv,
    attention output, and the MLP's two wide tensors.
    """
    n = float(shape.num_params)
    element = 2 if run.engine.bf16 or run.engine.fp16 else 4
    stage, dp = run.engine.zero_stage or 0, run.dp_size
    share_weights = dp if stage == 3 else 1
    share_gradients = dp if stage >= 2 else 1
    share_optimizer = dp if stage >= 1 else 1
    master = 4 if element == 2 or stage >= 1 else 0
    optimizer = n * (8 + master) / share_optimizer
    gradient_element = 4 if element == 2 and stage >= 1 else element
    assert run.training.micro_batch_size and run.model.seq_length
    tokens = run.training.micro_batch_size * run.model.seq_length
    block = tokens * element * (9 * shape.hidden_size + 2 * shape.ffn_hidden_size)
    logits = tokens * shape.padded_vocab_size * element
    return MemoryEstimate(
        weights=n * element / share_weights,
        gradients=n * gradient_element / share_gradients,
        optimizer=0.0 if run.engine.cpu_offload else optimizer,
        activations=float(block * shape.num_layers),
        head=float((logits if run.keeps_logits(shape) else 0) + 2 * CHUNK_BYTES)
        + 4.0 * shape.padded_vocab_size * shape.hidden_size,
    )


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


def dry_run_text(
    run: RunConfig, shape: ModelShape, flops: FlopsModel, mixture: MixtureReport
) -> str:
    """The report of `--dry-run`, one fact a line."""
    t = run.training
    assert t.train_iters and t.global_batch_size and run.model.seq_length
    work, memory = step_work(run), estimate_memory(run, shape)
    gib = 2.0**30
    read = t.train_iters * work.tokens
    lines = [
        f"steps                {t.train_iters:,}",
        f"batch                {t.global_batch_size} sequences x {run.model.seq_length} tokens = "
        f"{run.gradient_accumulation_steps} micro-steps x {run.dp_size} ranks x "
        f"{t.micro_batch_size}",
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
        f"activations {memory.activations / gib:.2f} + head {memory.head / gib:.2f}",
    ]
    for domain in mixture.domains:
        lines.append(
            f"domain {domain.name:<13s} weight {domain.weight:.4f}, "
            f"{domain.documents['train']:,} documents, {domain.tokens['train']:,} tokens, "
            f"{domain.epochs:.3f} epochs"
        )
    lines.append(f"validation           {mixture.valid_samples:,} sequences an evaluation")
    return "\n".join(lines)
