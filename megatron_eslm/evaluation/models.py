"""Models to evaluate: which ones a folder has, and how one becomes lm-eval's LM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_eslm.checkpoint.manifest import list_checkpoints
from megatron_eslm.data.tokenizers.build import Tokenizer
from megatron_eslm.errors import ConfigError
from megatron_eslm.evaluation.native_lm import NativeLM
from megatron_eslm.evaluation.scorer import Scorer
from megatron_eslm.frozen.model import FrozenSource, load_frozen, open_frozen
from megatron_eslm.parallel.mesh import Mesh


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model to evaluate; its weights are not read yet."""

    source: FrozenSource
    tokenizer: Tokenizer
    iteration: int | None
    """Steps that it was trained for; None for a Hugging Face folder."""


def find_tags(load: str, tag: str | None, every: bool) -> Sequence[str | None]:
    """Names of the checkpoints to evaluate; None is the newest complete one, or the folder itself.

    Raises:
        ConfigError: all are wanted, and there are none.
    """
    if not every:
        return [tag]
    tags = [path.name for path in sorted(list_checkpoints(Path(load)))]
    if not tags:
        raise ConfigError(
            f"--load {load} has no checkpoints (folders such as iter_0000100), of which "
            "--all-checkpoints would take each. Name the folder that --save named."
        )
    return tags


def find_candidate(load: str, tag: str | None) -> Candidate:
    """Open a checkpoint of any layout, or a Hugging Face folder.

    Raises:
        ConfigError: it is neither, is damaged, or has no tokenizer.
    """
    source, tokenizer = open_frozen("--load", load, tag)
    iteration = int(source.folder.name.removeprefix("iter_")) if source.is_checkpoint else None
    return Candidate(source=source, tokenizer=tokenizer, iteration=iteration)


def load_lm(
    candidate: Candidate,
    mesh: Mesh,
    dtype: torch.dtype,
    device: torch.device,
    batch_tokens: int,
    *,
    quiet: bool = False,
) -> NativeLM:
    """Read the weights; each tensor-parallel rank its own. Not collective.

    Args:
        candidate: from `find_candidate`.
        mesh: its data-parallel ranks share the documents.
        dtype: compute dtype; sums are float32 in any.
        device: device of the model.
        batch_tokens: tokens in a forward pass.
        quiet: show no progress.
    """
    model = load_frozen(candidate.source, mesh, dtype, device)
    scorer = Scorer(model, candidate.source.shape, mesh.tp_group, batch_tokens)
    return NativeLM(scorer, candidate.tokenizer, mesh.dp_group, quiet=quiet)
