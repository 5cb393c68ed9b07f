"""Classify tokens by how their loss changes during training (Rho-1, section 2.1).

The rule is our reading of Rho-1's: fit a least-squares line over iterations to a token's losses at
C checkpoints, and classify by the line's change from the first checkpoint to the last.

    H→L  the line falls by more than the threshold (0.2 nats)
    L→H  it rises by more
    L→L  neither, and the loss at the last checkpoint is at most the mean over all tokens there
    H→H  neither, and it is above that mean

Shape legend: C checkpoints, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megatron_eslm.data.tokenizers.build import Tokenizer
from megatron_eslm.errors import ConfigError
from megatron_eslm.reports import html
from megatron_eslm.reports.curves import LINES, MARKERS, dress, svg
from megatron_eslm.reports.highlight import visible
from megatron_eslm.reports.passages import Passage, pieces
from megatron_eslm.reports.tables import Table, to_markdown
from megatron_eslm.reports.theme import DARK, LIGHT, Theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLASSES = ("L→L", "H→L", "L→H", "H→H")
MEANINGS = ("low from early on", "learned", "unlearned", "high to the end")
LEAST_CHECKPOINTS = 3
_CONTEXT = 12


@dataclass(frozen=True)
class Dynamics:
    """Losses of a fixed set of tokens at several checkpoints, and the class of each token."""

    iterations: list[int]
    """Ascending, [C]."""
    loss_CN: np.ndarray
    """float32, nats."""
    change_N: np.ndarray
    """float64, change of the fitted line from the first checkpoint to the last, nats."""
    class_N: np.ndarray
    """int64, indices into CLASSES."""
    threshold: float

    def share(self, number: int) -> float:
        """Share of tokens in a class."""
        return float((self.class_N == number).mean())


def classify(iterations: Sequence[int], loss_CN: np.ndarray, threshold: float = 0.2) -> Dynamics:
    """Assign every token to one of the four classes.

    Args:
        iterations: iterations of the checkpoints, ascending, [C].
        loss_CN: losses, nats.
        threshold: smallest change of the fitted line, in nats, that counts as a change.

    Raises:
        ConfigError: fewer than three checkpoints, a negative threshold, or a loss that is not
            finite.
    """
    check_checkpoints(iterations)
    if not (math.isfinite(threshold) and threshold >= 0):
        raise ConfigError(f"--threshold {threshold:g} must be a number of nats, 0 or more.")
    if not np.isfinite(loss_CN).all():
        bad = [
            it for it, row in zip(iterations, loss_CN, strict=True) if not np.isfinite(row).all()
        ]
        raise ConfigError(
            f"Losses at iteration {bad[0]} are not finite: that model has diverged. Leave the "
            "checkpoint out with --iterations."
        )
    x_C = np.asarray(iterations, dtype=np.float64)
    centred_C = x_C - x_C.mean()
    slope_N = centred_C @ loss_CN.astype(np.float64) / (centred_C**2).sum()
    change_N = slope_N * (x_C[-1] - x_C[0])
    last_N = loss_CN[-1]
    flat_N = np.where(last_N <= last_N.mean(dtype=np.float64), 0, 3)
    class_N = np.where(change_N < -threshold, 1, np.where(change_N > threshold, 2, flat_N))
    return Dynamics(list(iterations), loss_CN, change_N, class_N, threshold)


def check_checkpoints(iterations: Sequence[int]) -> None:
    """Raise ConfigError if there are too few checkpoints to fit a line."""
    if len(iterations) < LEAST_CHECKPOINTS:
        raise ConfigError(
            f"{len(iterations)} checkpoints ({', '.join(map(str, iterations)) or 'none'}) are too "
            f"few to follow a loss; {LEAST_CHECKPOINTS} or more are needed. Train with --keep-last "
            "0, which keeps every checkpoint, and a shorter --save-interval."
        )


def tables(dynamics: Dynamics, passages: Sequence[Passage], tokenizer: Tokenizer) -> list[Table]:
    """Tables of shares and mean losses of the classes, and examples of each."""
    return [_shares(dynamics), _courses(dynamics), _examples(dynamics, passages, tokenizer)]


def markdown(found: Sequence[Table], title: str, picture: str) -> str:
    """Render the report as Markdown."""
    head = [f"# {title}\n", f"![Mean loss of each class by iteration](<{picture}>)\n"]
    return "\n".join(head + [to_markdown(table) for table in found])


def page(dynamics: Dynamics, found: Sequence[Table], title: str) -> str:
    """Render the report as one HTML page."""
    light, dark = (svg(draw(dynamics, theme)) for theme in (LIGHT, DARK))
    drawing = html.picture(light, dark, "Mean loss of each class of tokens by iteration")
    return html.document(title, f"<figure>{drawing}</figure>\n" + "\n".join(map(html.table, found)))


def draw(dynamics: Dynamics, theme: Theme = LIGHT) -> Figure:
    """Plot the mean loss of each class by iteration."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained", facecolor=theme.ground)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, name in enumerate(CLASSES):
        of_class_N = dynamics.class_N == number
        if of_class_N.any():
            axes.plot(
                dynamics.iterations,
                dynamics.loss_CN[:, of_class_N].mean(axis=1),
                label=f"{name} {MEANINGS[number]}, {dynamics.share(number):.1%} of the tokens",
                color=theme.series[number],
                linestyle=LINES[number],
                marker=MARKERS[number],
                markersize=5,
                linewidth=1.8,
            )
    axes.plot(
        dynamics.iterations,
        dynamics.loss_CN.mean(axis=1),
        label="all tokens",
        color=theme.muted,
        linewidth=1.2,
    )
    axes.set_xlabel("iteration", color=theme.ink)
    axes.set_ylabel("mean loss (nats per token)", color=theme.ink)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, labelcolor=theme.ink)
    dress(axes, theme)
    return figure


