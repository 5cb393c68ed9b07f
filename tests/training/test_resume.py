"""N steps straight and N/2 + `--load` are the same run, bit for bit, also through a signal."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from megatron_eslm.checkpoint.find import find_checkpoint
from megatron_eslm.checkpoint.train_state import TrainState
from megatron_eslm.checkpoint.weights import read_weights
from megatron_eslm.training.loop import Trainer
from tests.harness import run_ranks

from .runs import ROWS, Outcome, assert_same_dumps, build, refusal, train, words

EXACT = ("loss", "grad_norm", "tau_instance", "tau_token", "cvar", "lr", "tokens",
         "tokens_trained", "flops", "flops_paper", "kept_instances", "kept_tokens")  # fmt: skip

CASES = {
    "zero0": ("--zero-stage", "0"),
    "zero2": ("--zero-stage", "2"),
    "zero3": ("--zero-stage", "3"),
    "zero0-dropout": ("--hidden-dropout", "0.1", "--attention-dropout", "0.1"),
    "zero2-dropout": ("--zero-stage", "2", "--hidden-dropout", "0.1"),
    "random": ("--selection", "random"),
    "clm": ("--selection", "clm"),
    "bf16": ("--bf16",),
}


def signal_at(iteration: int, number: signal.Signals = signal.SIGTERM, rank: int = 0):
    """Make one rank send itself a signal in the middle of the step after `iteration`."""

    def prepare(trainer: Trainer) -> None:
        ordinary = trainer.engine.step

        def step(*args):
            if trainer.state.iteration == iteration and trainer.mesh.rank == rank:
                os.kill(os.getpid(), number)
            return ordinary(*args)

        trainer.engine.step = step

    return prepare


def run_case(data: list[str], folder: Path, flags: tuple[str, ...]) -> dict[str, Outcome]:
    def fn(rank: int) -> dict[str, Outcome]:
        def argv(name: str, *more: str | Path) -> list[str]:
            return words(
                data,
                *("--global-batch-size", 2 * ROWS, "--eslm-alpha", "0.3", *flags),
                *("--dump-selection", folder / f"dump-{name}", "--save", folder / name, *more),
                iters=6,
                micro_batch_size=ROWS // 2,
            )

        def after(name: str) -> Outcome:
            return train(argv(name, "--load", folder / name), folder / f"{name}.jsonl")

        straight = train(argv("straight"), folder / "straight.jsonl")
        first = train(argv("halves", "--exit-interval", "3"), folder / "halves.jsonl")
        halves = after("halves")
        torch.manual_seed(rank)  # a new process has another random state
        cut = train(argv("signal"), folder / "signal.jsonl", signal_at(2))
        return {
            "straight": straight,
            "first": first,
            "halves": halves,
            "cut": cut,
            "signal": after("signal"),
        }

    return run_ranks(2, fn)[0]


@pytest.mark.parametrize("case", CASES)
def test_resume_is_exact(data: list[str], tmp_path: Path, case: str) -> None:
    runs = run_case(data, tmp_path, CASES[case])
    assert runs["first"].iteration == 3 and runs["first"].stopped is None
    assert runs["cut"].stopped == signal.SIGTERM
    # The signal came during step 3, which is finished first.
    assert runs["cut"].iteration == 3
    for name in ("halves", "signal"):
        assert runs[name].column("iteration") == [1, 2, 3, 4, 5, 6]
        for column in EXACT:
            assert runs[name].column(column) == runs["straight"].column(column), (name, column)
        # The signal left no time for the evaluation of its own step.
        ours, theirs = ({s["iteration"]: s["valid_loss"] for s in r.steps}
                        for r in (runs[name], runs["straight"]))  # fmt: skip
        assert all(ours[i] == theirs[i] for i in theirs if ours[i] is not None)
        assert ours[6] is not None
        assert_same_dumps(tmp_path / f"dump-{name}", tmp_path / "dump-straight", exact=True)
        saved, expected = (read_weights(tmp_path / n).weights for n in (name, "straight"))
        for key in expected:
            assert torch.equal(saved[key], expected[key]), key


def test_a_signal_to_any_rank_stops_all_with_a_checkpoint(data: list[str], tmp_path: Path) -> None:
    def fn(rank: int) -> list[Outcome]:
        outcomes = []
        for number, to in ((signal.SIGINT, 0), (signal.SIGTERM, 1)):
            argv = words(data, "--save", tmp_path / f"{to}", micro_batch_size=ROWS // 2)
            outcomes.append(train(argv, prepare=signal_at(1, number, to)))
        return outcomes

    for outcomes in run_ranks(2, fn):
        assert [o.iteration for o in outcomes] == [2, 2]
        # Whoever was asked: all ranks end with the same exit code.
        assert [o.stopped for o in outcomes] == [signal.SIGINT, signal.SIGTERM]
    for to in (0, 1):
        assert (tmp_path / f"{to}" / "iter_0000002" / "manifest.json").exists()


def test_all_ranks_of_any_layout_stop_after_the_same_step(data: list[str], tmp_path: Path) -> None:
    """Asked by a signal to one tensor-parallel rank of two, or by a clock that is ahead on one."""

    def fn(rank: int) -> list[tuple[int, int | None]]:
        def trainer(name: str, *flags: str) -> Trainer:
            layout = ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2)
            layout += ("--global-batch-size", 16, "--eslm-alpha", 0.3)
            return build(words(data, *layout, "--save", tmp_path / name, *flags))

        asked = trainer("signal", "--exit-signal", "USR1")
        signal_at(1, signal.SIGUSR1, rank=3)(asked)
        late = trainer("time", "--exit-duration-minutes", "10")
        began_seconds = time.monotonic() - (601.0 if rank == 1 else 0.0)
        in_time = trainer("in time", "--exit-duration-minutes", "10")
        return [
            (t.state.iteration, stopped)
            for t, stopped in ((asked, asked.train()), (late, late.train(began_seconds)),
                               (in_time, in_time.train()))
        ]  # fmt: skip

    for ends in run_ranks(4, fn):
        assert ends == [(2, signal.SIGUSR1), (1, None), (4, None)]
    for name, iteration in (("signal", 2), ("time", 1), ("in time", 4)):
        (folder,) = (tmp_path / name).glob("iter_*")
        assert folder.name == f"iter_{iteration:07d}"


def test_requeue_with_load_equal_to_save(data: list[str], tmp_path: Path) -> None:
    """The same command again and again: a new run, its continuation, and nothing left to do."""
    save = tmp_path / "run"

    def fn(rank: int) -> tuple[list[int], str]:
        argv = words(data, "--save", save, "--load", save, "--exit-interval", "2")
        reached = [train(argv).iteration for _ in range(3)]
        return reached, refusal(words(data, "--load", save))

    reached, text = run_ranks(1, fn)[0]
    assert reached == [2, 4, 4]
    assert "iter_0000004 is at iteration 4, but --train-iters is 4" in text
    assert "Raise --train-iters" in text


def test_a_longer_run_continues_where_the_data_is_not_repeated(
    data: list[str], tmp_path: Path
) -> None:
    save = tmp_path / "run"

    def fn(rank: int) -> list[float]:
        lr = ("--lr-decay-iters", "6")
        train(words(data, *lr, "--save", save, iters=3))
        longer = train(words(data, *lr, "--load", save, iters=6), tmp_path / "longer.jsonl")
        straight = train(words(data, *lr, iters=6), tmp_path / "straight.jsonl")
        return [longer.column("loss"), straight.column("loss")]

    longer, straight = run_ranks(1, fn)[0]
    assert longer == straight[3:]


def test_alpha_given_anew_holds(data: list[str], tmp_path: Path) -> None:
    def fn(rank: int) -> list[float]:
        train(words(data, "--save", tmp_path / "run", iters=2))
        argv = words(data, "--load", tmp_path / "run", "--eslm-alpha", "0.5")
        return train(argv, tmp_path / "m.jsonl").column("alpha")

    assert run_ranks(1, fn)[0] == [0.5, 0.5]


FLAT = ("--micro-batch-size", ROWS // 2, "--lr", "5e-3", "--eval-iters", "2", "--num-workers", "0",
        "--log-interval", "1")  # fmt: skip


FINETUNE = ("--finetune",)


def without_shape(data: list[str], *flags: str | int | Path) -> list[str]:
    """A command line that leaves the model's shape to --load."""
    return ["--data-path", "0.6", data[0], "0.4", data[1], *map(str, (*FLAT, *flags))]


