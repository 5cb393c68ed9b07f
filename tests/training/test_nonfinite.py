"""Steps that are not finite: skipped on every rank, counted, named; too many in a row stop."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from megatron_eslm.training.loop import Trainer
from megatron_eslm.training.nonfinite import NonfiniteError
from tests.harness import run_ranks

from .runs import ROWS, Outcome, build, train, weights_of, words

LAYOUTS = {
    "zero0": ("--zero-stage", "0"),
    "zero1": ("--zero-stage", "1"),
    "zero2": ("--zero-stage", "2"),
    "zero3": ("--zero-stage", "3"),
    "bf16-zero1": ("--bf16", "--zero-stage", "1"),
    "bf16-zero2": ("--bf16", "--zero-stage", "2"),
    "bf16-zero3": ("--bf16", "--zero-stage", "3"),
    "tp2": ("--tensor-model-parallel-size", "2"),
    "pp2": ("--pipeline-model-parallel-size", "2"),
    "pp2-zero1": ("--pipeline-model-parallel-size", "2", "--zero-stage", "1"),
    "pp2-bf16": ("--pipeline-model-parallel-size", "2", "--zero-stage", "1", "--bf16"),
}


def poison_hidden(trainer: Trainer, when, *, row: int = 1, rank: int = 0) -> None:
    """Let one row of one rank's micro-batch come out of the embedding as nan while `when()`."""

    def hook(module, args, output):
        if when() and trainer.mesh.dp_rank == rank and module.training:
            hidden = output.clone()
            hidden[:, row] = torch.nan
            return hidden
        return output

    if trainer.mesh.is_first_stage:
        trainer.engine.model.embedding.register_forward_hook(hook)


