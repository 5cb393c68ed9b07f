"""Highlight the tokens of a text that selection would keep (Figures 12 to 16 of the ESLM paper)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_eslm.data.tokenizers.build import Tokenizer
from megatron_eslm.errors import ConfigError
from megatron_eslm.ops.keep_rule import keep_riskiest
from megatron_eslm.reports import html
from megatron_eslm.reports.passages import END_OF_DOCUMENT, Passage, pieces
from megatron_eslm.reports.tables import Table

SHADES = 4
"""Number of shades for kept tokens: quartiles of their scores."""

_STYLE = """
:root { --mark: 226 110 0; }
@media (prefers-color-scheme: dark) { :root { --mark: 255 148 64; } }
.columns { display: grid; gap: 1rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.columns > * { min-width: 0; }
h3 { font-size: 1rem; margin: .4rem 0; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.75; font-size: .95rem;
  border: 1px solid var(--faint); border-radius: .5rem; padding: .8rem 1rem; margin: 0; }
.text mark { color: inherit; border-radius: .2rem; padding: .08em 0; }
.k0 { background: rgb(var(--mark) / .15); } .k1 { background: rgb(var(--mark) / .26); }
.k2 { background: rgb(var(--mark) / .40); } .k3 { background: rgb(var(--mark) / .58); }
.text s, .key s { color: var(--muted); text-decoration: underline dotted var(--muted); }
.key mark, .key s { padding: .1em .5em; border-radius: .2rem; margin-right: .2rem; }
.key mark { color: var(--ink); }
td.bar, td.bar-head { text-align: left; width: 9rem; }
td.bar span { display: block; height: .8em; background: rgb(var(--mark) / .6); min-width: 1px; }
code { white-space: pre; }
"""


@dataclass(frozen=True)
class Column:
    """One selection over all passages."""

    title: str
    score: str
    """Description of the scores, for people."""
    alpha: float
    scores: list[np.ndarray]
    """float32 [n] per passage."""
    kept: list[np.ndarray]
    """bool [n] per passage."""
    tau: float
    """Lowest kept score."""


def choose(title: str, score: str, scores: Sequence[np.ndarray], alpha: float) -> Column:
    """Apply the keep rule to all passages together, as to one micro-batch.

    Raises:
        ConfigError: alpha is outside [0, 1).
    """
    if not 0.0 <= alpha < 1.0:
        raise ConfigError(f"--alpha {alpha:g} is outside [0, 1): it is the share to drop.")
    rule = keep_riskiest(torch.from_numpy(np.concatenate(scores)), alpha)
    ends = np.cumsum([len(part) for part in scores])[:-1]
    return Column(title, score, alpha, list(scores), np.split(rule.keep.numpy(), ends), rule.tau)


def highlight_page(
    passages: Sequence[Passage], columns: Sequence[Column], tokenizer: Tokenizer
) -> str:
    """Render a page with every passage once per column, and token counts above."""
    body = [_key(columns)]
    if len(columns) == 2:
        body.append(html.table(_agreement(*columns)))
    body.append("<h2>The tokens that are kept most</h2>")
    body.append(_in_columns([_top(passages, column, tokenizer) for column in columns]))
    for number, passage in enumerate(passages):
        body.append(f"<h2>{html.escape(passage.name)}</h2>")
        texts = [_text(passage, column, number, tokenizer) for column in columns]
        body.append(_in_columns(texts))
    return html.document("Tokens that selection keeps", "\n".join(body), _STYLE)


def top_tokens(
    passages: Sequence[Passage], column: Column, count: int = 20
) -> list[tuple[int, int, int]]:
    """(id, times kept, occurrences) of the tokens that are kept most often."""
    kept: Counter[int] = Counter()
    occurring: Counter[int] = Counter()
    for passage, keep in zip(passages, column.kept, strict=True):
        kept.update(passage.ids[keep].tolist())
        occurring.update(passage.ids.tolist())
    ranked = sorted(kept.items(), key=lambda item: (-item[1], item[0]))
    return [(token, times, occurring[token]) for token, times in ranked[:count]]


def visible(text: str) -> str:
    """A token's text with visible white space."""
    for character, sign in ((" ", "␣"), ("\n", "↵"), ("\t", "⇥"), ("\r", "␍")):
        text = text.replace(character, sign)
    return text


def spelling(tokenizer: Tokenizer, token: int) -> str:
    """A single token's text, as `visible` shows it."""
    return visible("".join(text for text, _ in pieces(tokenizer, [token])))


def _in_columns(blocks: Sequence[str]) -> str:
    return '<div class="columns">\n' + "\n".join(f"<div>{b}</div>" for b in blocks) + "\n</div>"


def _key(columns: Sequence[Column]) -> str:
    lines = []
    for column in columns:
        kept = int(sum(keep.sum() for keep in column.kept))
        total = sum(map(len, column.kept))
        lines.append(
            f"<p><strong>{html.escape(column.title)}</strong>: by {html.escape(column.score)}, α "
            f"{column.alpha:g}; {kept:,} of {total:,} tokens kept ({kept / total:.1%}), those of "
            f"{column.tau:.3f} nats and above.</p>"
        )
    shades = "".join(
        f'<mark class="k{n}">{name}</mark>'
        for n, name in enumerate(("lowest quarter", "second", "third", "highest quarter"))
    )
    return (
        f'<div class="notes">{"".join(lines)}</div>\n'
        f'<p class="key muted">Kept: {shades} of the kept tokens\' scores. Dropped: <s>like '
        "this</s>. The keep rule is taken over all passages together, as over one micro-batch. A "
        "token is scored from what stands before it in its passage; point at one for its score.</p>"
    )


def _agreement(a: Column, b: Column) -> Table:
    one, two = np.concatenate(a.kept), np.concatenate(b.kept)
    cases = (
        ("kept by both", one & two),
        (f"by {a.title} only", one & ~two),
        (f"by {b.title} only", ~one & two),
        ("by neither", ~one & ~two),
    )
    rows = [[name, f"{int(which.sum()):,}", f"{which.mean():.1%}"] for name, which in cases]
    return Table("Where the two agree", ["", "tokens", "share"], rows)


def _top(passages: Sequence[Passage], column: Column, tokenizer: Tokenizer) -> str:
    found = top_tokens(passages, column)
    most = max((times for _, times, _ in found), default=1)
    rows = "\n".join(
        f'<tr><th scope="row"><code>{html.escape(spelling(tokenizer, token))}</code></th>'
        f"<td>{times:,}</td><td>{times / occurring:.0%}</td>"
        f'<td class="bar"><span style="width:{100 * times / most:.1f}%"></span></td></tr>'
        for token, times, occurring in found
    )
    return (
        f'<h3>{html.escape(column.title)}</h3><div class="scroll" tabindex="0"><table><thead><tr>'
        '<th scope="col">token</th><th scope="col">kept</th><th scope="col">of its occurrences</th>'
        f'<td class="bar-head"></td></tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _text(passage: Passage, column: Column, number: int, tokenizer: Tokenizer) -> str:
    scores, kept = column.scores[number], column.kept[number]
    of_kept = np.concatenate(column.scores)[np.concatenate(column.kept)]
    quarters = np.quantile(of_kept, np.arange(1, SHADES) / SHADES)
    parts, begin = [], 0
    for text, length in pieces(tokenizer, passage.ids.tolist()):
        own = slice(begin, begin + length)
        begin += length
        told = ", ".join(f"{score:.2f}" for score in scores[own])
        title = html.escape(f"{column.score} {told} nats")
        if text != END_OF_DOCUMENT:
            # A line break alone has no width that a mark could cover.
            text = text.replace("\n", "↵\n")
        if kept[own].any():
            shade = int(np.searchsorted(quarters, scores[own].max(), side="right"))
            parts.append(f'<mark class="k{shade}" title="{title}">{html.escape(text)}</mark>')
        else:
            parts.append(f'<s title="{title}">{html.escape(text)}</s>')
    return f'<h3>{html.escape(column.title)}</h3><p class="text">{"".join(parts)}</p>'
