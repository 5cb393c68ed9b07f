"""GREATS in training: products of a whole model's gradients, and runs that choose by them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_eslm.checkpoint.weights import read_weights
from megatron_eslm.data.batch import Batch
from megatron_eslm.errors import ConfigError
from megatron_eslm.model.gpt import GPT, ModelSettings, build_gpt
from megatron_eslm.objectives.causal_lm import CausalLM
from megatron_eslm.ops.ghost_products import GradientProducts
from megatron_eslm.ops.keep_rule import num_to_keep
from megatron_eslm.parallel.mesh import build_mesh
from megatron_eslm.selection.build import build_policy
from megatron_eslm.selection.selection_options import SelectionOptions
from megatron_eslm.selection.state import Peers, Recorder, SelectionState
from megatron_eslm.training import gradient_alignment
from megatron_eslm.training.gradient_alignment import check_covered, gradient_products
from megatron_eslm.training.loop import Trainer
from tests.harness import run_ranks
from tests.model.small import make_batch, small_gpt

from .runs import (
    ROWS,
    Outcome,
    assert_same_dumps,
    build,
    read_dumps,
    refusal,
    train,
    weights_of,
    words,
)
from .test_flops import counted

GREATS = ("--selection", "greats", "--eslm-alpha", "0.3", "--split", "90,10")


def explicit_products(model: GPT, candidates: Batch, validation: Batch) -> GradientProducts:
    """In float64, from a gradient of all parameters for each sequence.

    `model` selects nothing (clm).
    """

    def gradient(batch: Batch) -> torch.Tensor:
        model.train()
        model.zero_grad()
        model(*batch).backward()
        model.recorder.take()
        gradients = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return torch.cat(gradients)

    rows = range(len(candidates.tokens_MU))
    g_MP = torch.stack([gradient(Batch(*(t[m : m + 1] for t in candidates))) for m in rows])
    return GradientProducts(g_MP @ g_MP.t(), g_MP @ gradient(validation))


def small_batch(rows: int, *, seed: int, padding: bool = False) -> Batch:
    """With labels that are not simply the next tokens, as --label-noise makes them."""
    drawn = make_batch(rows, seed=seed, padding=padding)
    return Batch.of(drawn.tokens_MU, drawn.valid_MT, drawn.tokens_MU[:, 1:].flip(1))


def assert_same_products(
    ours: GradientProducts, plain: GradientProducts, tolerance: float = 1e-4
) -> None:
    for mine, other in (
        (ours.pairs_MM, plain.pairs_MM),
        (ours.validation_M, plain.validation_M),
    ):
        scale = other.abs().max().item()
        torch.testing.assert_close(mine.double(), other, rtol=0.0, atol=tolerance * scale)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("padding", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize(("rows", "validation_rows"), [(6, 3), (5, 1), (1, 4)])
def test_products_of_all_parameters(rows: int, validation_rows: int, padding: bool) -> None:
    model, _ = small_gpt(selection="clm")
    candidates = small_batch(rows, seed=1, padding=padding)
    validation = small_batch(validation_rows, seed=2)
    plain = explicit_products(model, candidates, validation)
    ours = gradient_products(model, candidates, validation)
    assert_same_products(ours, plain)
    empty_M = ~candidates.valid_MT.any(dim=1)
    assert not ours.validation_M[empty_M].any() and not ours.pairs_MM[empty_M].any()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("training", [True, False])
def test_the_pass_leaves_no_trace(training: bool) -> None:
    model, recorder = small_gpt(selection="clm")
    model.train(training)
    hooks = []
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
        parameter.register_post_accumulate_grad_hook(lambda p: hooks.append(p))
    candidates, validation = small_batch(4, seed=1), small_batch(2, seed=2)
    before = [t.clone() for t in (*candidates, *validation, *model.parameters())]
    random_state = torch.random.get_rng_state()
    gradient_products(model, candidates, validation)
    after = (*candidates, *validation, *model.parameters())
    assert all(torch.equal(t, then) for t, then in zip(after, before, strict=True))
    for parameter in model.parameters():
        assert parameter.requires_grad and (parameter.grad == 7.0).all()
    assert not hooks and recorder.records == [] and model.training == training
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.usefixtures("process_group")
def test_bf16_is_close() -> None:
    model, _ = small_gpt(selection="clm")
    candidates, validation = small_batch(6, seed=1), small_batch(3, seed=2)
    plain = explicit_products(model, candidates, validation)
    assert_same_products(gradient_products(model.bfloat16(), candidates, validation), plain, 0.05)


@pytest.mark.usefixtures("process_group")
def test_a_parameter_without_products_is_refused() -> None:
    model, _ = small_gpt(selection="clm")
    check_covered(model)
    model.blocks["1"].scale = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"no gradient products of blocks\.1\.scale\.bias"):
        check_covered(model)


def twin(trainer: Trainer) -> GPT:
    """A model of its own with the trainer's weights, that selects nothing."""
    alone, model = Peers(0, 1, None), trainer.engine.model
    policy = build_policy(SelectionOptions(selection="clm"), SelectionState(0.0), alone, seed=0)
    settings = (Recorder(), CausalLM(), ModelSettings())
    copy = build_gpt(model.shape, build_mesh(), policy, *settings, seed=0)
    copy.load_state_dict(model.state_dict())
    return copy