def test_finetuning_starts_anew_from_the_weights(
    data: list[str], start: Path, tmp_path: Path
) -> None:
    """Of a training checkpoint as of weights alone; the model's shape comes along with them."""

    def fn(rank: int) -> tuple[list[Outcome], TrainState, list[str]]:
        outcomes = []
        for name, load in (("trained", FINETUNE), ("weights", ()), ("weights", FINETUNE)):
            argv = without_shape(data, "--load", start / name, *load, "--train-iters", 3)
            saves = ("--save", tmp_path / f"{name}{len(outcomes)}")
            outcomes.append(train([*argv, *map(str, saves)], tmp_path / f"{len(outcomes)}.jsonl"))
        state = find_checkpoint(tmp_path / "trained0").state()
        trained = start / "trained"
        argv = without_shape(data, "--finetune", "--train-iters", 9, "--save", trained)
        refused = [
            refusal([*argv, "--load", str(trained / "iter_0000004")]),
            refusal(without_shape(data, "--load", trained, "--train-iters", 9)),
        ]
        return outcomes, state, refused

    outcomes, state, refused = run_ranks(2, fn)[0]
    for outcome in outcomes:
        assert outcome.column("iteration") == [1, 2, 3]
        for column in EXACT:
            assert outcome.column(column) == outcomes[1].column(column), column
        assert outcome.valid_losses() == outcomes[1].valid_losses()
    assert (state.iteration, state.consumed_samples) == (3, 3 * ROWS)
    assert f"--save {start / 'trained'} is the folder of that run" in refused[0]
    # What reports ask: which documents it was not trained on.
    data_of = read_weights(start / "trained").data
    assert data_of is not None and data_of["split"] == "98,1,1"
    assert read_weights(start / "weights").data is None
    # It was trained without selection; whoever goes on with it has to mean the change.
    assert "was trained with --selection clm, but this run would continue with" in refused[1]
