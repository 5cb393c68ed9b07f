"""Standard callbacks: selection dump, evaluation, tasks, report, checkpoints, profiler.

Order matters: a report includes the evaluation of its step. A checkpoint comes after all records of
its step. A profile begins after that, so that it holds steps only.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch

from megatron_eslm.checkpoint.saver import CheckpointSaver
from megatron_eslm.checkpoint.train_state import TrainState
from megatron_eslm.config.run import RunConfig
from megatron_eslm.cost.flops import device_peak_flops
from megatron_eslm.data.mixture import Mixture
from megatron_eslm.engine.learning_rate import learning_rate
from megatron_eslm.errors import ConfigError, first_line
from megatron_eslm.training.dump import dump_selection, read_tokens
from megatron_eslm.training.evaluate import Evaluation, evaluate
from megatron_eslm.training.loop import Callback, StepOutcome, Trainer
from megatron_eslm.training.profile import Profiler
from megatron_eslm.training.progress_report import (
    Speed,
    metrics_line,
    progress_line,
    write_monitors,
)
from megatron_eslm.training.task_evaluation import TaskEvaluator

logger = logging.getLogger(__name__)


def standard_callbacks(run: RunConfig) -> list[Callback]:
    """The standard callbacks that a run's options ask for, in order."""
    callbacks: list[Callback] = [Evaluator(), Reporter(), Checkpointer()]
    if run.report.eval_tasks:
        callbacks.insert(1, TaskEvaluator(run))
    if run.report.dump_selection is not None:
        callbacks.insert(0, SelectionDump(run.report.dump_selection))
    if run.report.profile is not None:
        callbacks.append(Profiler(run.report))
    return callbacks


