"""Loss and entropy of every token of a text under a trained model, in one process.

Shape legend: M passages of a batch, T positions, S = T + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_eslm.checkpoint.weights import Weights, read_weights
from megatron_eslm.data.batch import Batch
from megatron_eslm.data.tokenizers.build import Tokenizer, load_tokenizer
from megatron_eslm.data.tokenizers.from_transformers import folder_tokenizer
from megatron_eslm.errors import ConfigError
from megatron_eslm.model.gpt import bare_gpt, load_weights
from megatron_eslm.model.hf.folder import from_hf, load_hf
from megatron_eslm.ops.head.statistics import VocabShard, head_statistics
from megatron_eslm.parallel.mesh import build_mesh
from megatron_eslm.reports.passages import Passage


@dataclass(frozen=True)
class TokenScores:
    """A model's scores for the tokens of one passage."""

    loss: np.ndarray
    """float32 [n], -log p(token), in nats."""
    entropy: np.ndarray
    """float32 [n], entropy of the predicted distribution for the token, in nats."""


@dataclass(frozen=True)
class ScoringModel:
    """Full weights of a model and its tokenizer."""

    name: str
    """Folder and iteration, for people."""
    weights: Weights
    tokenizer: Tokenizer

    @property
    def context(self) -> int:
        """Largest window in tokens."""
        return self.weights.shape.max_position_embeddings

    @torch.no_grad()
    def score(self, passages: Sequence[Passage], batch_size: int = 8) -> list[TokenScores]:
        """Score all tokens of passages, each given the preceding tokens of its passage.

        Needs a process group of one rank (`launch.bootstrap.single_process`). Logits exist for a
        few tokens at a time only.
        """
        shape = self.weights.shape
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = bare_gpt(shape, build_mesh())
        load_weights(model, self.weights.weights)
        model = model.to(device)
        shard = VocabShard.of(shape.vocab_size, shape.padded_vocab_size)
        scores: list[TokenScores] = []
        for first in range(0, len(passages), batch_size):
            tokens_MU, valid_MT = _batch(passages[first : first + batch_size], self.tokenizer.eod)
            tokens_MU, valid_MT = tokens_MU.to(device), valid_MT.to(device)
            hidden_TMD, *_ = model.run(Batch.of(tokens_MU, valid_MT))
            found = head_statistics(
                model.final_norm(hidden_TMD.transpose(0, 1)[valid_MT]),
                model.output_layer.weight,
                tokens_MU[:, 1:][valid_MT],
                shard,
                entropy=True,
            )
            assert found.entropy_N is not None
            lengths = valid_MT.sum(dim=1).tolist()
            both = zip(
                found.loss_N.cpu().split(lengths), found.entropy_N.cpu().split(lengths), strict=True
            )
            scores += [TokenScores(loss.numpy(), entropy.numpy()) for loss, entropy in both]
        return scores


def open_scoring_model(load: str, tag: str | None = None, flag: str = "--load") -> ScoringModel:
    """Load a model from one of our checkpoints or from a Hugging Face folder.

    Args:
        load: folder of checkpoints, one checkpoint, or a Hugging Face folder.
        tag: the checkpoint to load. Default: the newest complete one.
        flag: the flag that named `load`, for messages.

    Raises:
        ConfigError: `load` is neither, is damaged, or has no tokenizer.
    """
    if (Path(load) / "config.json").is_file():
        if tag is not None:
            raise ConfigError(f"{flag} {load} is a Hugging Face folder and has no tag {tag}.")
        theirs, tokenizer = load_hf(load), folder_tokenizer(load)
        state, shape = from_hf(theirs, theirs.config, 1, tokenizer.vocab_size)
        weights = Weights(dict(state), shape, None, 0)
        return ScoringModel(Path(load).name, weights, tokenizer)
    try:
        weights = read_weights(load, tag)
    except ConfigError as error:
        # Messages of the loader always name --load; prefix the actual flag.
        raise error if flag == "--load" else ConfigError(f"{flag}: {error}") from error
    if weights.tokenizer_dir is None:
        raise ConfigError(
            f"{flag} {load}: this checkpoint holds no tokenizer, so its tokens cannot be shown. "
            "Use a checkpoint that was saved while training on prepared data."
        )
    name = f"{Path(load).name}, iteration {weights.iteration}"
    return ScoringModel(name, weights, load_tokenizer(weights.tokenizer_dir))


def window_of(models: Sequence[ScoringModel], wanted: int | None) -> int:
    """The window size of passages.

    Raises:
        ConfigError: `wanted` exceeds the positions of one of the models.
    """
    longest = min(model.context for model in models)
    if wanted is None:
        return longest
    if not 1 <= wanted <= longest:
        raise ConfigError(
            f"--seq-length {wanted} must be from 1 to {longest}, the positions of the model."
        )
    return wanted


def _batch(passages: Sequence[Passage], eod: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens int64 [M, T+1] and valid bool [M, T], padded with `eod` to the longest passage."""
    width = max(len(passage.ids) for passage in passages)
    tokens_MU = torch.full((len(passages), width + 1), eod, dtype=torch.int64)
    valid_MT = torch.zeros(len(passages), width, dtype=torch.bool)
    for row, passage in enumerate(passages):
        length = len(passage.ids)
        tokens_MU[row, 0] = passage.before
        tokens_MU[row, 1 : length + 1] = torch.from_numpy(passage.ids)
        valid_MT[row, :length] = True
    return tokens_MU, valid_MT
