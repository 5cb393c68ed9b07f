"""Our LM and lm-eval's own on the exported folder agree on every request, where HFLM has one.

Each way in which such a class can go wrong has a test of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from megatron_eslm.errors import ConfigError
from megatron_eslm.evaluation.models import find_candidate, load_lm
from megatron_eslm.evaluation.native_lm import NativeLM
from megatron_eslm.launch.bootstrap import single_process
from megatron_eslm.parallel.mesh import build_mesh

from .conftest import POSITIONS, Pair

TOLERANCE = 1e-5
"""Of a sum of log-probabilities, relative to it."""


def load(folder: str, batch_tokens: int = 1000, dtype: torch.dtype = torch.float32) -> NativeLM:
    candidate = find_candidate(folder, None)
    return load_lm(candidate, build_mesh(), dtype, torch.device("cpu"), batch_tokens, quiet=True)


@pytest.fixture(scope="module")
def native(pair: Pair) -> Iterator[NativeLM]:
    with single_process():
        yield load(pair.native)


@pytest.fixture(scope="module")
def hflm(pair: Pair) -> HFLM:
    return HFLM(pretrained=pair.hf, device="cpu", batch_size=1, dtype="float32")


def ask(lm: Any, kind: str, *arguments: tuple) -> list:
    requests = [
        Instance(request_type=kind, doc={}, arguments=each, idx=i)
        for i, each in enumerate(arguments)
    ]
    return getattr(lm, kind)(requests)


CONTINUATIONS = [
    ("The cat sat on", " the mat"),
    ("The cat sat on", " a"),
    ("The cat sat on", " a"),
    ("The cat sat on", " é"),
    ("ends in blanks  ", "then goes on"),
    ("", "no context"),
    ("long " * 40, "and cut from the left"),
    ("x" * 63, "y"),
    ("x" * 64, "y"),
    ("x" * 65, "y"),
    ("", "z" * POSITIONS),
]


def test_continuations_score_as_with_transformers(native: NativeLM, hflm: HFLM) -> None:
    ours = ask(native, "loglikelihood", *CONTINUATIONS)
    theirs = ask(hflm, "loglikelihood", *CONTINUATIONS)
    for (mine, greedy), (his, likewise), what in zip(ours, theirs, CONTINUATIONS, strict=True):
        assert mine == pytest.approx(his, rel=TOLERANCE), what
        assert greedy == likewise, what
    assert ours[1] == ours[2]


def test_a_greedy_continuation_is_known_as_one(native: NativeLM, hflm: HFLM) -> None:
    texts = ["abc", "of all", "The", "q", "hat", "zz", "  x", "0", "[", "not"]
    both = [(text, chr(byte)) for text in texts for byte in range(32, 127)]
    ours = [greedy for _, greedy in ask(native, "loglikelihood", *both)]
    theirs = [greedy for _, greedy in ask(hflm, "loglikelihood", *both)]
    assert ours == theirs
    assert any(ours)


def test_padding_of_the_vocabulary_takes_no_probability(native: NativeLM) -> None:
    """1. Its rows are zeros, so their logits are 0, often above all others."""
    every = [
        torch.tensor(native._scorer.score([_wanted((65, 66, 67), label)])[0].log_probability)
        for label in range(257)
    ]
    assert float(torch.stack(every).exp().sum()) == pytest.approx(1.0, abs=1e-5)
    likeliest: list[int] = []
    rows = [[n] for n in range(256)]
    native._scorer.extend(rows, [1] * 256, lambda _, new: bool(likeliest.append(new)))
    assert len(likeliest) == 256
    assert all(0 <= each < 257 for each in likeliest)


def _wanted(inputs: tuple[int, ...], label: int) -> Any:
    from megatron_eslm.evaluation.scorer import Wanted

    return Wanted(inputs, (label,))


def test_no_context_is_the_end_of_a_document(native: NativeLM) -> None:
    """2. And no other context gets one."""
    ids = native.tok_encode("word")
    (found,) = ask(native, "loglikelihood", ("", "word"))
    (asked,) = native._loglikelihood_tokens([(None, [256], ids)])
    (other,) = native._loglikelihood_tokens([(None, [256, *ids[:2]], ids[2:])])
    assert found == asked
    assert ask(native, "loglikelihood", ("wo", "rd"))[0] != other


def test_what_is_too_long_loses_its_beginning(native: NativeLM) -> None:
    """3. By as much as must be: the last label needs no position."""
    context = "".join(chr(97 + n % 26) for n in range(300))
    (long,) = ask(native, "loglikelihood", (context, "end"))
    (fits,) = ask(native, "loglikelihood", (context[-(POSITIONS - 2) :], "end"))
    (short,) = ask(native, "loglikelihood", (context[-(POSITIONS - 3) :], "end"))
    assert long == fits != short
    with pytest.raises(ConfigError, match="A continuation has 65 tokens"):
        ask(native, "loglikelihood", ("context", "z" * (POSITIONS + 1)))


def test_context_and_continuation_are_tokenized_together(native: NativeLM) -> None:
    """4. Blanks that end a context belong to what follows."""
    (apart,) = ask(native, "loglikelihood", ("on ", "the"))
    (moved,) = ask(native, "loglikelihood", ("on", " the"))
    assert apart == moved


def test_rows_do_not_depend_on_their_batch(pair: Pair, native: NativeLM) -> None:
    """5. Padding on the right is not seen."""
    alone = load(pair.native, batch_tokens=1)
    wide = ask(native, "loglikelihood", *CONTINUATIONS)
    for (one, _), (many, _) in zip(ask(alone, "loglikelihood", *CONTINUATIONS), wide, strict=True):
        assert one == pytest.approx(many, rel=TOLERANCE)


def test_whole_texts_score_as_with_transformers(native: NativeLM, hflm: HFLM) -> None:
    texts = [("short",), ("The quick brown fox. " * 12,), ("x" * 64,), ("x" * 65,)]
    ours = ask(native, "loglikelihood_rolling", *texts)
    assert ours == pytest.approx(ask(hflm, "loglikelihood_rolling", *texts), rel=TOLERANCE)


def test_texts_are_continued_as_with_transformers(native: NativeLM, hflm: HFLM) -> None:
    settings = {"until": ["\n\n\n"], "do_sample": False, "max_gen_toks": 20}
    contexts = ["The cat", "a", "of them all " * 20, "?!", "12 + 7 =", "Question: who?\nAnswer:"]
    asked = [(context, dict(settings)) for context in contexts]
    ours = ask(native, "generate_until", *asked)
    theirs = ask(hflm, "generate_until", *asked)
    assert ours == theirs
    assert all(ours)
    # The first character of each text is a stop sequence now: what is before it stays.
    stops = [
        (c, {**settings, "until": [text[3:5]]}) for c, text in zip(contexts, ours, strict=True)
    ]
    cut = ask(native, "generate_until", *stops)
    assert cut == ask(hflm, "generate_until", *stops)
    assert all(len(short) < len(long) for short, long in zip(cut, ours, strict=True))


def test_what_cannot_be_generated_is_refused(native: NativeLM) -> None:
    with pytest.raises(ConfigError, match="sampled text"):
        ask(native, "generate_until", ("a", {"do_sample": True, "temperature": 0.7}))
    with pytest.raises(ConfigError, match="64 positions"):
        ask(native, "generate_until", ("a", {"max_gen_toks": 64}))


def test_bfloat16_sums_in_float32(pair: Pair, native: NativeLM) -> None:
    half = load(pair.native, dtype=torch.bfloat16)
    for (rough, _), (exact, _) in zip(
        ask(half, "loglikelihood", *CONTINUATIONS),
        ask(native, "loglikelihood", *CONTINUATIONS),
        strict=True,
    ):
        assert rough == pytest.approx(exact, rel=0.05)
        assert rough != exact
