"""What may be hung into the loop is called on every rank, in order, at its moment."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from megatron_eslm.config.training_options import ReportOptions
from megatron_eslm.errors import ConfigError
from megatron_eslm.training.build import build_trainer
from megatron_eslm.training.command_line import read_command_line
from megatron_eslm.training.evaluate import Evaluation
from megatron_eslm.training.loop import Callback, StepOutcome, Trainer

from ..argv import later_wins
from ..harness import run_ranks
from .runs import words


class Diary(Callback):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.entries: list[tuple] = []

    def on_start(self, trainer: Trainer) -> None:
        self.entries.append(("start", trainer.state.iteration))

    def on_step(self, trainer: Trainer, step: StepOutcome) -> None:
        self.entries.append(("step", trainer.state.iteration, step.batch_size, step.ends))

    def on_evaluation(self, trainer: Trainer, evaluation: Evaluation) -> None:
        assert evaluation.loss > 0
        self.entries.append(("evaluation", trainer.state.iteration))

    def on_checkpoint(self, trainer: Trainer, folder: Path) -> None:
        assert (folder / "manifest.json").exists()
        self.entries.append(("checkpoint", folder.name))

    def on_end(self, trainer: Trainer) -> None:
        self.entries.append(("end", trainer.state.iteration))


def test_a_run_tells_its_callbacks(data: list[str], tmp_path: Path) -> None:
    profile = ("--profile", tmp_path / "traces", "--profile-step-start", 2, "--profile-step-end", 3)
    argv = words(
        *(data, "--eval-interval", "2", "--save", tmp_path / "run", "--save-interval", "3"),
        *(*profile, "--exit-interval", "3"),
        iters=4,
    )

    def on_rank(rank: int) -> list[tuple]:
        from megatron_eslm.launch.bootstrap import init_distributed

        init_distributed()
        diary = Diary()
        trainer = build_trainer(read_command_line(later_wins(argv), 2), callbacks=[diary])
        trainer.train()
        return diary.entries

    of_ranks = run_ranks(2, on_rank)
    assert of_ranks[0] == of_ranks[1]
    assert of_ranks[0] == [
        ("start", 0),
        ("evaluation", 0),
        ("step", 1, 16, False),
        ("step", 2, 16, False),
        ("evaluation", 2),
        ("step", 3, 16, True),
        ("checkpoint", "iter_0000003"),
        ("end", 3),
    ]
    for rank in range(2):
        with gzip.open(tmp_path / "traces" / f"rank{rank}.json.gz") as file:
            names = {event.get("name") for event in json.load(file)["traceEvents"]}
        assert "aten::addmm" in names or "aten::mm" in names


def test_a_profile_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(ConfigError, match="--profile-step-end 3 is before --profile-step-start 10"):
        ReportOptions(profile="x", profile_step_end=3)
