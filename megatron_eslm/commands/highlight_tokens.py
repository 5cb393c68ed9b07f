"""Show which tokens of a text selection would keep, for one or two models or scores.

    megatron-eslm highlight-tokens --load runs/eslm --data-path data/book data/github
    megatron-eslm highlight-tokens --load runs/eslm --text essay.txt --score-b entropy
    megatron-eslm highlight-tokens --load runs/clm --load-b runs/eslm --data-path data/book

Writes one HTML page that needs nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

from megatron_eslm.command_line import command
from megatron_eslm.config.flags import parse_options
from megatron_eslm.errors import ConfigError
from megatron_eslm.limits import Flag

if TYPE_CHECKING:
    from megatron_eslm.reports.passages import Passage
    from megatron_eslm.reports.token_scores import ScoringModel

Score = Literal["loss", "entropy", "excess"]


@dataclass(frozen=True, kw_only=True)
class HighlightOptions:
    """One or two models, what they read, and the page."""

    load: Annotated[str, Flag(metavar="DIR")]
    """Folder of checkpoints, or a Hugging Face folder."""

    tag: str | None = None
    """Which checkpoint; default: the newest complete one."""

    data_path: Annotated[tuple[str, ...], Flag(metavar="PREFIX")] | None = None
    """Show validation documents of these pairs."""

    text: Annotated[str, Flag(metavar="FILE")] | None = None
    """Show this text."""

    score: Score = "loss"
    """Risk of a token."""

    alpha: float = 0.1
    """Share of the tokens to drop."""

    load_b: Annotated[str, Flag(metavar="DIR")] | None = None
    """A second model beside it."""

    tag_b: str | None = None
    """Which checkpoint of --load-b."""

    score_b: Score | None = None
    """The second score; default: the first."""

    alpha_b: float | None = None
    """The second share; default: the first."""

    reference: Annotated[str, Flag(metavar="DIR")] | None = None
    """Reference model of --score excess."""

    samples: int = 8
    """Passages to show at most."""

    seq_length: int | None = None
    """Most tokens of a passage; default: the model's positions."""

    split: str | None = None
    """Which documents are for validation; default: those of the run that --load is of, since it was
    not trained on them."""

    output: Annotated[str, Flag(metavar="FILE")] = "highlight.html"
    """Page to write."""

    def __post_init__(self) -> None:
        if self.data_path is None and self.text is None:
            raise ConfigError("Name what to show: --data-path PREFIX or --text FILE.")
        if self.data_path is not None and self.text is not None:
            raise ConfigError("--data-path and --text are given; leave one out.")
        excess = "excess" in (self.score, self.score_b)
        if excess and self.reference is None:
            raise ConfigError(
                "--score excess is the loss above that of a reference model; name one with "
                "--reference."
            )
        if not excess and self.reference is not None:
            raise ConfigError(
                f"--reference {self.reference} is read for --score excess only; add it."
            )

    @property
    def two(self) -> bool:
        """Whether two columns are shown."""
        return any(value is not None for value in (self.load_b, self.score_b, self.alpha_b))


@command
def main(argv: Sequence[str]) -> int:
    """Return 0, or 2 if the input cannot be used."""
    options = parse_options(HighlightOptions, argv, __doc__)
    from megatron_eslm.launch.bootstrap import single_process
    from megatron_eslm.reports.html import write_page

    with single_process():
        page = render(options)
    write_page(options.output, page, "--output")
    print(f"wrote {options.output}")
    return 0


def render(options: HighlightOptions) -> str:
    """Load, score and draw."""
    from megatron_eslm.reports.highlight import Column, choose, highlight_page

    model, other, reference = _models(options)
    passages = _passages(options, [m for m in (model, other, reference) if m])
    loss_of_reference = [s.loss for s in reference.score(passages)] if reference else []

    def column(model: ScoringModel, score: Score, alpha: float, title: str) -> Column:
        found = model.score(passages)
        if score == "excess":
            pairs = zip(found, loss_of_reference, strict=True)
            return choose(title, "excess loss", [s.loss - r for s, r in pairs], alpha)
        return choose(title, score, [getattr(s, score) for s in found], alpha)

    score, alpha = options.score, options.alpha
    if not options.two:
        return highlight_page(passages, [column(model, score, alpha, model.name)], model.tokenizer)
    score_b = options.score_b or score
    alpha_b = alpha if options.alpha_b is None else options.alpha_b
    titles = [f"{model.name}, {score}", f"{other.name}, {score_b}"]
    if alpha != alpha_b:
        titles = [f"{t}, α {a:g}" for t, a in zip(titles, (alpha, alpha_b), strict=True)]
    columns = [
        column(model, score, alpha, titles[0]),
        column(other, score_b, alpha_b, titles[1]),
    ]
    return highlight_page(passages, columns, model.tokenizer)


def _models(options: HighlightOptions) -> tuple[ScoringModel, ScoringModel, ScoringModel | None]:
    """The first, the second (which may be the first), and the reference model."""
    from megatron_eslm.data.tokenizers.build import same_ids
    from megatron_eslm.reports.groups import default_labels
    from megatron_eslm.reports.token_scores import open_scoring_model

    model = other = open_scoring_model(options.load, options.tag)
    if options.load_b is not None:
        other = open_scoring_model(options.load_b, options.tag_b, "--load-b")
    if other.name == model.name and options.load_b not in (None, options.load):
        # Recipes save each run in a folder of the same name.
        names = default_labels([options.load, options.load_b])
        model, other = (
            replace(m, name=f"{name}, iteration {m.weights.iteration}")
            for m, name in zip((model, other), names, strict=True)
        )
    reference = None
    if options.reference is not None:
        reference = open_scoring_model(options.reference, flag="--reference")
    for candidate in (other, reference):
        if candidate is not None and not same_ids(candidate.tokenizer, model.tokenizer):
            raise ConfigError(
                f"{candidate.name} and {model.name} have different tokenizers, so the same text "
                "has other tokens. Compare models of one tokenizer."
            )
    return model, other, reference


def _passages(options: HighlightOptions, models: list[ScoringModel]) -> list[Passage]:
    """What all models read."""
    from megatron_eslm.reports.held_out import held_out
    from megatron_eslm.reports.passages import passages_of_text, read_text, validation_passages
    from megatron_eslm.reports.token_scores import window_of

    tokenizer, window = models[0].tokenizer, window_of(models, options.seq_length)
    if options.text is not None:
        passages = passages_of_text(read_text(options.text), options.text, tokenizer, window)
        return passages[: options.samples]
    assert options.data_path is not None
    read = held_out(models, options.split)
    return validation_passages(
        options.data_path,
        read.split,
        tokenizer,
        window,
        options.samples,
        first_only=True,
        eod_mask_loss=read.eod_mask_loss,
    )


if __name__ == "__main__":
    sys.exit(main())