@dataclass
class ByHand:
    """What explicit gradients choose, micro-step by micro-step."""

    chosen: list[list[int]] = field(default_factory=list)
    uncorrected: list[list[int]] = field(default_factory=list)
    """Without the correction for what was chosen before."""

    def watch(self, trainer: Trainer) -> None:
        """Choose from what the trainer's own pass sees, before it."""
        ordinary = gradient_alignment.gradient_products
        alpha, optimizer = trainer.run.selection.eslm_alpha, trainer.engine.ds.optimizer

        def products(model: GPT, candidates: Batch, validation: Batch) -> GradientProducts:
            plain = explicit_products(twin(trainer), candidates, validation)
            num = num_to_keep(len(candidates.tokens_MU), alpha)
            rate = optimizer.param_groups[0]["lr"]
            self.chosen.append(greedily(plain, rate, num))
            self.uncorrected.append(greedily(plain, 0.0, num))
            return ordinary(model, candidates, validation)

        gradient_alignment.gradient_products = products


def greedily(plain: GradientProducts, rate: float, num: int) -> list[int]:
    order: list[int] = []
    for _ in range(num):
        left = [m for m in range(len(plain.pairs_MM)) if m not in order]
        gains = plain.validation_M - rate * plain.pairs_MM[:, order].sum(dim=1)
        order.append(max(left, key=lambda m: float(gains[m])))
    return sorted(order)


@pytest.mark.parametrize("stage", [0, 1])
def test_each_rank_chooses_as_it_would_alone(data: list[str], tmp_path: Path, stage: int) -> None:
    def fn(rank: int) -> tuple[Outcome, ByHand]:
        by_hand = ByHand()
        argv = words(
            data,
            *(*GREATS, "--global-batch-size", 4 * ROWS, "--zero-stage", stage),
            # A rate at which the correction decides.
            *("--dump-selection", tmp_path, "--lr", "0.3", "--lr-warmup-iters", 1),
            iters=3,
        )
        return train(argv, tmp_path / "m.jsonl", by_hand.watch), by_hand

    results = run_ranks(2, fn)
    dumps = list(read_dumps(tmp_path).values())
    assert len(dumps) == 3
    for number, dump in enumerate(dumps):
        kept_ARM = dump["instance_kept"].reshape(2, 2, ROWS)
        for rank, (_, by_hand) in enumerate(results):
            for micro in (0, 1):
                kept = kept_ARM[micro, rank].nonzero()[0].tolist()
                assert kept == by_hand.chosen[2 * number + micro]
        assert np.isfinite(dump["instance_scores"]).all()
        # All tokens of what is kept, none of the others.
        assert (dump["token_kept"].all(axis=1) == dump["instance_kept"]).all()
        assert not dump["token_kept"][~dump["instance_kept"]].any()
    outcome = results[0][0]
    assert outcome.column("kept_instances") == [5 / 8] * 3
    assert outcome.column("kept_tokens") == [1.0] * 3
    for _, by_hand in results:
        assert by_hand.chosen != by_hand.uncorrected


