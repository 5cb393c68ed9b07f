"""Score text with a reference model, once, for --selection rho1 --reference-losses NAME.

    megatron-eslm score-reference --load runs/reference --data-path data/books data/web \\
        --name self --seq-length 1024

Writes PREFIX.reference-NAME.npy (float16, the loss of predicting each token of PREFIX.bin) and a
.json beside it. Interrupted, the same command goes on from where it stopped. Prefixes can be
scored by several processes at a time, one for each.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_eslm.command_line import command
from megatron_eslm.config.flags import parse_options
from megatron_eslm.data.data_options import TokenizerType
from megatron_eslm.errors import ConfigError
from megatron_eslm.limits import ONE_OR_MORE, Flag
from megatron_eslm.selection.reference_options import is_plain_name


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """The model, the text and what the losses are called."""

    load: Annotated[str, Flag(metavar="DIR")]
    """Folder of checkpoints, or a Hugging Face folder."""

    tag: str | None = None
    """Which checkpoint; default: the newest complete one."""

    data_path: Annotated[tuple[str, ...], Flag(metavar="PREFIX")]
    """Pairs without their ending."""

    name: str
    """Of the losses: --reference-losses NAME."""

    seq_length: Annotated[int, ONE_OR_MORE]
    """Tokens predicted from one context; that of training."""

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
        if not is_plain_name(self.name):
            raise ConfigError(
                f"--name {self.name!r} becomes a part of file names; use letters, digits, '-', '_'."
            )


@command
def main(argv: Sequence[str]) -> int:
    """Return 0, or 2 if the input cannot be used."""
    options = parse_options(ScoreOptions, argv, __doc__)
    from megatron_eslm.launch.bootstrap import single_process

    with single_process():
        score(options)
    return 0


def score(options: ScoreOptions) -> None:
    """Score all prefixes, one after the other."""
    import torch

    from megatron_eslm.data.data_options import DataOptions
    from megatron_eslm.data.reference_losses import losses_path
    from megatron_eslm.data.source import open_data
    from megatron_eslm.frozen.reference import find_reference, load_reference
    from megatron_eslm.frozen.score import score_pair
    from megatron_eslm.launch.device import prepare_device
    from megatron_eslm.parallel.mesh import build_mesh

    # Everything that can be wrong, before the first token is scored.
    sources = [
        open_data(
            DataOptions(
                data_path=(prefix,),
                tokenizer_type=options.tokenizer_type,
                vocab_file=options.vocab_file,
                merge_file=options.merge_file,
                tokenizer_model=options.tokenizer_model,
            )
        )
        for prefix in options.data_path
    ]
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
        mean = f"mean loss {scored.total_loss / scored.tokens:.4f} nats, " if scored.tokens else ""
        print(
            f"{losses_path(prefix, options.name)}: {scored.tokens:,} tokens scored now, {mean}"
            f"{scored.flops:.4g} FLOPs"
        )
    print(f"{total:.4g} FLOPs, which no training run counts")


if __name__ == "__main__":
    sys.exit(main())
