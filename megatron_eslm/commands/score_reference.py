"""Score text with a reference, once, for --reference-losses NAME.

    megatron-eslm score-reference --ngram 3 --data-path data/books data/web --name trigram
    megatron-eslm score-reference --load runs/reference --data-path data/books data/web \\
        --name self --seq-length 1024

The reference is a model, or bigrams or trigrams counted from the text itself. Writes
PREFIX.reference-NAME.npy (float16, the loss of predicting each token of PREFIX.bin) and a .json
beside it. Interrupted, the same command goes on from where it stopped. Several processes can score
with a model at a time, one for each prefix; n-grams are counted over all prefixes together.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from megatron_eslm.command_line import command
from megatron_eslm.config.flags import parse_options
from megatron_eslm.data.data_options import TokenizerType
from megatron_eslm.errors import ConfigError
from megatron_eslm.limits import ONE_OR_MORE, Commas, Flag, check_fields
from megatron_eslm.selection.reference_options import is_plain_name

if TYPE_CHECKING:
    from megatron_eslm.data.source import DataSource


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """The reference, the text and what the losses are called."""

    load: Annotated[str | None, Flag(metavar="DIR")] = None
    """The reference is a model: a folder of checkpoints, or a Hugging Face folder."""

    tag: str | None = None
    """Which checkpoint; default: the newest complete one."""

    ngram: Literal[2, 3] | None = None
    """The reference is n-grams of this order (interpolated Kneser-Ney), counted over all of
    --data-path, each token's own occurrence left out."""

    split: Annotated[str, Commas()] = "98,1,1"
    """As in training. --ngram counts the documents for training only."""

    data_path: Annotated[tuple[str, ...], Flag(metavar="PREFIX")]
    """Pairs without their ending."""

    name: str
    """Of the losses: --reference-losses NAME."""

    seq_length: Annotated[int, ONE_OR_MORE] | None = None
    """Tokens that a model predicts from one context; that of training."""

    batch_size: Annotated[int, ONE_OR_MORE] = 8
    """Windows in a forward pass."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """In which the model computes."""

    overwrite: bool = False
    """Begin anew, whatever losses have this name."""

    tokenizer_type: TokenizerType | None = None
    """As in training, for data without a stored tokenizer."""

    vocab_file: str | None = None
    """As in training, for data without a stored tokenizer."""

    merge_file: str | None = None
    """As in training, for data without a stored tokenizer."""

    tokenizer_model: str | None = None
    """As in training, for data without a stored tokenizer."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not is_plain_name(self.name):
            raise ConfigError(
                f"--name {self.name!r} becomes a part of file names; use letters, digits, '-', '_'."
            )
        if (self.load is None) == (self.ngram is None):
            raise ConfigError(
                "Give one reference: --load with the folder of a model, or --ngram 2 or 3."
            )
        if self.load is not None and self.seq_length is None:
            raise ConfigError(
                f"--load {self.load} needs --seq-length, the number of tokens that the model "
                "predicts from one context. Give that of training."
            )
        if self.ngram is not None and (self.tag is not None or self.seq_length is not None):
            flag = "--tag" if self.tag is not None else "--seq-length"
            raise ConfigError(f"{flag} has no meaning with --ngram {self.ngram}. Leave it out.")


@command
def main(argv: Sequence[str]) -> int:
    """Return 0, or 2 if the input cannot be used."""
    options = parse_options(ScoreOptions, argv, __doc__)
    from megatron_eslm.launch.bootstrap import single_process

    with single_process():
        sources = _open(options)
        if options.ngram is None:
            _score_by_model(options, sources)
        else:
            _score_by_ngrams(options, options.ngram, sources)
    return 0


def _open(options: ScoreOptions) -> list[DataSource]:
    """Check all prefixes before the first token is scored."""
    from megatron_eslm.data.data_options import DataOptions
    from megatron_eslm.data.source import open_data

    return [
        open_data(
            DataOptions(
                data_path=(prefix,),
                split=options.split,
                tokenizer_type=options.tokenizer_type,
                vocab_file=options.vocab_file,
                merge_file=options.merge_file,
                tokenizer_model=options.tokenizer_model,
            )
        )
        for prefix in options.data_path
    ]


def _score_by_ngrams(options: ScoreOptions, order: int, sources: list[DataSource]) -> None:
    """Count over all prefixes together, then score each."""
    from megatron_eslm.data.tokenizers.build import same_ids
    from megatron_eslm.frozen.score_ngram import score_ngram

    first = sources[0].tokenizer
    for prefix, source in zip(options.data_path, sources, strict=True):
        if not same_ids(first, source.tokenizer):
            raise ConfigError(
                f"{options.data_path[0]} and {prefix} have different tokenizers "
                f"({first.name}, {source.tokenizer.name}), so they cannot be counted together. "
                "Score them in two calls."
            )
    begin = time.monotonic()
    scored = score_ngram(
        options.data_path,
        options.name,
        order=order,
        split=options.split,
        vocab_size=first.vocab_size,
        eod=first.eod,
        overwrite=options.overwrite,
    )
    for text in scored:
        held_out = ""
        if text.held_out:
            held_out = f" ({text.held_out_loss / text.held_out:.4f} outside the training documents)"
        _report(text.prefix, options.name, text.tokens, text.total_loss, held_out)
    print(f"{time.monotonic() - begin:.1f} seconds, no FLOPs of matrix products")


def _report(prefix: str, name: str, tokens: int, total_loss: float, more: str = "") -> None:
    from megatron_eslm.data.reference_losses import losses_path

    mean = f", mean loss {total_loss / tokens:.4f} nats" if tokens else ""
    print(f"{losses_path(prefix, name)}: {tokens:,} tokens scored now{mean}{more}")


def _score_by_model(options: ScoreOptions, sources: list[DataSource]) -> None:
    """Score all prefixes, one after the other."""
    import torch

    from megatron_eslm.frozen.reference import find_reference, load_reference
    from megatron_eslm.frozen.score import score_pair
    from megatron_eslm.launch.device import prepare_device
    from megatron_eslm.parallel.mesh import build_mesh

    assert options.load is not None and options.seq_length is not None
    for source in sources:
        found = find_reference("--load", options.load, source.tokenizer, options.tag)
    if options.seq_length > found.shape.max_position_embeddings:
        raise ConfigError(
            f"--seq-length {options.seq_length} is more than the "
            f"{found.shape.max_position_embeddings} positions of the model in {options.load}; use "
            "at most that."
        )
    model = load_reference(found, build_mesh(), prepare_device(), getattr(torch, options.dtype))
    assert model is not None
    total = 0.0
    for prefix, source in zip(options.data_path, sources, strict=True):
        scored = score_pair(
            model,
            prefix,
            options.name,
            eod=source.tokenizer.eod,
            seq_length=options.seq_length,
            batch_size=options.batch_size,
            overwrite=options.overwrite,
            progress=lambda done, tokens, p=prefix: print(  # type: ignore[misc]
                f"{p}: {done:,} of {tokens:,} tokens", flush=True
            ),
        )
        total += scored.flops
        flops = f", {scored.flops:.4g} FLOPs"
        _report(prefix, options.name, scored.tokens, scored.total_loss, flops)
    print(f"{total:.4g} FLOPs, which no training run counts")


if __name__ == "__main__":
    sys.exit(main())