class SelectionDump(Callback):
    """`--dump-selection`: one file per step."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_step(self, trainer: Trainer, step: StepOutcome) -> None:
        tokens = read_tokens(trainer.datasets.train, step.samples, trainer.mesh)
        with (
            trainer.phases("dump of the selection", waits=True),
            trainer.outputs.recording(f"--dump-selection {self.folder}"),
        ):
            dump_selection(
                Path(self.folder),
                trainer.state.iteration,
                tokens,
                step.samples,
                step.records,
                trainer.mesh,
            )

    def on_failure(self, trainer: Trainer, step: StepOutcome) -> None:
        self.on_step(trainer, step)


class Evaluator(Callback):
    """Validation loss before the first step, every --eval-interval steps, and at the end; the test
    loss at the end."""

    def on_start(self, trainer: Trainer) -> None:
        if trainer.state.iteration == 0:
            self.evaluate(trainer)

    def on_step(self, trainer: Trainer, step: StepOutcome) -> None:
        due = trainer.state.iteration % trainer.run.training.eval_interval == 0
        if not step.stop and (step.is_last or due):
            self.evaluate(trainer)
        test = trainer.datasets.test
        if not step.stop and step.is_last and test is not None:
            trainer.tested(self._losses(trainer, test))

    def evaluate(self, trainer: Trainer) -> Evaluation | None:
        """Evaluate now and tell all callbacks; None without a validation set. Collective."""
        valid, state = trainer.datasets.valid, trainer.state
        if valid is None:
            return None
        evaluation = self._losses(trainer, valid)
        best = state.best_valid_loss
        if math.isfinite(evaluation.loss) and (best is None or evaluation.loss < best):
            state.best_valid_loss = evaluation.loss
        trainer.evaluated(evaluation)
        return evaluation

    def _losses(self, trainer: Trainer, dataset: Mixture) -> Evaluation:
        with trainer.phases("evaluation", waits=trainer.mesh.world_size > 1):
            return evaluate(
                trainer.engine, dataset, trainer.mesh, trainer.run.training.micro_batch_size
            )


class Reporter(Callback):
    """Writes progress lines, metrics file and monitors; rank 0 only."""

    def __init__(self) -> None:
        self._evaluation: Evaluation | None = None
        self._test: Evaluation | None = None
        self._tasks: dict[str, float] = {}
        self._unreported: list[tuple[float, int, float, float]] = []
        """Seconds, positions read, executed and model FLOPs of each step since the last report."""

    def on_evaluation(self, trainer: Trainer, evaluation: Evaluation) -> None:
        self._evaluation = evaluation
        if trainer.state.iteration == 0:
            self._report(trainer, None)

    def on_test(self, trainer: Trainer, evaluation: Evaluation) -> None:
        self._test = evaluation

    def on_task_evaluation(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        self._tasks = metrics

    def on_step(self, trainer: Trainer, step: StepOutcome) -> None:
        work = step.stats.work
        self._unreported.append(
            (step.seconds, work.tokens, step.flops, trainer.flops.model_flops(work))
        )
        due = trainer.state.iteration % trainer.run.training.log_interval == 0
        if due or step.is_last or self._evaluation is not None or self._tasks:
            self._report(trainer, step)

    def _report(self, trainer: Trainer, last: StepOutcome | None) -> None:
        evaluation, self._evaluation = self._evaluation, None
        run, state = trainer.run, trainer.state
        speed = self._speed(trainer) if last else None
        line = metrics_line(
            state,
            last.stats if last else None,
            evaluation=evaluation,
            lr=last.lr if last else learning_rate(run.optimizer, state.iteration),
            grad_norm=last.grad_norm if last else None,
            batch_size=last.batch_size if last else None,
            micro_batches_of_step=_micro_batches_of_step(run, state),
            speed=speed,
        )
        if self._test is not None:
            line |= {
                "test_loss": self._test.loss,
                "test_loss_by_domain": self._test.loss_by_domain,
            }
        line |= self._tasks
        self._tasks = {}
        logger.info(progress_line(line, run.training.train_iters, speed))
        trainer.outputs.write_metrics(line)
        write_monitors(trainer.engine.monitor, line)

    def _speed(self, trainer: Trainer) -> Speed:
        """Compute the speed of the steps since the last report, and reset them."""
        done, self._unreported = self._unreported, []
        seconds, tokens, executed, model = map(sum, zip(*done, strict=True))
        peak = _peak_flops(trainer)
        left = trainer.reading.samples_left(trainer.state.consumed_samples)
        return Speed(
            step_seconds=seconds / len(done),
            tokens_per_second=tokens / seconds,
            seconds_left=left * trainer.run.model.seq_length * seconds / tokens,
            mfu=None if peak is None else model / seconds / peak,
            hfu=None if peak is None else executed / seconds / peak,
        )


def _micro_batches_of_step(run: RunConfig, state: TrainState) -> float | None:
    """Mean over the steps so far, of all ranks; None before the first."""
    tokens = run.training.micro_batch_size * run.model.seq_length
    return state.tokens / tokens / state.iteration if state.iteration else None


def _peak_flops(trainer: Trainer) -> float | None:
    """Of all devices together; None where it is not known."""
    cuda = trainer.engine.device.type == "cuda"
    half = trainer.run.dtype != torch.float32
    name = torch.cuda.get_device_name() if cuda and half else ""
    peak = device_peak_flops(name, trainer.run.report.peak_tflops)
    return None if peak is None else peak * trainer.mesh.world_size


class Checkpointer(Callback):
    """Saves a checkpoint every --save-interval steps and at the end of the run."""

    def __init__(self) -> None:
        self._saver: CheckpointSaver | None = None

    def on_step(self, trainer: Trainer, step: StepOutcome) -> None:
        saver = self._saver_of(trainer)
        if saver is None:
            return
        self._tell(trainer, saver.poll())
        if step.ends:
            self.save(trainer)
        elif trainer.state.iteration % trainer.run.checkpoint.save_interval == 0:
            self._begin(trainer, saver)

    def on_failure(self, trainer: Trainer, step: StepOutcome) -> None:
        if self._saver is not None:
            try:
                self._tell(trainer, self._saver.finish())
            except ConfigError as error:
                logger.error("%s", error)  # the run ends with the step's failure

    def on_error(self, trainer: Trainer, error: Exception) -> None:
        saver = self._saver
        if saver is None or (path := saver.under_way) is None:
            return
        what = f"{type(error).__name__}: {first_line(error)}"
        logger.error("%s; the run ends once %s is written", what, path)
        if saver.finish_alone() is not None:
            logger.warning("saved %s", path)

    def save(self, trainer: Trainer) -> None:
        """Save now, wait for it, and tell all callbacks; do nothing without --save. Collective."""
        saver = self._saver_of(trainer)
        if saver is not None:
            self._finish_earlier(trainer, saver)
            self._tell(trainer, saver.save(trainer.state))

    def _begin(self, trainer: Trainer, saver: CheckpointSaver) -> None:
        if not trainer.run.checkpoint.async_save:
            return self.save(trainer)
        self._finish_earlier(trainer, saver)
        saver.begin(trainer.state)

    def _finish_earlier(self, trainer: Trainer, saver: CheckpointSaver) -> None:
        if (earlier := saver.under_way) is not None:
            iteration = trainer.state.iteration
            logger.info("saving iteration %d waits until %s is written", iteration, earlier)
            self._tell(trainer, saver.finish())

    def _tell(self, trainer: Trainer, complete: Path | None) -> None:
        if complete is not None:
            logger.info("saved %s", complete)
            trainer.saved(complete)

    def _saver_of(self, trainer: Trainer) -> CheckpointSaver | None:
        """The saver of a run with --save."""
        if self._saver is None and trainer.outputs.save is not None:
            self._saver = CheckpointSaver(
                trainer.engine,
                trainer.outputs.save,
                run=trainer.run_record,
                tokenizer=trainer.datasets.train.source.tokenizer,
                keep_last=trainer.run.checkpoint.keep_last,
                phases=trainer.phases,
            )
        return self._saver