class Watcher:
    """Keeps the weights before and after each step, and what is said of those that are skipped."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.weights: list[dict[str, torch.Tensor]] = []
        self.messages: list[str] = []
        step = trainer.engine.step

        def watched(*args):
            self.weights.append(weights_of(trainer))
            return step(*args)

        trainer.engine.step = watched
        handler = logging.Handler()
        handler.emit = lambda r: self.messages.append(r.getMessage())
        logging.getLogger("megatron_eslm.training.nonfinite").addHandler(handler)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("selection", ["eslm", "clm"])
def test_a_poisoned_micro_step_skips_its_step_everywhere(
    data: list[str], tmp_path: Path, layout: str, selection: str
) -> None:
    def fn(rank: int):
        watchers = []
        argv = words(
            data,
            *("--global-batch-size", 2 * ROWS, *LAYOUTS[layout], "--selection", selection),
            # A pipeline selects sequences ahead of a step (see below).
            *(("--eslm-level", "token") if "pp2" in layout else ()),
            iters=5,
            micro_batch_size=ROWS // 2,
        )

        def watch(trainer: Trainer) -> None:
            where = trainer.state.selection
            poison_hidden(trainer, lambda: (where.iteration, where.micro_step) == (1, 1), rank=1)
            watchers.append(Watcher(trainer))

        outcome = train(argv, tmp_path / "m.jsonl", watch)
        w = watchers[0].weights  # before steps 1 to 5; number 2 is the one to be skipped
        same = [all(torch.equal(w[i][n], w[i + 1][n]) for n in w[i]) for i in range(4)]
        finite = all(bool(p.isfinite().all()) for p in weights_of(watchers[0].trainer).values())
        return outcome, same, finite, watchers[0].messages

    results = run_ranks(4 if "p2" in layout else 2, fn)
    for _, same, finite, _ in results:
        assert same == [False, True, False, False]
        assert finite
    outcome, _, _, messages = results[0]
    assert outcome.iteration == 5
    assert outcome.column("nonfinite_steps") == [0, 1, 1, 1, 1]
    # Micro-step 2 of iteration 2 holds samples 24 to 31; row 1 of rank 1 is number 29.
    (said,) = messages
    assert "iteration 2: scores (data-parallel rank 1: samples 29) not finite, step skipped" in said
    assert "(1 in a row, 1 in all)" in said
    losses = outcome.column("loss")
    assert losses[1] is None  # not JSON as a number
    assert all(loss is not None for loss in losses[:1] + losses[2:])
    assert losses[4] < losses[0]


@pytest.mark.parametrize("layout", ["pp2", "pp2-bf16", "zero3"])
def test_a_poisoned_candidate_skips_its_step_everywhere(
    data: list[str], tmp_path: Path, layout: str
) -> None:
    def fn(rank: int) -> tuple[Outcome, list[bool], list[str]]:
        watchers: list[Watcher] = []

        def watch(trainer: Trainer) -> None:
            where = trainer.state.selection
            poison_hidden(
                trainer, lambda: where.iteration == 1 and not torch.is_grad_enabled(), rank=1
            )
            watchers.append(Watcher(trainer))

        steps = ("--global-batch-size", 4 * ROWS, "--eslm-scope", "step", "--eslm-alpha", "0.3")
        argv = words(data, *steps, *LAYOUTS[layout], iters=4, micro_batch_size=ROWS // 2)
        outcome = train(argv, tmp_path / "m.jsonl", watch)
        w = watchers[0].weights
        same = [all(torch.equal(w[i][n], w[i + 1][n]) for n in w[i]) for i in range(3)]
        return outcome, same, watchers[0].messages

    results = run_ranks(4 if "p2" in layout else 2, fn)
    assert all(same == [False, True, False] for _, same, _ in results)
    outcome, _, (said,) = results[0]
    # Row 1 in each of the four chunks that iteration 2 scores; a pipeline's stages take two each.
    samples = "37, 53" if "pp2" in layout else "37, 45, 53, 61"
    assert f"iteration 2: scores (data-parallel rank 1: samples {samples}) not finite" in said
    assert outcome.column("nonfinite_steps") == [0, 1, 1, 1]
    assert outcome.column("loss")[1] is None and None not in outcome.column("loss")[2:]


def test_gradients_alone_that_are_not_finite(data: list[str], tmp_path: Path) -> None:
    """Finite losses, a gradient that overflows: skipped too, and said to be gradients."""

    def fn(rank: int):
        messages: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda r: messages.append(r.getMessage())
        logging.getLogger("megatron_eslm.training.nonfinite").addHandler(handler)

        def prepare(trainer: Trainer) -> None:
            weight = trainer.engine.model.blocks["1"].mlp.up.weight
            where = trainer.state.selection
            weight.register_hook(lambda g: g * (torch.inf if where.iteration == 1 else 1.0))

        outcome = train(words(data, micro_batch_size=4), tmp_path / "m.jsonl", prepare)
        return outcome, messages

    outcome, messages = run_ranks(2, fn)[0]
    assert outcome.column("nonfinite_steps") == [0, 1, 1, 1]
    assert len(messages) == 1 and "iteration 2: gradients not finite" in messages[0]
    assert all(loss is not None for loss in outcome.column("loss"))


@pytest.mark.parametrize("flags", [(), ("--bf16",)], ids=["float32", "bf16"])
def test_too_many_in_a_row_stop_every_rank(data: list[str], flags: tuple[str, ...]) -> None:
    def fn(rank: int) -> tuple[str, int]:
        argv = words(data, "--max-nonfinite-steps", "3", *flags, iters=8, micro_batch_size=4)
        trainer = build(argv)
        where = trainer.state.selection
        poison_hidden(trainer, lambda: where.iteration >= 2)
        with pytest.raises(NonfiniteError) as caught:
            trainer.train()
        return str(caught.value), trainer.state.iteration

    (text, iteration), other = run_ranks(2, fn)
    assert other == (text, iteration) and iteration == 5
    assert text.startswith(
        "3 steps in a row were not finite, the last with scores (data-parallel rank 0: "
    ), text
    for part in ("Lower --lr", "--lr-warmup-iters", "--max-nonfinite-steps"):
        assert part in text


def test_a_finite_step_between_starts_the_count_again(data: list[str], tmp_path: Path) -> None:
    def fn(rank: int) -> Outcome:
        def prepare(trainer: Trainer) -> None:
            where = trainer.state.selection
            poison_hidden(trainer, lambda: where.iteration in (1, 3))

        argv = words(data, "--max-nonfinite-steps", "2", iters=6)
        return train(argv, tmp_path / "m.jsonl", prepare)

    outcome = run_ranks(1, fn)[0]
    assert outcome.iteration == 6
    assert outcome.column("nonfinite_steps") == [0, 1, 1, 2, 2, 2]
