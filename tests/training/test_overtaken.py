"""`--eslm-overtaken` in training: when, the same in every layout, and over a restart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_eslm.data.index_file import read_index
from megatron_eslm.data.reference_losses import ReferenceMeta, ReferenceWriter, data_fingerprint
from tests.harness import run_ranks

from .conftest import make_domain
from .runs import ROWS, Outcome, assert_same_dumps, read_dumps, train, words

LOSS = 5.3
"""What the made-up reference loses on every token. The untrained model loses more, for a while."""
EXCESS = (
    *("--eslm-score", "excess", "--reference-losses", "constant", "--eslm-alpha", "0.25"),
    *("--global-batch-size", 4 * ROWS, "--eslm-scope", "step"),
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("text")
    prefixes = [make_domain(folder / name, name, 300) for name in ("prose", "code")]
    for prefix in prefixes:
        index = read_index(prefix)
        meta = ReferenceMeta(
            data=data_fingerprint(index),
            weights="w" * 64,
            seq_length=None,
            dtype="float32",
            tokens=index.tokens,
        )
        with ReferenceWriter(prefix, "constant", meta) as writer:
            writer.append(np.full(index.tokens, LOSS, np.float32))
    return prefixes


def test_it_stops_where_the_mean_excess_falls_below_0(text: list[str], tmp_path: Path) -> None:
    def argv(dp: int, *flags: str | int | Path) -> list[str]:
        return words(text, *EXCESS, *flags, iters=8, micro_batch_size=ROWS // dp)

    def one(rank: int) -> list[Outcome]:
        dump, cut = ("--dump-selection", tmp_path / "one"), ("--save", tmp_path / "cut")
        whole = train(argv(1, *dump), tmp_path / "whole.jsonl")
        stop = whole.column("alpha").index(0.0)
        parts = []
        for exit_at in (stop - 1, stop, 8):  # before it stops, right after that, and the rest
            more = ("--load", tmp_path / "cut", "--exit-interval", exit_at)
            parts.append(train(argv(1, *cut, *more), tmp_path / f"{exit_at}.jsonl"))
        keep = train(argv(1, "--eslm-overtaken", "keep"), tmp_path / "keep.jsonl")
        return [whole, keep, *parts]

    def pipeline(rank: int) -> Outcome:
        flags = ("--pipeline-model-parallel-size", 2, "--dump-selection", tmp_path / "pp2dp2")
        return train(argv(2, *flags), tmp_path / "pp2dp2.jsonl")

    whole, keep, *parts = run_ranks(1, one)[0]
    alpha, excess = whole.column("alpha"), whole.column("mean_excess")
    stop = alpha.index(0.0)
    assert 2 <= stop < 7
    assert alpha == [0.25] * stop + [0.0] * (8 - stop)
    assert whole.column("kept_tokens")[stop:] == [1.0] * (8 - stop)
    assert excess[stop - 2] > 0 > excess[stop - 1] == excess[-1]
    assert keep.column("alpha") == [0.25] * 8
    assert keep.column("loss")[:stop] == whole.column("loss")[:stop]

    smoothed = None
    for dump, seen in zip(read_dumps(tmp_path / "one").values(), excess[:stop], strict=False):
        mean = np.nanmean(dump["token_scores"].astype(np.float64))
        smoothed = mean if smoothed is None else 0.9 * smoothed + 0.1 * mean
        assert seen == pytest.approx(smoothed, abs=1e-5)

    for column in ("alpha", "mean_excess", "loss", "grad_norm", "tokens_trained"):
        assert [x for part in parts for x in part.column(column)] == whole.column(column), column

    other = run_ranks(4, pipeline)[0]
    assert other.column("alpha") == alpha
    np.testing.assert_allclose(other.column("mean_excess"), excess, atol=1e-5)
    assert_same_dumps(tmp_path / "pp2dp2", tmp_path / "one")
