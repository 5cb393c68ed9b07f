#!/usr/bin/env python
"""Show which tokens of a text selection would keep, for one or two models or scores.

    python tools/highlight_tokens.py --load runs/eslm --data-path data/book data/github
    python tools/highlight_tokens.py --load runs/eslm --text essay.txt --score-b entropy
    python tools/highlight_tokens.py --load runs/clm --load-b runs/eslm --data-path data/book

Writes one HTML page that needs nothing else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from megatron_eslm.command_line import Parser, command
from megatron_eslm.data.tokenizers.build import same_ids
from megatron_eslm.errors import ConfigError
from megatron_eslm.launch.bootstrap import single_process
from megatron_eslm.reports.groups import default_labels
from megatron_eslm.reports.held_out import held_out
from megatron_eslm.reports.highlight import Column, choose, highlight_page
from megatron_eslm.reports.html import write_page
from megatron_eslm.reports.passages import passages_of_text, read_text, validation_passages
from megatron_eslm.reports.token_scores import ScoringModel, open_scoring_model, window_of

SCORES = ("loss", "entropy", "excess")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Return 0, or 2 if the input cannot be used."""
    args = _parser().parse_args(argv)
    with single_process():
        page = render(args)
    write_page(args.output, page, "--output")
    print(f"wrote {args.output}")
    return 0


def render(args: argparse.Namespace) -> str:
    """Load, score and draw."""
    two = any(getattr(args, name) is not None for name in ("load_b", "score_b", "alpha_b"))
    score_b, alpha_b = args.score_b or args.score, args.alpha_b
    wanted = [args.score, *([score_b] if two else [])]
    if "excess" in wanted and args.reference is None:
        raise ConfigError(
            "--score excess is the loss above that of a reference model; name one with --reference."
        )
    if "excess" not in wanted and args.reference is not None:
        raise ConfigError(f"--reference {args.reference} is read for --score excess only; add it.")
    model = open_scoring_model(args.load, args.tag)
    other = (
        model if args.load_b is None else open_scoring_model(args.load_b, args.tag_b, "--load-b")
    )
    if other.name == model.name and args.load_b not in (None, args.load):
        # Recipes save each run in a folder of the same name.
        names = default_labels([args.load, args.load_b])
        model, other = (
            replace(m, name=f"{name}, iteration {m.weights.iteration}")
            for m, name in zip((model, other), names, strict=True)
        )
    reference = args.reference and open_scoring_model(args.reference, flag="--reference")
    models = [m for m in (model, other, reference) if m]
    for candidate in models[1:]:
        if not same_ids(candidate.tokenizer, model.tokenizer):
            raise ConfigError(
                f"{candidate.name} and {model.name} have different tokenizers, so the same text "
                "has other tokens. Compare models of one tokenizer."
            )
    window = window_of(models, args.seq_length)
    if args.text is not None:
        passages = passages_of_text(read_text(args.text), args.text, model.tokenizer, window)
        passages = passages[: args.samples]
    else:
        read = held_out(models, args.split)
        passages = validation_passages(
            args.data_path,
            read.split,
            model.tokenizer,
            window,
            args.samples,
            first_only=True,
            eod_mask_loss=read.eod_mask_loss,
        )
    loss_of_reference = [s.loss for s in reference.score(passages)] if reference else []

    def column(model: ScoringModel, score: str, alpha: float, title: str) -> Column:
        found = model.score(passages)
        if score == "excess":
            pairs = zip(found, loss_of_reference, strict=True)
            return choose(title, "excess loss", [s.loss - r for s, r in pairs], alpha)
        return choose(title, score, [getattr(s, score) for s in found], alpha)

    if not two:
        return highlight_page(
            passages, [column(model, args.score, args.alpha, model.name)], model.tokenizer
        )
    alpha_b = args.alpha if alpha_b is None else alpha_b
    titles = [f"{model.name}, {args.score}", f"{other.name}, {score_b}"]
    if args.alpha != alpha_b:
        titles = [f"{t}, α {a:g}" for t, a in zip(titles, (args.alpha, alpha_b), strict=True)]
    columns = [
        column(model, args.score, args.alpha, titles[0]),
        column(other, score_b, alpha_b, titles[1]),
    ]
    return highlight_page(passages, columns, model.tokenizer)


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument(
        "--load", required=True, help="folder of checkpoints, or a Hugging Face GPT-2 folder"
    )
    parser.add_argument("--tag", help="which checkpoint; default: the newest complete one")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data-path", nargs="+", metavar="PREFIX", help="show validation documents of these pairs"
    )
    source.add_argument("--text", metavar="FILE", help="show this text")
    parser.add_argument(
        "--score", choices=SCORES, default="loss", help="risk of a token (%(default)s)"
    )
    parser.add_argument(
        "--alpha", type=float, default=0.1, help="share of the tokens to drop (%(default)s)"
    )
    parser.add_argument("--load-b", metavar="DIR", help="a second model beside it")
    parser.add_argument("--tag-b", help="which checkpoint of --load-b")
    parser.add_argument("--score-b", choices=SCORES, help="the second score; default: the first")
    parser.add_argument("--alpha-b", type=float, help="the second share; default: the first")
    parser.add_argument("--reference", metavar="DIR", help="reference model of --score excess")
    parser.add_argument(
        "--samples", type=int, default=8, help="passages to show at most (%(default)s)"
    )
    parser.add_argument(
        "--seq-length", type=int, help="most tokens of a passage; default: the model's positions"
    )
    parser.add_argument(
        "--split",
        help="which documents are for validation; default: those of the run that --load is of, "
        "since it was not trained on them",
    )
    parser.add_argument(
        "--output", default="highlight.html", metavar="FILE", help="page to write (%(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
