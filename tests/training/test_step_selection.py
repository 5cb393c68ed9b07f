"""Selection ahead of a step against an independent float64 reading: Algorithm 1 in its two passes.

The batch of lines 4 to 6 is everything that the step reads; that of lines 7 to 12 is each
micro-step of kept sequences, and losses and gradients are means over them.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_eslm.data.batch import Batch
from megatron_eslm.ops.keep_rule import StepShape
from megatron_eslm.parallel.mesh import build_mesh
from megatron_eslm.training.step_selection import Selection, rows_of_rank, select_candidates
from megatron_eslm.watchdog.phases import Phases

from ..harness import run_ranks
from ..model.reference import algorithm1
from ..model.small import CONFIG, make_batch, relative_difference, small_gpt

CANDIDATES, MICRO = 16, 4
"""Rows of a step, and of a micro-step over all ranks."""


@dataclass
class Step:
    """What a step did, over all ranks."""

    kept: list[int]
    tokens: set[tuple[int, int]]
    loss: float
    gradients: dict[str, torch.Tensor]
    tau: float
    nonfinite: list[int]
    """Candidates, as their ranks name them."""


def few_labels() -> Any:
    """Fewer candidates with labels than are to be kept."""
    batch = make_batch(CANDIDATES, seed=2)
    batch.valid_MT[5:] = False
    return batch


def spoilt() -> Any:
    """Row 9 reads an id whose embedding is nan (see `select_and_step`)."""
    batch = make_batch(CANDIDATES, seed=3)
    batch.tokens_MU[9, 2] = 46
    batch.valid_MT[9, 1] = False
    return batch


BATCHES = {
    "full": make_batch(CANDIDATES),
    "padded": make_batch(CANDIDATES, seed=1, padding=True),
    "ties": make_batch(CANDIDATES, seed=1, ties=True),
    "few labels": few_labels(),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "loss": {},
    "entropy": {"eslm_score": "entropy"},
    "instance": {"eslm_level": "instance"},
    "stride": {"eslm_proxy_stride": 2, "eslm_proxy_layers": 2},
}
CASES = {f"{o} {b}": (OPTIONS[o], BATCHES[b]) for o in OPTIONS for b in BATCHES}
ALPHA = 0.3


def select_and_step(options: dict[str, Any], batch: Any) -> Step:
    """In this rank: select among its share of the batch with the others, and train on the rest."""
    mesh = build_mesh()
    rows = MICRO // mesh.dp_size
    model, recorder = small_gpt(mesh=mesh, alpha=ALPHA, eslm_scope="step", **options)
    if batch.tokens_MU.max() == 46:  # in the padding of the vocabulary: an input, never a label
        with torch.no_grad():
            model.embedding.word.weight[46] = torch.nan
    engine: Any = SimpleNamespace(
        mesh=mesh,
        model=model.train(),
        phases=Phases(),
        device=torch.device("cpu"),
        prepare_scores=lambda: None,
        candidate_scores=lambda batch, rows: model(*batch, candidates=rows),
    )

    def of(numbers: list[int]) -> Batch:
        return Batch.of(batch.tokens_MU[numbers], batch.valid_MT[numbers])

    own = list(rows_of_rank(range(CANDIDATES), rows, mesh))
    found = select_candidates(engine, map(of, own), CANDIDATES, rows, ALPHA)
    assert isinstance(found, Selection)
    recorder.nonfinite_candidates = found.record.num_nonfinite
    micro_steps = list(rows_of_rank(found.kept, rows, mesh))
    loss, tokens = torch.zeros(()), []
    for numbers in micro_steps:
        one = model(*of(numbers)) / len(micro_steps)
        one.backward()
        loss += one.detach()
        kept_MT = recorder.record.token_kept_MT
        assert kept_MT is not None and len(kept_MT) == rows
        tokens += [(numbers[row], t) for row, t in kept_MT.nonzero().tolist()]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for tensor in (loss, *gradients.values()):
        dist.all_reduce(tensor)
        tensor /= mesh.dp_size
    assert found.record.nonfinite_rows_M is not None
    bad = [found.own[i] for i in found.record.nonfinite_rows_M.nonzero().flatten().tolist()]
    assert found.record.num_rows == len(found.own) == CANDIDATES // mesh.dp_size
    assert found.record.num_tokens == int(batch.valid_MT[found.own].sum())
    assert found.record.instance_kept_M.tolist() == [i in found.kept for i in found.own]
    everyone: list[Any] = [None] * mesh.dp_size
    dist.all_gather_object(everyone, (tokens, bad))
    all_tokens = [token for tokens_of_rank, _ in everyone for token in tokens_of_rank]
    all_bad = [row for _, bad_of_rank in everyone for row in bad_of_rank]
    assert found.record.tau_instance is not None
    return Step(
        found.kept, set(all_tokens), loss.item(), gradients, found.record.tau_instance, all_bad
    )


@functools.cache
def world(ranks: int) -> dict[str, Step]:
    """All cases on so many ranks, in one launch."""

    def on_rank(rank: int) -> dict[str, Step]:
        steps = {name: select_and_step(*case) for name, case in CASES.items()}
        steps["random"] = select_and_step({"selection": "random"}, BATCHES["full"])
        steps["spoilt"] = select_and_step({}, spoilt())
        return steps

    return run_ranks(ranks, on_rank)[0]


@functools.cache
def expected(name: str) -> tuple[list[int], set[tuple[int, int]], float, dict[str, torch.Tensor]]:
    options, batch = CASES[name]
    model, _ = run_ranks(1, lambda rank: (dict(small_gpt()[0].named_parameters()), None))[0]
    plain = {
        "alpha": ALPHA,
        "score": options.get("eslm_score", "loss"),
        "proxy_layers": options.get("eslm_proxy_layers", 1),
        "stride": options.get("eslm_proxy_stride", 1),
    }
    whole = algorithm1(
        model, CONFIG, batch.tokens_MU, batch.valid_MT, **{**plain, "level": "instance"}
    )
    # To float32's precision, in which scores of copies are ties.
    scores = [float(torch.tensor(score, dtype=torch.float32)) for score in whole.instance_scores]
    order = sorted(range(CANDIDATES), key=lambda row: (-scores[row], row))
    micro_steps, _ = StepShape(CANDIDATES // MICRO, MICRO).kept(ALPHA)
    kept = sorted(order[: micro_steps * MICRO])
    tokens, loss, gradients = set(), 0.0, {}
    for begin in range(0, len(kept), MICRO):
        rows = kept[begin : begin + MICRO]
        valid_MT = batch.valid_MT[rows]
        if not valid_MT.any():
            continue  # nothing to learn, and a loss of 0
        level = {"level": "token"}
        if options.get("eslm_level") == "instance":
            level = {"level": "token", "choose_tokens": lambda row, t: True}
        step = algorithm1(model, CONFIG, batch.tokens_MU[rows], valid_MT, **{**plain, **level})
        tokens |= {(rows[row], t) for row, t in step.kept_tokens}
        loss += float(step.loss) / micro_steps
        for key, gradient in step.gradients.items():
            gradients[key] = gradients.get(key, 0) + gradient / micro_steps
    return kept, tokens, loss, gradients


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_a_step_is_algorithm_1_over_all_that_it_reads(name: str, ranks: int) -> None:
    step, (kept, tokens, loss, gradients) = world(ranks)[name], expected(name)
    assert len(kept) == 12
    assert step.kept == kept
    assert step.tokens == tokens
    assert step.loss == pytest.approx(loss, abs=1e-5)
    worst = {k: relative_difference(step.gradients[k], gradients[k]) for k in step.gradients}
    assert max(worst.values()) < 1e-4, worst


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_control_drops_the_same_in_every_layout(ranks: int) -> None:
    one, split = world(1)["random"], world(ranks)["random"]
    assert (split.kept, split.tokens, split.tau) == (one.kept, one.tokens, one.tau)
    assert one.kept != world(1)["loss full"].kept and len(one.kept) == 12


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_candidate_that_is_not_finite_spoils_the_step_and_is_named(ranks: int) -> None:
    step = world(ranks)["spoilt"]
    assert step.nonfinite == [9]
    assert 9 in step.kept
    assert math.isnan(step.loss)
    assert all(bool(gradient.isnan().any()) for gradient in step.gradients.values())


def test_nothing_is_scored_where_nothing_is_dropped() -> None:
    def on_rank(rank: int) -> bool:
        model, _ = small_gpt(alpha=0.1, eslm_scope="step")
        engine: Any = SimpleNamespace(mesh=build_mesh(), model=model)
        return select_candidates(engine, iter(()), CANDIDATES, MICRO, 0.1) is None

    assert run_ranks(1, on_rank) == [True]
