"""The same global micro-batch over 1, 2 and 4 data-parallel ranks, and over tensor-parallel ones.

Gradients are averaged over data-parallel ranks by a plain all-reduce, as an engine would.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from megatron_eslm.parallel.mesh import build_mesh

from ..harness import run_ranks
from .reference import algorithm1
from .small import (
    CONFIG,
    POSITIONS,
    Batch,
    Step,
    make_batch,
    relative_difference,
    run_step,
    small_gpt,
)

POLICIES = {
    "loss": {"eslm_score": "loss"},
    "entropy": {"eslm_score": "entropy"},
    "instance": {"eslm_level": "instance"},
    "token": {"eslm_level": "token"},
    "random": {"selection": "random", "iteration": 3},
    "clm": {"selection": "clm"},
}


@dataclass
class Global:
    """One step of the whole group, put together from its data-parallel ranks."""

    loss: float
    gradients: dict[str, torch.Tensor]
    kept_rows: list[int]
    kept_tokens: list[tuple[int, int]]
    steps: list[Step]
    """Of the data-parallel ranks."""


def mean_over_ranks(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    x = x.contiguous()
    dist.all_reduce(x, group=group)
    return x / group.size()


@dataclass
class Case:
    batch: Batch
    options: dict


def run_globally(cases: dict[str, Case], dp: int, tp: int = 1) -> dict[str, Global]:
    """Split every case over `dp` x `tp` ranks, run a step of each, and undo the split."""

    def on_rank(rank: int) -> tuple[dict[str, Step], dict[str, int | None]]:
        mesh = build_mesh(tp)
        steps = {}
        for name, case in cases.items():
            model, recorder = small_gpt(mesh=mesh, **case.options)
            step = run_step(model, recorder, case.batch.part(mesh.dp_rank, dp))
            for key, gradient in step.gradients.items():
                step.gradients[key] = mean_over_ranks(gradient, mesh.dp_group)
            steps[name] = step
        cut = {key: getattr(p, "partition_dim", None) for key, p in model.named_parameters()}
        return steps, cut

    results = run_ranks(dp * tp, on_rank)
    cut = results[0][1]
    return {
        name: join([steps[name] for steps, _ in results], cut, tp, len(case.batch.tokens_MU))
        for name, case in cases.items()
    }


def join(ranks: list[Step], cut: dict[str, int | None], tp: int, num_rows: int) -> Global:
    """Undo the split of a step; tensor-parallel ranks must agree on all but their shards."""
    gradients = {}
    for name, first in ranks[0].gradients.items():
        shards = [step.gradients[name] for step in ranks[:tp]]
        if cut[name] is None:
            assert all(torch.equal(shard, first) for shard in shards), name
            gradients[name] = first
        else:
            gradients[name] = torch.cat(shards, dim=cut[name])
    steps = ranks[::tp]
    for i, step in enumerate(ranks):
        assert step.kept_tokens == steps[i // tp].kept_tokens
        assert step.loss == steps[i // tp].loss
    rows = num_rows // len(steps)
    return Global(
        loss=sum(step.loss for step in steps) / len(steps),
        gradients=gradients,
        kept_rows=[i * rows + row for i, step in enumerate(steps) for row in step.kept_rows],
        kept_tokens=[
            (i * rows + r, t) for i, step in enumerate(steps) for r, t in step.kept_tokens
        ],
        steps=steps,
    )


def assert_same(split: Global, whole: Global) -> None:
    assert split.kept_rows == whole.kept_rows
    assert split.kept_tokens == whole.kept_tokens
    assert split.loss == pytest.approx(whole.loss, rel=1e-6)
    for name, gradient in whole.gradients.items():
        assert relative_difference(split.gradients[name], gradient) < 1e-5, name
    for step in split.steps:  # thresholds are those of the group, the same on every rank
        for field in ("tau_instance", "tau_token", "cvar"):
            mine, other = getattr(step.record, field), getattr(whole.steps[0].record, field)
            assert mine == (other if other is None else pytest.approx(other, rel=1e-6)), field


def assert_finite(split: Global) -> None:
    assert math.isfinite(split.loss)
    for step in split.steps:
        assert math.isfinite(step.loss)
        assert all(gradient.isfinite().all() for gradient in step.gradients.values())


def unlabelled(batch: Batch) -> Batch:
    """No valid label in the rows of the second of four ranks."""
    batch.valid_MT[2:4] = False
    return batch


BATCHES = {
    "full": make_batch(8, seed=20),
    "padded": make_batch(8, seed=20, padding=True),
    "ties": make_batch(8, seed=20, ties=True),
    "unlabelled": unlabelled(make_batch(8, seed=23)),
}
CASES = {
    f"{policy}-{kind}": Case(batch, {"alpha": 0.3, **options})
    for policy, options in POLICIES.items()
    for kind, batch in BATCHES.items()
} | {
    # One row of eight is left: three of four ranks keep nothing.
    f"{policy}-one row": Case(BATCHES["full"], {"alpha": 0.9, **options})
    for policy, options in POLICIES.items()
}


@functools.cache
def world(dp: int, tp: int = 1) -> dict[str, Global]:
    """All cases in one world, since starting processes is what takes time here."""
    return run_globally(CASES, dp, tp)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dp", [2, 4])
def test_data_parallel_splits(dp: int, case: str) -> None:
    assert_finite(world(dp)[case])
    assert_same(world(dp)[case], world(1)[case])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dp", [1, 2])
def test_tensor_parallel_layouts(dp: int, case: str) -> None:
    assert_finite(world(dp, 2)[case])
    assert_same(world(dp, 2)[case], world(1)[case])


@pytest.mark.parametrize("policy", POLICIES)
def test_a_rank_without_any_label(policy: str) -> None:
    step = world(4)[f"{policy}-unlabelled"].steps[1]
    assert step.kept_tokens == []
    assert step.loss == 0.0


@pytest.mark.parametrize("policy", ["loss", "entropy", "instance", "random"])
def test_one_row_in_all(policy: str) -> None:
    split = world(4)[f"{policy}-one row"]
    assert len(split.kept_rows) == 1
    assert [bool(step.kept_rows) for step in split.steps].count(False) == 3
    assert all(step.loss == 0.0 for step in split.steps if not step.kept_rows)


def test_a_rank_that_keeps_no_row() -> None:
    """The two rows of the third of four ranks are the least risky; three of eight are dropped."""
    cases = {}
    for policy in ("loss", "entropy", "instance"):
        whole = world(1)[f"{policy}-full"].steps[0]
        order = whole.record.instance_scores_M.argsort()
        order = torch.cat([order[2:6], order[:2], order[6:]])
        batch = Batch(*(x[order] for x in (BATCHES["full"].tokens_MU, BATCHES["full"].valid_MT)))
        cases[policy] = Case(batch, CASES[f"{policy}-full"].options)
    wholes, splits = run_globally(cases, 1), run_globally(cases, 4)
    for name, split in splits.items():
        idle = split.steps[2]
        assert idle.kept_rows == idle.kept_tokens == []
        assert idle.loss == 0.0
        assert_finite(split)
        assert_same(split, wholes[name])


@pytest.mark.parametrize("policy", ["loss", "random"])
def test_local_scope_thresholds_alone_and_counts_together(policy: str) -> None:
    batch = make_batch(8, seed=24, padding=True)
    case = Case(batch, {"alpha": 0.3, "eslm_scope": "local", **POLICIES[policy]})
    split = run_globally({policy: case}, 2)[policy]
    for rank, step in enumerate(split.steps):
        rows = int(batch.part(rank, 2).valid_MT.any(dim=1).sum())
        assert len(step.kept_rows) == {4: 2, 3: 2}[rows]
        in_kept_rows = int(batch.part(rank, 2).valid_MT[step.kept_rows].sum())
        assert len(step.kept_tokens) == math.floor(0.7 * in_kept_rows + 1e-9)

    chosen = set(split.kept_tokens)
    outcome = algorithm1(
        run_ranks(1, lambda rank: {n: p.detach() for n, p in small_gpt()[0].named_parameters()})[0],
        CONFIG,
        batch.tokens_MU,
        batch.valid_MT,
        alpha=0.3,
        choose_tokens=lambda row, t: (row, t) in chosen,
    )
    assert split.loss == pytest.approx(outcome.loss.item(), abs=1e-5)
    for name, gradient in outcome.gradients.items():
        assert relative_difference(split.gradients[name], gradient) < 1e-4, name


@pytest.mark.parametrize("policy", ["loss", "clm"])
def test_what_is_not_finite_on_one_rank_spoils_the_step_on_all(policy: str) -> None:
    """The engine then skips it everywhere; the record names the row where it is."""
    batch = make_batch(8, seed=25)
    batch.tokens_MU[5, 2] = 46  # in the padding of the vocabulary: an input that no other row has
    batch.valid_MT[5, 1] = False

    def on_rank(rank: int) -> tuple[float, list[int], int, bool]:
        mesh = build_mesh()
        model, recorder = small_gpt(mesh=mesh, alpha=0.1, **POLICIES[policy])
        with torch.no_grad():
            model.embedding.word.weight[46] = torch.nan
        step = run_step(model, recorder, batch.part(rank, 4))
        gradient = mean_over_ranks(step.gradients["final_norm.weight"], mesh.dp_group)
        record = step.record
        rows = record.nonfinite_rows_M.nonzero().flatten().tolist()
        return step.loss, rows, record.num_nonfinite, bool(gradient.isnan().any())

    ranks = run_ranks(4, on_rank)
    assert [rows for _, rows, _, _ in ranks] == [[], [], [1], []]
    assert math.isnan(ranks[2][0])
    assert all(spoilt for *_, spoilt in ranks)
    if policy == "loss":  # scores are shared, so every rank knows
        assert all(math.isnan(loss) and count > 0 for loss, _, count, _ in ranks)


def test_tensor_parallel_evaluation() -> None:
    batch = make_batch(8, seed=26, padding=True)

    def on_rank(rank: int) -> list[float]:
        model, _ = small_gpt(mesh=build_mesh(dist.get_world_size()))
        model.eval()
        with torch.no_grad():
            return model(batch.tokens_MU, batch.valid_MT).sum(dim=0).tolist()

    ((total, count),) = run_ranks(1, on_rank)
    for other in run_ranks(2, on_rank):
        assert other == [pytest.approx(total, rel=1e-6), count]
    assert count < 8 * POSITIONS
