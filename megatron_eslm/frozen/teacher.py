"""Find the teacher of a run: a frozen model whose output distributions the student learns."""

from __future__ import annotations

import dataclasses

from megatron_eslm.checkpoint.find import CheckpointInfo
from megatron_eslm.config.run import RunConfig
from megatron_eslm.data.tokenizers.build import Tokenizer
from megatron_eslm.frozen.model import FrozenSource, check_fits, find_frozen
from megatron_eslm.model.shape import ModelShape


def find_teacher(run: RunConfig, shape: ModelShape, tokenizer: Tokenizer) -> FrozenSource:
    """Find the model of `--distill-teacher` and check it against the run; reads no tensor.

    Args:
        run: the run.
        shape: shape of the student.
        tokenizer: tokenizer of the data.

    Raises:
        ConfigError: there is no model, or it cannot teach this student in this layout.
    """
    folder = run.objective.distill_teacher
    assert folder is not None
    source = find_frozen("--distill-teacher", folder, tokenizer, "teacher")
    check_fits(source, run, f"--distill-teacher {folder}", "use another teacher")
    return source.beside(shape)


def student_as_teacher(found: CheckpointInfo, shape: ModelShape) -> FrozenSource:
    """Use the weights that a run starts from as its teacher.

    Checkpoints of a run with adapters contain these weights unmerged, beside the adapters. A run
    that starts from such a checkpoint as weights only (--finetune) starts from the merged weights.
    """
    source = FrozenSource.of_checkpoint(found).beside(shape)
    return dataclasses.replace(source, merged=found.kind == "weights")
