"""Marked text, counted tokens, and the page they stand on."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_eslm.data.tokenizers.build import ByteTokenizer
from megatron_eslm.errors import ConfigError
from megatron_eslm.reports.highlight import choose, highlight_page, top_tokens, visible
from megatron_eslm.reports.passages import Passage

from .test_html import HOSTILE, Outline, assert_stands_alone


def passage(text: str, name: str = "text") -> Passage:
    tokenizer = ByteTokenizer()
    return Passage(name, np.array(tokenizer.encode(text)), tokenizer.eod)


def scores(*values):
    return np.array(values, dtype=np.float32)


def test_the_keep_rule_is_taken_over_all_passages():
    column = choose("m", "loss", [scores(5, 1, 4), scores(2, 9)], 0.4)
    assert [keep.tolist() for keep in column.kept] == [[True, False, True], [False, True]]
    assert column.tau == 4.0
    assert all(keep.all() for keep in choose("m", "loss", [scores(5, 1)], 0.0).kept)
    with pytest.raises(ConfigError, match=r"--alpha 1 is outside"):
        choose("m", "loss", [scores(1)], 1.0)


def test_top_tokens():
    passages = [passage("abab"), passage("ca")]
    column = choose("m", "loss", [scores(9, 8, 7, 1), scores(4, 5)], 0.3)
    assert top_tokens(passages, column) == [(97, 3, 3), (98, 1, 2)]
    assert top_tokens(passages, column, count=1) == [(97, 3, 3)]


def test_a_page_marks_what_is_kept():
    passages = [passage("abcd\nf", name=HOSTILE)]
    column = choose("A", "loss", [scores(4, 1, 3, 2, 6, 5)], 0.34)
    page = highlight_page(passages, [column], ByteTokenizer())
    assert_stands_alone(page)
    text = page[page.index('<p class="text">') :]
    # Three are kept, of which each quarter of the scores has its shade.
    assert '<mark class="k0" title="loss 4.00 nats">a</mark>' in text
    assert '<s title="loss 1.00 nats">b</s>' in text
    assert '<mark class="k3" title="loss 6.00 nats">↵\n</mark>' in text
    assert text.count("<mark") == 3 and text.count("<s ") == 3
    assert "3 of 6 tokens kept (50.0%), those of 4.000 nats and above" in Outline(page).text
    assert HOSTILE in Outline(page).text


def test_hostile_text_stays_text():
    item = passage(HOSTILE)
    some = np.arange(len(item.ids), dtype=np.float32)
    page = highlight_page([item], [choose("A", "loss", [some], 0.5)], ByteTokenizer())
    outline = assert_stands_alone(page)
    assert HOSTILE in outline.text


def test_two_columns_and_where_they_agree():
    passages = [passage("abcd")]
    a = choose("A", "loss", [scores(4, 3, 2, 1)], 0.5)
    b = choose("B", "entropy", [scores(4, 1, 3, 2)], 0.5)
    text = Outline(highlight_page(passages, [a, b], ByteTokenizer())).text
    lines = text.split()
    assert text.count("tokens kept") == 2
    for case in ("kept by both125.0%", "by A only125.0%", "by B only125.0%", "by neither125.0%"):
        assert case in text
    assert "A" in lines and "B" in lines


def test_a_character_of_several_tokens_is_one_piece():
    passages = [passage("é")]
    page = highlight_page(passages, [choose("A", "loss", [scores(1, 2)], 0.5)], ByteTokenizer())
    assert 'title="loss 1.00, 2.00 nats">é</mark>' in page


def test_white_space_is_seen():
    assert visible(" a\tb\r\n") == "␣a⇥b␍↵"
