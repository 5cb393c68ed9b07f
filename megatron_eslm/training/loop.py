"""The training loop and its callbacks."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_eslm.checkpoint.manifest import iteration_of
from megatron_eslm.checkpoint.train_state import TrainState
from megatron_eslm.config.run import RunConfig
from megatron_eslm.cost.budget import is_complete
from megatron_eslm.cost.flops import FlopsModel
from megatron_eslm.data.loader import build_loader
from megatron_eslm.data.mixture import Datasets
from megatron_eslm.engine.engine import Engine
from megatron_eslm.engine.learning_rate import learning_rate
from megatron_eslm.launch.signals import StopSignal
from megatron_eslm.parallel.mesh import Mesh
from megatron_eslm.selection.alpha import AlphaController
from megatron_eslm.selection.state import Recorder
from megatron_eslm.training.evaluate import Evaluation
from megatron_eslm.training.nonfinite import NonfiniteError, NonfiniteGuard
from megatron_eslm.training.outputs import Outputs
from megatron_eslm.training.reading_plan import ReadingPlan
from megatron_eslm.training.step_batches import Records, StepBatches
from megatron_eslm.training.step_stats import StepStats, reduce_records
from megatron_eslm.training.stopping import Stop, StopRequests
from megatron_eslm.watchdog.phases import Phases

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """A finished optimizer step; the trainer's state already includes it."""

    stats: StepStats
    """Statistics over all ranks."""
    grad_norm: float
    lr: float
    batch_size: int
    """Sequences that were read, over all ranks."""
    seconds: float
    flops: float
    """FLOPs executed, over all ranks."""
    samples: list[int]
    """Numbers of the sequences that were read."""
    records: Records
    """Records of selection on this rank and stage."""
    failure: NonfiniteError | None
    """Why training cannot continue after this step."""
    is_last: bool
    """Whether --train-iters or --train-flops is reached."""
    stop: Stop | None
    """Reason why the run stops early, if it does."""
    leaves: bool
    """Whether --exit-interval ends the run after this step."""

    @property
    def ends(self) -> bool:
        """Whether this is the last step of this process."""
        return self.is_last or self.leaves or self.stop is not None