def test_zero_stages_follow_one_course_and_learn(data: list[str], tmp_path: Path) -> None:
    def fn(rank: int) -> list[Outcome]:
        return [
            train(
                words(
                    data,
                    *(*GREATS, "--global-batch-size", 4 * ROWS, "--zero-stage", stage),
                    *("--dump-selection", tmp_path / f"dump{stage}"),
                    iters=8,
                ),
                tmp_path / f"{stage}.jsonl",
            )
            for stage in (0, 1)
        ]

    zero0, zero1 = run_ranks(2, fn)[0]
    assert_same_dumps(tmp_path / "dump1", tmp_path / "dump0")
    np.testing.assert_allclose(zero1.column("loss"), zero0.column("loss"), atol=1e-5)
    np.testing.assert_allclose(zero1.valid_losses(), zero0.valid_losses(), atol=1e-5)
    assert zero0.column("loss")[-1] < zero0.column("loss")[0] - 0.5
    assert zero0.valid_losses()[-1] < zero0.valid_losses()[0] - 0.5


@pytest.mark.parametrize("flags", [(), ("--bf16",)], ids=["zero0", "bf16-zero1"])
def test_a_sequence_that_is_not_finite_is_named(data: list[str], flags: tuple[str, ...]) -> None:
    """In one micro-step of one of two ranks: it is kept, and the step is skipped on both."""

    def fn(rank: int) -> tuple[int, list[bool], list[list[bool]]]:
        more = ("--global-batch-size", 2 * ROWS, "--eval-interval", 3)
        trainer = build(words(data, *GREATS, *flags, *more, iters=3))
        where, seen = trainer.state.selection, []

        def poison(module, args, output):
            # Both passes see the first rows of what the rank reads.
            if where.iteration == 1 and rank == 1:
                output = output.clone()
                output[:, 2] = torch.nan
            return output

        trainer.engine.model.embedding.register_forward_hook(poison)
        ordinary = trainer.nonfinite.note

        def note(record, samples):
            seen.append((bool(record.nonfinite_rows_M[2]), record.instance_kept_M.tolist()))
            ordinary(record, samples)

        trainer.nonfinite.note = note
        trainer.train()
        assert all(weight.isfinite().all() for weight in weights_of(trainer).values())
        return trainer.state.nonfinite_steps, [bad for bad, _ in seen], [kept for _, kept in seen]

    for rank, (skipped, bad, kept) in enumerate(run_ranks(2, fn)):
        assert skipped == 1
        assert bad == [False, rank == 1, False]
        assert all(sum(rows) == 5 for rows in kept)
        assert rank == 0 or kept[1][2]


def test_at_alpha_zero_it_is_plain_training(data: list[str], tmp_path: Path) -> None:
    def fn(rank: int) -> tuple[list[Outcome], list[list[int]]]:
        found: list[list[int]] = []
        outcomes = [
            train(
                words(data, "--selection", name, "--eslm-alpha", 0),
                tmp_path / f"{name}.jsonl",
                lambda t: found.append(counted(t)),
            )
            for name in ("greats", "clm")
        ]
        return outcomes, found

    (greats, clm), found = run_ranks(1, fn)[0]
    assert found[0] == found[1]  # the pass is left out
    for name in ("loss", "grad_norm", "flops", "flops_paper", "kept_instances"):
        assert greats.column(name) == clm.column(name), name


@pytest.mark.parametrize("flags", [(), ("--bf16",)], ids=["fp32", "bf16"])
def test_resume_is_exact(data: list[str], tmp_path: Path, flags: tuple[str, ...]) -> None:
    """With dropout and activation checkpoints, which the pass itself does without."""

    def fn(rank: int) -> list[Outcome]:
        def run(name: str, *more: str | Path) -> Outcome:
            argv = words(
                data,
                *(*GREATS, *flags, "--global-batch-size", 2 * ROWS, "--hidden-dropout", "0.1"),
                *("--activation-checkpoint-interval", 1, "--save", tmp_path / name),
                *("--dump-selection", tmp_path / f"dump-{name}", *more),
                iters=4,
                micro_batch_size=ROWS // 2,
            )
            return train(argv, tmp_path / f"{name}.jsonl")

        straight = run("straight")
        run("halves", "--exit-interval", "2")
        torch.manual_seed(rank)
        return [straight, run("halves", "--load", tmp_path / "halves")]

    straight, halves = run_ranks(2, fn)[0]
    for name in ("loss", "grad_norm", "tau_instance", "flops", "tokens_trained"):
        assert halves.column(name) == straight.column(name), name
    assert_same_dumps(tmp_path / "dump-halves", tmp_path / "dump-straight", exact=True)
    saved, expected = (read_weights(tmp_path / n).weights for n in ("halves", "straight"))
    assert all(torch.equal(saved[name], expected[name]) for name in expected)


