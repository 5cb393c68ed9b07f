"""Build the FLOPs model of a run, and the work of its steps."""

from __future__ import annotations

from megatron_eslm.config.run import RunConfig
from megatron_eslm.cost.flops import FlopsModel, TeacherCost, Work
from megatron_eslm.cost.last_mlp import last_mlp_kept
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.ops.keep_rule import StepShape, num_to_keep
from megatron_eslm.selection.build import policy_traits
from megatron_eslm.selection.state import SelectionState


def build_flops(
    run: RunConfig,
    shape: ModelShape,
    state: SelectionState,
    teacher: ModelShape | None = None,
    reference: ModelShape | None = None,
    *,
    device_type: str | None = None,
) -> FlopsModel:
    """Build the FLOPs model of a run.

    Args:
        run: the run.
        shape: the model's shape.
        state: state of selection; it determines what runs in the current step.
        teacher: shape of the teacher, if any.
        reference: shape of the reference model that runs during training, if any.
        device_type: device to run on; None: this machine's.
    """
    last = run.objective.salt_iters if run.objective.distill == "salt" else run.training.train_iters
    traits = policy_traits(run.selection)
    return FlopsModel(
        shape=shape,
        seq_length=run.model.seq_length,
        selector_depth=traits.early_exit_blocks,
        proxy=traits.sequence_source == "head",
        proxy_stride=traits.proxy_stride,
        ahead=traits.selects_per_step,
        logits_recomputed=not run.keeps_logits(shape),
        blocks_recomputed=run.model.activation_checkpoint_interval > 0,
        last_mlp_kept=last_mlp_kept(run, shape, device_type),
        lora_rank=run.model.lora_rank,
        alignment_rows=alignment_rows(run),
        teacher=None
        if teacher is None
        else TeacherCost(shape=teacher, runs=lambda: state.iteration < last),
        reference=reference,
        reference_scores=(traits.selects_sequences, traits.selects_tokens),
        refers=None if reference is None else lambda: state.alpha > 0,
    )


def step_work(run: RunConfig, alpha: float | None = None, batch_size: int | None = None) -> Work:
    """Work of one step under the keep rule, with nothing masked.

    Args:
        run: the run.
        alpha: alpha of the step. Default: the run's initial alpha (after any warm-up).
        batch_size: sequences per step over all ranks. Default: --global-batch-size.
    """
    t, s = run.training, run.selection
    micro_steps = run.gradient_accumulation_steps
    if batch_size is not None:
        micro_steps = batch_size // (t.micro_batch_size * run.dp_size)
    alpha = s.initial_alpha if alpha is None else alpha
    traits = policy_traits(s)
    ranks = 1 if traits.ranks_decide_alone else run.dp_size
    rows, steps = t.micro_batch_size * ranks, micro_steps * (run.dp_size // ranks)
    kept, steps_kept = rows, steps
    if traits.selects_per_step:
        shape = StepShape(micro_steps, t.micro_batch_size).kept(alpha)
        kept, steps_kept = shape.rows * ranks, shape.micro_steps
    elif traits.selects_sequences:
        kept = num_to_keep(rows, alpha)
    deep = kept * run.model.seq_length
    all_tokens = not traits.selects_tokens or traits.holds_dropped_tokens
    trained = deep if all_tokens else num_to_keep(deep, alpha)
    scored = deep if traits.token_source == "head" else trained
    return Work(
        tokens=steps * rows * run.model.seq_length,
        tokens_deep=steps_kept * deep,
        tokens_scored=steps_kept * scored,
        tokens_trained=steps_kept * trained,
    )


def alignment_rows(run: RunConfig) -> tuple[int, int] | None:
    """(candidates, validation rows) per micro-step of a rank; None unless gradients select."""
    if not policy_traits(run.selection).needs_gradients:
        return None
    candidates = run.training.micro_batch_size
    return candidates, max(1, int(candidates * run.selection.greats_valid_share + 0.5))
