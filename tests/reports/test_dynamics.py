"""Classes of tokens by the course of their losses."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_eslm.data.tokenizers.build import ByteTokenizer
from megatron_eslm.errors import ConfigError
from megatron_eslm.reports import dynamics
from megatron_eslm.reports.passages import Passage

from .test_html import assert_stands_alone

ITERATIONS = [10, 20, 40]
#                       L→L  H→L  L→H  H→H  a line that falls by less than 0.2 nats
LOSSES = np.array(
    [
        [1.0, 6.0, 2.0, 7.0, 1.05],
        [1.0, 5.0, 3.0, 7.0, 1.05],
        [1.0, 3.0, 4.0, 7.0, 0.90],
    ],
    dtype=np.float32,
)


def test_the_rule():
    found = dynamics.classify(ITERATIONS, LOSSES)
    assert found.class_N.tolist() == [0, 1, 2, 3, 0]
    # Against an ordinary fit.
    for column, change in enumerate(found.change_N):
        slope, _ = np.polyfit(ITERATIONS, LOSSES[:, column].astype(np.float64), 1)
        assert change == pytest.approx(30 * slope)
    assert sum(found.share(number) for number in range(4)) == pytest.approx(1.0)
    assert found.share(0) == 0.4


def test_the_threshold_moves_the_border():
    assert dynamics.classify(ITERATIONS, LOSSES, 0.1).class_N.tolist() == [0, 1, 2, 3, 1]
    assert dynamics.classify(ITERATIONS, LOSSES, 9.0).class_N.tolist() == [0, 0, 3, 3, 0]


@pytest.mark.parametrize(
    ("iterations", "losses", "threshold", "message"),
    [
        (ITERATIONS[:2], LOSSES[:2], 0.2, r"2 checkpoints \(10, 20\) .* --keep-last 0"),
        (ITERATIONS, LOSSES, -1.0, "--threshold -1"),
        (ITERATIONS, np.where(LOSSES == 5, np.nan, LOSSES), 0.2, "Losses at iteration 20"),
    ],
)
def test_what_has_no_course(iterations, losses, threshold, message):
    with pytest.raises(ConfigError, match=message):
        dynamics.classify(iterations, losses, threshold)


@pytest.fixture
def report():
    tokenizer = ByteTokenizer()
    passages = [
        Passage("one", np.array(tokenizer.encode("<b>")), tokenizer.eod),
        Passage("two", np.array(tokenizer.encode("x ")), tokenizer.eod),
    ]
    found = dynamics.classify(ITERATIONS, LOSSES)
    return found, dynamics.tables(found, passages, tokenizer)


def test_tables(report):
    shares, courses, examples = report[1]
    assert shares.rows == [
        ["L→L low from early on", "2", "40.0%", "1.025", "0.950"],
        ["H→L learned", "1", "20.0%", "6.000", "3.000"],
        ["L→H unlearned", "1", "20.0%", "2.000", "4.000"],
        ["H→H high to the end", "1", "20.0%", "7.000", "7.000"],
    ]
    assert courses.rows[1] == ["20", "1.025", "5.000", "3.000", "7.000", "3.410"]
    assert ["H→L", "<", "b", "6.00", "3.00"] in examples.rows
    assert ["H→H", "", "x", "7.00", "7.00"] in examples.rows
    assert ["L→L", "x", "␣", "1.05", "0.90"] in examples.rows
    assert len(examples.rows) == 5


def test_a_class_without_tokens():
    found = dynamics.classify(ITERATIONS, LOSSES[:, :1])
    assert dynamics._shares(found).rows[1] == ["H→L learned", "0", "0.0%", "–", "–"]
    labels = [line.get_label() for line in dynamics.draw(found).axes[0].lines]
    assert labels == ["L→L low from early on, 100.0% of the tokens", "all tokens"]


def test_page_and_markdown(report):
    found, tables = report
    outline = assert_stands_alone(dynamics.page(found, tables, "Dynamics <x>"))
    assert "Dynamics <x>" in outline.text and len(outline.links) == 2
    text = dynamics.markdown(tables, "Dynamics", "d.png")
    assert "](<d.png>)" in text and "| H→L | \\< | b | 6.00 | 3.00 |" in text
