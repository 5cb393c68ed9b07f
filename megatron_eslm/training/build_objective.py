"""Build the objective of a run, with its teacher if it needs one."""

from __future__ import annotations

import logging

import torch

from megatron_eslm.checkpoint.find import CheckpointInfo
from megatron_eslm.config.run import RunConfig
from megatron_eslm.data.documents import DocumentRules
from megatron_eslm.data.tokenizers.build import Tokenizer
from megatron_eslm.errors import ConfigError
from megatron_eslm.frozen.model import FrozenModel, FrozenSource, load_frozen
from megatron_eslm.frozen.teacher import find_teacher, student_as_teacher
from megatron_eslm.launch.device import prepare_device
from megatron_eslm.model.arithmetic import num_params
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.objectives.base import Objective
from megatron_eslm.objectives.causal_lm import CausalLM
from megatron_eslm.objectives.distillation import Distillation
from megatron_eslm.objectives.uncertainty import Uncertainty
from megatron_eslm.parallel.collectives import on_every_rank, on_rank_zero
from megatron_eslm.parallel.mesh import Mesh
from megatron_eslm.selection.build import policy_traits

logger = logging.getLogger(__name__)


def find_run_teacher(
    run: RunConfig, shape: ModelShape, tokenizer: Tokenizer, found: CheckpointInfo | None
) -> FrozenSource | None:
    """Find the teacher of a run; None if it needs none. Collective.

    Args:
        run: the run.
        shape: shape of the trained model.
        tokenizer: tokenizer of the data.
        found: the checkpoint that the run starts from.

    Raises:
        ConfigError: there is no usable teacher.
    """
    holds = policy_traits(run.selection).holds_dropped_tokens
    if holds and found is None:
        raise ConfigError(
            "--selection uncertainty regularizes towards the starting weights, but --load "
            f"{run.checkpoint.load} contains no checkpoint. Put the weights there, or --load them "
            "from another folder."
        )
    if run.objective.distill_teacher is not None:
        return on_rank_zero(lambda: find_teacher(run, shape, tokenizer))
    if not holds:
        return None
    assert found is not None
    # Frozen weights are saved in the compute dtype.
    kept = run.model.lora is not None and run.dtype in (torch.float32, _teacher_dtype(run))
    if found.kind == "training" and not kept:
        raise ConfigError(
            f"--load {run.checkpoint.load} continues training, but --selection uncertainty "
            "regularizes towards the weights that training started from, which "
            f"{found.folder.name} does not contain. Name them with --distill-teacher."
        )
    return student_as_teacher(found, shape)


def teacher_shape(
    run: RunConfig, shape: ModelShape, source: FrozenSource | None
) -> ModelShape | None:
    """Shape of the teacher, for cost estimates; None without a teacher."""
    if source is not None:
        return source.shape
    # A dry run opens no checkpoint; the teacher has the student's shape.
    return shape if policy_traits(run.selection).holds_dropped_tokens else None


def build_objective(
    run: RunConfig,
    mesh: Mesh,
    source: FrozenSource | None,
    documents: DocumentRules | None = None,
) -> Objective:
    """Build the objective of a run, with its teacher on the last stage's ranks. Collective.

    The teacher keeps to documents as the model does.

    Raises:
        ConfigError: the teacher's files are damaged.
    """
    options = run.objective

    def teacher() -> FrozenModel | None:
        if source is None or not mesh.is_last_stage:
            return None  # earlier stages have no loss
        return load_frozen(source, mesh, _teacher_dtype(run), prepare_device(), documents)

    frozen = on_every_rank(teacher)
    if source is not None:
        logger.info("teacher: %s, %s parameters", source.folder, f"{num_params(source.shape):,}")
    if frozen is None:
        return CausalLM()
    if options.distill is None:
        return Uncertainty(frozen)
    return Distillation(
        frozen,
        weight=options.distill_weight,
        temperature=options.distill_temperature,
        num_iterations=options.salt_iters if options.distill == "salt" else None,
    )


def _teacher_dtype(run: RunConfig) -> torch.dtype:
    return torch.bfloat16 if run.objective.distill_teacher_dtype == "bf16" else torch.float32