class Callback:
    """Base class of callbacks of the training loop: `build_trainer(run, callbacks=[...])`.

    Every rank calls all methods, in the order of the trainer's callbacks, so they may be
    collective. Report, dumps, evaluation, checkpoints and profiler are callbacks, too.
    """

    def on_start(self, trainer: Trainer) -> None:
        """Called before the first step of this process."""

    def on_step(self, trainer: Trainer, step: StepOutcome) -> None:
        """Called after each optimizer step."""

    def on_failure(self, trainer: Trainer, step: StepOutcome) -> None:
        """Instead of `on_step`, after a step with which training ends in an error."""

    def on_error(self, trainer: Trainer, error: Exception) -> None:
        """Called before training ends in an error. Not collective: other ranks may go on."""

    def on_evaluation(self, trainer: Trainer, evaluation: Evaluation) -> None:
        """Called after each evaluation on the validation set."""

    def on_test(self, trainer: Trainer, evaluation: Evaluation) -> None:
        """Called after the last step with the losses of --test-data-path, if it is given."""

    def on_task_evaluation(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Called after an evaluation of --eval-tasks, with its metrics by tasks/NAME/METRIC."""

    def on_checkpoint(self, trainer: Trainer, folder: Path) -> None:
        """Called when a checkpoint is complete; with --async-save some steps after its own."""

    def on_end(self, trainer: Trainer) -> None:
        """Called after the last step, also if the run was stopped early; not after an error."""


@dataclass
class Trainer:
    """All parts of a run; `train()` trains until the run ends or is stopped."""

    run: RunConfig
    mesh: Mesh
    engine: Engine
    datasets: Datasets
    reading: ReadingPlan
    state: TrainState
    recorder: Recorder
    flops: FlopsModel
    run_record: dict[str, Any]
    """run.json of the checkpoints."""
    outputs: Outputs
    """Files and folders that the run writes to; closed at the end of training."""
    phases: Phases
    """Reports the phases of this rank to the watchdog."""
    callbacks: Sequence[Callback]

    def __post_init__(self) -> None:
        self.nonfinite = NonfiniteGuard(self.run.selection.max_nonfinite_steps, self.mesh)
        self.alpha = AlphaController(
            self.run.selection, self.state.selection, self.run.training.train_iters
        )
        self._saved_iteration: int | None = None
        self._batch_size: int | None = None
        self.outputs.guard(self.engine.monitor)

    def train(self, began_seconds: float | None = None) -> signal.Signals | None:
        """Train from the state's iteration to `--train-iters` or `--train-flops`.

        Args:
            began_seconds: when the program began, on the monotonic clock; default: now.

        Returns:
            The signal that ended the run early, if any.

        Raises:
            ConfigError: a checkpoint could not be written, or metrics or dumps could not (then a
                checkpoint was saved first).
        """
        try:
            stopped = self._train(time.monotonic() if began_seconds is None else began_seconds)
            for callback in self.callbacks:
                callback.on_end(self)
            with self.phases("end of training", waits=self.mesh.world_size > 1):
                self.outputs.check_written(
                    self.state.iteration, saved=self._saved_iteration == self.state.iteration
                )
        except Exception as error:
            self._failed(error)
            raise
        finally:
            self.outputs.close()
        if stopped is None:
            return None
        logger.warning("%s: stopped after iteration %d", stopped.reason, self.state.iteration)
        return stopped.signal

    def evaluated(self, evaluation: Evaluation) -> None:
        """Tell all callbacks of an evaluation."""
        for callback in self.callbacks:
            callback.on_evaluation(self, evaluation)

    def tested(self, evaluation: Evaluation) -> None:
        """Tell all callbacks of the losses of --test-data-path."""
        for callback in self.callbacks:
            callback.on_test(self, evaluation)

    def tasks_evaluated(self, metrics: dict[str, float]) -> None:
        """Tell all callbacks of an evaluation of --eval-tasks."""
        for callback in self.callbacks:
            callback.on_task_evaluation(self, metrics)

    def saved(self, folder: Path) -> None:
        """Tell all callbacks of a complete checkpoint."""
        self._saved_iteration = iteration_of(folder)
        for callback in self.callbacks:
            callback.on_checkpoint(self, folder)

    def _failed(self, error: Exception) -> None:
        for callback in self.callbacks:
            try:
                callback.on_error(self, error)
            except Exception:  # the run ends with the first error
                logger.exception("%s.on_error failed", type(callback).__name__)

    def _train(self, began_seconds: float) -> Stop | None:
        t, state = self.run.training, self.state
        with StopSignal(t.stop_signals) as received:
            stop = StopRequests(t, received, began_seconds, self.outputs)
            batches = self._batches()
            for callback in self.callbacks:
                callback.on_start(self)
            while not is_complete(self.run, state.iteration, state.flops_paper):
                step = self._step(batches, stop)
                for callback in self.callbacks:
                    if step.failure is None:
                        callback.on_step(self, step)
                    else:
                        callback.on_failure(self, step)
                if step.failure is not None:
                    raise step.failure
                if step.leaves and not step.is_last:
                    logger.info("stopped at --exit-interval, iteration %d", state.iteration)
                if step.ends:
                    return step.stop
        return None

    def _batches(self) -> StepBatches:
        t, position = self.run.training, self.state.consumed_samples
        # A pipeline's middle stages read only if they score.
        scores = self.engine.model.policy.traits.selects_per_step
        reads = scores or self.mesh.is_first_stage or self.mesh.is_last_stage
        loader = (
            build_loader(
                self.datasets.train,
                start_sample=position,
                num_samples=self.reading.samples_left(position),
                micro_batch_size=t.micro_batch_size,
                dp_rank=self.mesh.dp_rank,
                dp_size=self.mesh.dp_size,
                num_workers=self.run.data.num_workers,
                timeout_seconds=60.0 * self.run.engine.distributed_timeout_minutes,
                pin_memory=self.engine.device.type == "cuda",
                skipped=self.reading.skipped,
            )
            if reads
            else None
        )
        return StepBatches(self.engine, self.datasets.train, loader, t.micro_batch_size)

    def _begin_batch(self) -> int:
        """Number of sequences that the next step reads; logs changes."""
        size = self.reading.batch_size(self.state.consumed_samples)
        if self.run.training.rampup_batch_size and size != self._batch_size:
            logger.info(
                "batches of %d sequences from iteration %d, sample %d",
                size,
                self.state.iteration + 1,
                self.state.consumed_samples,
            )
        self._batch_size = size
        return size

    def _step(self, batches: StepBatches, stop: StopRequests) -> StepOutcome:
        """Run one optimizer step and advance the state."""
        t, state, begin = self.run.training, self.state, time.perf_counter()
        batch_size = self._begin_batch()
        self.phases.iteration = state.iteration + 1
        state.selection.iteration = state.iteration
        self.alpha.begin_step(state.iteration)
        samples = self.reading.skipped.numbers(state.consumed_samples, batch_size)
        step = batches.step(samples, state.selection.alpha)
        self.engine.set_shape(step.shape)
        self.recorder.nonfinite_candidates = step.nonfinite_candidates
        lr = learning_rate(self.run.optimizer, state.iteration)
        norm, applied = self.engine.step(step.batches, lr)
        records = step.records(self.recorder.take())
        for numbers, record in records:
            self.nonfinite.note(record, [samples[number] for number in numbers])
        with self.phases("counts of the step", waits=True):
            stats = reduce_records(
                [record for _, record in records],
                self.mesh,
                self.run.model.seq_length,
                self.engine.device,
                excess=self.engine.model.policy.traits.scores_excess,
                stop_votes=stop.votes(),
            )

        self.alpha.end_step(state.iteration, stats.cvar, stats.mean_excess)
        state.iteration += 1
        state.consumed_samples = self.reading.skipped.after(state.consumed_samples, batch_size)
        self.engine.ds.global_samples = state.consumed_samples
        state.tokens += stats.tokens
        state.tokens_trained += stats.tokens_kept
        executed = self.flops.executed(stats.work)
        state.flops += executed
        state.flops_paper += self.flops.paper_flops(stats.work)
        seconds = time.perf_counter() - begin
        state.elapsed_seconds += seconds
        # Loss scaling causes harmless overflows of gradients; the loss is finite then.
        overflow = self.run.engine.fp16 and bool(torch.isfinite(torch.tensor(stats.loss)))
        failure = self.nonfinite.after_step(state, applied=applied or overflow)
        is_last = is_complete(self.run, state.iteration, state.flops_paper)
        return StepOutcome(
            stats=stats,
            grad_norm=norm,
            lr=lr,
            batch_size=batch_size,
            seconds=seconds,
            flops=executed,
            samples=samples,
            records=records,
            failure=failure,
            is_last=is_last,
            stop=None if is_last else stop.agreed(stats.stop_votes),
            leaves=t.exit_interval is not None and state.iteration % t.exit_interval == 0,
        )