@pytest.mark.parametrize("flags", [(), ("--greats-valid-share", "0.2")], ids=["half", "fifth"])
def test_the_ledger_counts_the_pass(data: list[str], tmp_path: Path, flags: tuple) -> None:
    def fn(rank: int) -> tuple[list[int], Outcome, Outcome]:
        found: list[list[int]] = []
        size = ("--seq-length", 64, "--hidden-size", 64)
        argv = words(data, *GREATS, *size, *flags, iters=2)
        outcome = train(argv, tmp_path / "m.jsonl", lambda t: found.append(counted(t)))
        control = ("--selection", "random", "--eslm-level", "instance", "--eslm-alpha", "0.3")
        return found[0], outcome, train(words(data, *control, *size, iters=2), tmp_path / "r.jsonl")

    found, greats, control = run_ranks(1, fn)[0]
    ledger = greats.column("flops")
    assert ledger[0] == pytest.approx(found[0], rel=0.01)
    assert ledger[1] == pytest.approx(sum(found), rel=0.01)
    # The pass alone costs more than the training that it is for.
    assert ledger[0] > 2 * control.column("flops")[0]
    assert greats.column("flops_paper")[0] > 2 * control.column("flops_paper")[0]


def test_the_papers_ledger_of_greats_by_hand(data: list[str]) -> None:
    """12 candidates of 124M and 6 validation rows of 1024 tokens, beside what is trained on.

    Of SHAPE_124M's numbers in test_flops: N = 124,475,904 and 12 L (HQ) T = 113,246,208 a token;
    forward and backward to activations, 4N + 113,246,208 = 611,149,824 a token of 18 x 1,024.
    A pair of the 12 x 13 / 2 = 78: 2 T^2 times, in a block 4D + 2D + 5D + 5D = 16 D = 12,288, in
    the embedding 4D + V = 53,376, so 2 x 1,048,576 x (147,456 + 53,376) = 421,175,230,464.
    """
    from megatron_eslm.cost.flops import FlopsModel, Work

    from .test_flops import SHAPE_124M

    sizes = {"shape": SHAPE_124M, "seq_length": 1024, "selector_depth": 0, "proxy": False}
    work = Work(tokens=24_576, tokens_deep=20_480, tokens_scored=20_480, tokens_trained=20_480)
    greats, plain = FlopsModel(**sizes, alignment_rows=(12, 6)), FlopsModel(**sizes)
    once = 18 * 1024 * 611_149_824 + 78 * 421_175_230_464
    assert greats.paper_flops(work) - plain.paper_flops(work) == pytest.approx(2 * once, rel=1e-9)


def refusals(data: list[str], world: int, cases: list[tuple]) -> list[str]:
    return run_ranks(world, lambda rank: [refusal(words(data, *GREATS, *c)) for c in cases])[0]


def test_what_it_cannot_do_is_refused(data: list[str]) -> None:
    tp, pp = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
    got = refusals(
        data,
        2,
        [
            (tp, 2),
            (pp, 2),
            ("--zero-stage", 2),
            ("--zero-stage", 3),
            ("--micro-batch-size", 1),
            ("--split", "99,1", "--greats-valid-share", 1, "--micro-batch-size", 32),
            ("--split", "100,0", "--eval-iters", 0),
            ("--eslm-adaptive",),
        ],
    )
    whole = "--selection greats computes inner products of full gradients on each rank, but "
    assert got[0].startswith(f"{whole}{tp} is 2. Set it to 1")
    assert got[1].startswith(f"{whole}{pp} is 2. Set it to 1")
    assert got[2] == f"{whole}--zero-stage is 2; use --zero-stage 0 or 1."
    assert got[3] == f"{whole}--zero-stage is 3; use --zero-stage 0 or 1."
    assert "--micro-batch-size is 1, which leaves no choice" in got[4]
    wanted = r"needs 32 validation sequences .* evaluation takes \d+ .* and leaves \d+\. Raise "
    assert re.search(
        wanted + r"the split's share in --split 99,1, or lower --eval-iters 2\.", got[5]
    )
    assert "the validation split has 0 tokens" in got[6] and "--split 1,0,0" in got[6]
    assert "--eslm-adaptive" in got[7] and "--selection greats" in got[7]


