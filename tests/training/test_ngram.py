"""N-gram references: against a plain count in dictionaries, and as the tool stores them."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_eslm.data.data_options import DataOptions
from megatron_eslm.data.index_file import read_index
from megatron_eslm.data.preprocess import preprocess
from megatron_eslm.data.reference_losses import losses_path, open_reference_losses
from megatron_eslm.data.source import open_data
from megatron_eslm.data.tokenizers.build import ByteTokenizer
from megatron_eslm.frozen import score_ngram as scoring
from megatron_eslm.frozen.ngram import NGramModel, Text

from ..argv import later_wins
from ..interop.conftest import load_tool

EOD = 0
BEGIN = -1
"""What stands before the end-of-document id in front of a document."""
Event = tuple[int, ...]
"""A context and what follows it."""


def events_of(texts: list[Text], order: int) -> list[tuple[Event, bool]]:
    """Each token with its context, and whether it is counted."""
    events = []
    for text in texts:
        before = [BEGIN, EOD]
        for token, starts, counted in zip(*(x.tolist() for x in text), strict=True):
            before = [BEGIN, EOD] if starts else before[-2:]
            events.append(((*before[3 - order :], token), counted))
            before.append(token)
    return events


def discounts_of(counted: list[Event]) -> list[float]:
    """n1 / (n1 + 2 n2) of each order, from the highest; of lower ones, of different n-grams."""
    discounts = []
    while len(counted[0]):
        sizes = Counter(Counter(counted).values())
        discounts.append(sizes[1] / (sizes[1] + 2 * sizes[2]) if sizes[1] else 0.0)
        counted = [ngram[1:] for ngram in set(counted)]
    return [min(max(d, 0.1), 0.9) for d in discounts]


def kneser_ney(event: Event, counted: list[Event], discounts: list[float], vocab: int) -> float:
    """p of the last token by the definition, from counts that are made anew."""
    if not event:
        return 1 / vocab
    counts = Counter(counted)
    lower = kneser_ney(event[1:], [ngram[1:] for ngram in counts], discounts[1:], vocab)
    total = sum(n for ngram, n in counts.items() if ngram[:-1] == event[:-1])
    followers = sum(ngram[:-1] == event[:-1] for ngram in counts)
    if not total:
        return lower
    d = discounts[0]
    return (max(counts[event] - d, 0) + d * followers * lower) / total


def made_up(seed: int, documents: int, vocab: int) -> Text:
    generator = np.random.default_rng(seed)
    ids, starts, counted = [], [], []
    for number in range(documents):
        length = int(generator.integers(1, 9))
        ids += [*np.minimum(generator.geometric(0.3, length), vocab - 1).tolist(), EOD]
        starts += [True, *[False] * length]
        counted += [number % 5 != 4] * (length + 1)
    return Text(np.array(ids, np.uint16), np.array(starts), np.array(counted))


@pytest.mark.parametrize("order", [2, 3])
def test_losses_are_those_of_a_plain_count_without_the_token_itself(order: int) -> None:
    vocab, texts = 12, [made_up(1, 9, 12), made_up(2, 6, 12)]
    events = events_of(texts, order)
    everything = [event for event, counted in events if counted]
    discounts = discounts_of(everything)
    expected = []
    for event, is_counted in events:
        others = list(everything)
        if is_counted:
            others.remove(event)
        expected.append(-math.log(kneser_ney(event, others, discounts, vocab)))
    model = NGramModel(texts, order=order, vocab_size=vocab, eod=EOD)
    losses = np.concatenate([model.losses(0, 7), model.losses(7, len(events))])
    np.testing.assert_allclose(losses, expected, rtol=1e-12)
    # A token that is not counted is predicted by a distribution over all tokens.
    event = next(event for event, counted in events if not counted)
    alternatives = [(*event[:-1], token) for token in range(vocab)]
    total = sum(kneser_ney(e, everything, discounts, vocab) for e in alternatives)
    assert total == pytest.approx(1.0)


@pytest.mark.parametrize("order", [2, 3])
def test_a_text_does_not_recognise_itself(order: int) -> None:
    ids = np.arange(1, 500)
    starts = np.zeros(499, dtype=bool)
    starts[0] = True
    text = Text(ids, starts, np.ones(499, dtype=bool))
    once = NGramModel([text], order=order, vocab_size=500, eod=EOD)
    assert (once.losses(0, 499) > math.log(499)).all()
    twice = NGramModel([text, text], order=order, vocab_size=500, eod=EOD)
    assert (twice.losses(1, 499) < 1.0).all()


class Killed(BaseException):
    pass


def run_tool(*argv: str | int | Path) -> int:
    return load_tool("score_reference").main(later_wins(map(str, argv)))


def test_the_tool_stores_them_for_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    prefixes = [str(tmp_path / name) for name in ("a", "b")]
    for number, prefix in enumerate(prefixes):
        texts = [f"{n} the riskiest token is kept" * (1 + number) for n in range(20)]
        preprocess(["text"], prefix, ByteTokenizer(), documents=texts)
    words = ("--ngram", 3, "--name", "trigram", "--split", "90,10,0", "--data-path", *prefixes)
    assert run_tool(*words) == 0
    indices = [read_index(prefix) for prefix in prefixes]
    texts = [scoring._text(index, "90,10,0") for index in indices]
    assert [int(text.starts_N.sum()) for text in texts] == [20, 20]
    model = NGramModel(texts, order=3, vocab_size=257, eod=256)
    expected = np.split(model.losses(0, sum(i.tokens for i in indices)), [indices[0].tokens])
    source = open_data(DataOptions(data_path=("1", prefixes[0], "1", prefixes[1])))
    stored = open_reference_losses(source, "trigram")
    assert stored.seq_length is None
    for losses, exact in zip(stored.by_domain, expected, strict=True):
        np.testing.assert_allclose(losses, exact, rtol=2**-11, atol=1e-7)
    # The last tenth of the documents was predicted, and not counted.
    first_of_valid = int(indices[0].lengths[:18].sum())
    assert texts[0].counted_N.sum() == first_of_valid
    said, outside = capsys.readouterr().out, expected[0][first_of_valid:].mean()
    assert f"{indices[0].tokens} tokens scored now, mean loss" in said
    assert f" nats ({outside:.4f} outside the training documents)\n" in said

    # Killed after a part, it goes on; from other text or with other n-grams, it does not.
    path = losses_path(prefixes[0], "trigram")
    whole, facts = path.read_bytes(), path.with_suffix(".json")
    monkeypatch.setattr(scoring, "_CHUNK", 100)
    append, calls = scoring.ReferenceWriter.append, []

    def killed(self: scoring.ReferenceWriter, losses: np.ndarray) -> None:
        calls.append(len(losses))
        if len(calls) == 3:
            raise Killed
        append(self, losses)

    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(scoring.ReferenceWriter, "append", killed)
        run_tool(*words, "--overwrite")
    assert json.loads(facts.read_text())["scored"] == 200
    for other in (("--ngram", 2), ("--split", "80,20,0"), ("--data-path", prefixes[0])):
        assert run_tool(*words, *other) == 2
        assert "holds losses from another source" in capsys.readouterr().err
    assert run_tool(*words) == 0
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "Give one reference: --load with the folder of a model, or --ngram 2 or 3."),
        (("--ngram", 3, "--load", "runs"), "Give one reference"),
        (("--load", "runs"), "--load runs needs --seq-length"),
        (("--ngram", 2, "--seq-length", 8), "--seq-length has no meaning with --ngram 2"),
        (("--ngram", 2, "--split", "40,60,0"), "leaves no training documents"),
    ],
)
def test_what_cannot_be_is_refused(
    words: tuple, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    prefix = str(tmp_path / "text")
    preprocess(["text"], prefix, ByteTokenizer(), documents=["the riskiest token is kept"])
    assert run_tool("--data-path", prefix, "--name", "n", *words) == 2
    assert message in capsys.readouterr().err


def test_counts_that_do_not_fit_memory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    prefix = str(tmp_path / "text")
    preprocess(["text"], prefix, ByteTokenizer(), documents=["the riskiest token is kept"])
    free = scoring.psutil.virtual_memory().available
    monkeypatch.setattr(scoring, "_BYTES_PER_TOKEN", free)
    assert run_tool("--data-path", prefix, "--name", "n", "--ngram", 2) == 2
    assert "Counting n-grams of 27 tokens takes some" in capsys.readouterr().err
    assert not losses_path(prefix, "n").exists()
