"""The teacher of a run: a frozen model whose distributions the one that trains learns from."""

from __future__ import annotations

import dataclasses

from megatron_eslm.checkpoint.find import CheckpointInfo
from megatron_eslm.config.run import RunConfig
from megatron_eslm.data.tokenizers.build import Tokenizer
from megatron_eslm.frozen.model import FrozenSource, check_fits, find_frozen
from megatron_eslm.model.shape import ModelShape


def find_teacher(run: RunConfig, shape: ModelShape, tokenizer: Tokenizer) -> FrozenSource:
    """The teacher that `--distill-teacher` names, checked against the run; no tensor is read.

    Args:
        run: names the folder.
        shape: of the student.
        tokenizer: of the data.

    Raises:
        ConfigError: no model there, or one that cannot teach this student in this layout.
    """
    folder = run.objective.distill_teacher
    assert folder is not None
    source = find_frozen("--distill-teacher", folder, tokenizer, "teacher")
    check_fits(source, run, f"--distill-teacher {folder}", "use another teacher")
    return source.beside(shape)


def student_as_teacher(found: CheckpointInfo, shape: ModelShape) -> FrozenSource:
    """The weights that a run starts from, as the teacher of what it becomes.

    A run that trains adapters has these weights in its own checkpoints, too, beside the adapters;
    one that starts from such a checkpoint as from weights begins with both merged.
    """
    source = FrozenSource.of_checkpoint(found).beside(shape)
    return dataclasses.replace(source, merged=found.kind == "weights")