def _shares(dynamics: Dynamics) -> Table:
    rows = []
    for number, name in enumerate(CLASSES):
        of_class_N = dynamics.class_N == number
        first, last = dynamics.loss_CN[0, of_class_N], dynamics.loss_CN[-1, of_class_N]
        cells = [f"{first.mean():.3f}", f"{last.mean():.3f}"] if len(first) else ["–", "–"]
        told = f"{name} {MEANINGS[number]}"
        rows.append([told, f"{len(first):,}", f"{dynamics.share(number):.1%}", *cells])
    first, last = dynamics.iterations[0], dynamics.iterations[-1]
    header = ["", "tokens", "share", f"loss at {first}", f"loss at {last}"]
    mean = dynamics.loss_CN[-1].mean(dtype=np.float64)
    return Table(
        f"Classes of {dynamics.loss_CN.shape[1]:,} tokens",
        header,
        rows,
        "By the line of least squares through a token's losses over iterations: H→L falls by more "
        f"than {dynamics.threshold:g} nats from iteration {first} to {last}, L→H rises by more; of "
        f"the others L→L ends at or below the mean loss of all tokens ({mean:.3f}), H→H above.",
    )


def _courses(dynamics: Dynamics) -> Table:
    rows = []
    for row, iteration in enumerate(dynamics.iterations):
        losses_N = dynamics.loss_CN[row]
        cells = []
        for number in range(len(CLASSES)):
            of_class = losses_N[dynamics.class_N == number]
            cells.append(f"{of_class.mean():.3f}" if len(of_class) else "–")
        rows.append([str(iteration), *cells, f"{losses_N.mean():.3f}"])
    return Table("Mean loss by iteration", ["iteration", *CLASSES, "all"], rows)


def _examples(
    dynamics: Dynamics, passages: Sequence[Passage], tokenizer: Tokenizer, each: int = 6
) -> Table:
    """Table of the clearest cases of each class, each token id once."""
    ids_N = np.concatenate([passage.ids for passage in passages])
    last_N = dynamics.loss_CN[-1]
    typical = (dynamics.loss_CN.mean(axis=0), dynamics.change_N, -dynamics.change_N, -last_N)
    rows = []
    for number, name in enumerate(CLASSES):
        seen: set[int] = set()
        for place in np.argsort(typical[number], kind="stable"):
            if dynamics.class_N[place] != number or int(ids_N[place]) in seen:
                continue
            seen.add(int(ids_N[place]))
            before, token = _in_context(int(place), passages, tokenizer)
            first, last = dynamics.loss_CN[0, place], last_N[place]
            rows.append([name, before, token, f"{first:.2f}", f"{last:.2f}"])
            if len(seen) == each:
                break
    header = ["", "what stands before", "token", *(f"loss at {i}" for i in _ends(dynamics))]
    return Table("Examples", header, rows, "The clearest cases of each class, each token once.")


def _ends(dynamics: Dynamics) -> tuple[int, int]:
    return dynamics.iterations[0], dynamics.iterations[-1]


def _in_context(place: int, passages: Sequence[Passage], tokenizer: Tokenizer) -> tuple[str, str]:
    """(text before, text of the token) of one of all passages' tokens."""
    for passage in passages:
        if place < len(passage.ids):
            break
        place -= len(passage.ids)
    begin = max(0, place - _CONTEXT)
    parts = pieces(tokenizer, passage.ids[begin : place + 1].tolist())
    *before, (token, _) = parts
    text = "".join(text for text, _ in before).replace("\n", "↵")
    return ("…" if begin else "") + text, visible(token)