def test_a_run_continues_with_the_sequences_that_it_chose_by(
    data: list[str], tmp_path: Path
) -> None:
    def fn(rank: int) -> str:
        train(words(data, *GREATS, "--save", tmp_path / "run", iters=2))
        return refusal(words(data, *GREATS, "--load", tmp_path / "run", "--eval-iters", 1))

    found = re.search(r"alignment_samples: (\d+) there, (\d+) here", run_ranks(1, fn)[0])
    assert found and int(found[2]) == int(found[1]) + ROWS


def test_validation_rows_depend_on_seed_step_and_rank(data: list[str]) -> None:
    def fn(rank: int) -> list[list[int]]:
        def rows(seed: int, choose: Callable[[Trainer], int]) -> list[int]:
            trainer = build(words(data, *GREATS, "--seed", seed))
            micro_step = choose(trainer)
            alignment = gradient_alignment.align_before_micro_steps(
                trainer.run, trainer.engine, trainer.datasets.alignment
            )
            assert len(alignment.validation) > 4 * ROWS
            return alignment.validation_rows(micro_step)

        def at(iteration: int, micro_step: int) -> Callable[[Trainer], int]:
            def choose(trainer: Trainer) -> int:
                trainer.state.selection.iteration = iteration
                return micro_step

            return choose

        return [rows(1, at(0, 0)), rows(1, at(0, 1)), rows(1, at(1, 0)), rows(2, at(0, 0)),
                rows(1, at(0, 0))]  # fmt: skip

    first, second = run_ranks(2, fn)
    draws = [*first[:-1], *second[:-1]]
    assert first[-1] == first[0] and second[-1] == second[0]
    assert len({tuple(draw) for draw in draws}) == len(draws)
    assert all(len(set(draw)) == 4 for draw in draws)


def test_what_it_chooses_by_is_not_what_is_evaluated(data: list[str]) -> None:
    """The validation set is that of any other policy; the rest of its split is in every layout the
    same, and is what the pass reads."""

    def fn(rank: int, world: int) -> tuple[list[torch.Tensor], ...]:
        size = {"micro_batch_size": ROWS // world}
        greats = build(words(data, *GREATS, iters=2, **size))
        plain = build(words(data, "--selection", "clm", "--split", "90,10", **size))
        unevaluated = build(words(data, *GREATS, "--eval-iters", 0, **size))
        # As by default, where 200 micro-batches are more than there are.
        halved = build(words(data, *GREATS, "--eval-iters", 200, **size))
        seen: list[torch.Tensor] = []
        ordinary = gradient_alignment.gradient_products

        def products(model: GPT, candidates: Batch, validation: Batch) -> GradientProducts:
            seen.extend(validation.tokens_MU)
            return ordinary(model, candidates, validation)

        gradient_alignment.gradient_products = products
        greats.train()
        gradient_alignment.gradient_products = ordinary
        assert plain.datasets.alignment is None and unevaluated.datasets.valid is None
        sets = (
            *(greats.datasets.valid, greats.datasets.alignment),
            *(plain.datasets.valid, unevaluated.datasets.alignment),
            *(halved.datasets.valid, halved.datasets.alignment),
        )
        return *([some[i]["tokens"] for i in range(len(some))] for some in sets), seen

    def ids(rows: list[torch.Tensor]) -> list[tuple[int, ...]]:
        return [tuple(row.tolist()) for row in rows]

    evaluated, rest, plain, everything, half, other, seen = map(ids, run_ranks(1, fn, 1)[0])
    assert evaluated == plain and len(evaluated) == 2 * ROWS
    assert [*evaluated, *rest] == [*half, *other] == everything
    assert len(half) == len(everything) // 2
    assert len(set(everything)) == len(everything)
    assert len(seen) == 2 * ROWS // 2 and set(seen) <= set(rest)
    for ranks in run_ranks(2, fn, 2):
        assert list(map(ids, ranks))[:6] == [evaluated, rest, plain, everything, half, other]
        assert set(ids(ranks[6])) <= set(rest)
