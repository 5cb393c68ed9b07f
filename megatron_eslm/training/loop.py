"""The training loop."""

from __future__ import annotations

import logging
import math
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_eslm.checkpoint.save import save_checkpoint
from megatron_eslm.checkpoint.train_state import TrainState
from megatron_eslm.config.run import RunConfig
from megatron_eslm.cost.flops import FlopsModel, device_peak_flops
from megatron_eslm.data.loader import build_loader
from megatron_eslm.data.mixture import Datasets
from megatron_eslm.engine.engine import Engine
from megatron_eslm.engine.schedule import learning_rate
from megatron_eslm.launch.signals import StopSignal
from megatron_eslm.parallel.mesh import Mesh
from megatron_eslm.selection.alpha import AlphaController
from megatron_eslm.selection.state import Recorder
from megatron_eslm.training.dump import dump_selection, read_tokens
from megatron_eslm.training.evaluate import Evaluation, evaluate
from megatron_eslm.training.nonfinite import NonfiniteGuard
from megatron_eslm.training.outputs import Outputs
from megatron_eslm.training.reading_plan import ReadingPlan
from megatron_eslm.training.report import Speed, metrics_line, progress_line, write_monitors
from megatron_eslm.training.step_batches import StepBatches
from megatron_eslm.training.step_stats import StepStats, reduce_records
from megatron_eslm.training.stopping import Stop, StopRequests
from megatron_eslm.watchdog.phases import Phases

logger = logging.getLogger(__name__)


@dataclass
class Trainer:
    """Everything that a run needs, built; `train()` runs it until it ends or is to stop."""

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
    """What it writes to; closed at the end of training."""
    phases: Phases
    """Where this rank is, for the watchdog."""

    def __post_init__(self) -> None:
        self.nonfinite = NonfiniteGuard(self.run.selection.max_nonfinite_steps, self.mesh)
        self.alpha = AlphaController(self.run.selection, self.state.selection)
        self._saved_iteration = -1
        self._batch_size: int | None = None
        self._unreported: list[tuple[float, int, float]] = []
        """Seconds, positions read and FLOPs of each step since the last report."""
        self.outputs.guard(self.engine.monitor)

    def train(self, began_seconds: float | None = None) -> signal.Signals | None:
        """Train from the state's iteration to `--train-iters`.

        Args:
            began_seconds: when the program began, on the monotonic clock; default: now.

        Returns:
            The signal that ended the run early, if one did.

        Raises:
            ConfigError: a disk took no checkpoint; or no metrics or dumps, for which a checkpoint
                has been saved first.
        """
        try:
            stopped = self._train(time.monotonic() if began_seconds is None else began_seconds)
            with self.phases("end of training", waits=self.mesh.world_size > 1):
                self.outputs.check_written(
                    self.state.iteration, saved=self._saved_iteration == self.state.iteration
                )
        finally:
            self.outputs.close()
        if stopped is None:
            return None
        logger.warning("%s: stopped after iteration %d", stopped.reason, self.state.iteration)
        return stopped.signal

    def _train(self, began_seconds: float) -> Stop | None:
        t, state = self.run.training, self.state
        assert t.train_iters and t.eval_interval
        stopped = None
        with StopSignal(t.stop_signals) as received:
            stop = StopRequests(t, received, began_seconds, self.outputs)
            batches = self._batches()
            if state.iteration == 0 and self.datasets.valid is not None:
                self._report(None, None, self._evaluate())
            while state.iteration < t.train_iters and stopped is None:
                stats, norm = self._step(batches, stop)
                last = state.iteration == t.train_iters
                stopped = None if last else stop.agreed(stats.stop_votes)
                evaluation = None
                if (
                    self.datasets.valid is not None
                    and not stopped
                    and (last or state.iteration % t.eval_interval == 0)
                ):
                    evaluation = self._evaluate()
                if evaluation is not None or last or state.iteration % t.log_interval == 0:
                    self._report(stats, norm, evaluation)
                leaves = t.exit_interval is not None and state.iteration % t.exit_interval == 0
                if (
                    last
                    or leaves
                    or stopped
                    or (state.iteration % self.run.checkpoint.save_interval == 0)
                ):
                    self._save()
                if leaves and not last:
                    logger.info("stopped at --exit-interval, iteration %d", state.iteration)
                    break
        return stopped

    def _batches(self) -> StepBatches:
        t, position = self.run.training, self.state.consumed_samples
        assert t.micro_batch_size
        # A pipeline's middle stages read only to score.
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
        """How many sequences the next step reads; a change is told."""
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

    def _step(self, batches: StepBatches, stop: StopRequests) -> tuple[StepStats, float]:
        """One optimizer step; advances the state."""
        state, begin = self.state, time.perf_counter()
        assert self.run.model.seq_length
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
        if folder := self.run.report.dump_selection:
            tokens = read_tokens(self.datasets.train, samples, self.mesh)
            with (
                self.phases("dump of the selection", waits=True),
                self.outputs.recording(f"--dump-selection {folder}"),
            ):
                dump_selection(
                    Path(folder),
                    state.iteration + 1,
                    tokens,
                    samples,
                    records,
                    self.mesh,
                )
        with self.phases("counts of the step", waits=True):
            stats = reduce_records(
                [record for _, record in records],
                self.mesh,
                self.run.model.seq_length,
                self.engine.device,
                stop_votes=stop.votes(),
            )

        self.alpha.end_step(state.iteration, stats.cvar)
        state.iteration += 1
        state.consumed_samples = self.reading.skipped.after(state.consumed_samples, batch_size)
        self.engine.ds.global_samples = state.consumed_samples
        state.tokens += stats.tokens
        state.tokens_trained += stats.tokens_kept
        executed = self.flops.executed(stats.work)
        state.flops += executed
        state.flops_paper += self.flops.paper(stats.work)
        seconds = time.perf_counter() - begin
        state.elapsed_seconds += seconds
        self._unreported.append((seconds, stats.work.tokens, executed))
        # With loss scaling an overflow is part of the game; the loss itself tells them apart.
        overflow = self.run.engine.fp16 and bool(torch.isfinite(torch.tensor(stats.loss)))
        self.nonfinite.after_step(state, applied=applied or overflow)
        return stats, norm

    def _evaluate(self) -> Evaluation:
        assert self.datasets.valid is not None and self.run.training.micro_batch_size
        with self.phases("evaluation", waits=self.mesh.world_size > 1):
            evaluation = evaluate(
                self.engine, self.datasets.valid, self.mesh, self.run.training.micro_batch_size
            )
        best = self.state.best_valid_loss
        if math.isfinite(evaluation.loss) and (best is None or evaluation.loss < best):
            self.state.best_valid_loss = evaluation.loss
        return evaluation

    def _report(
        self, stats: StepStats | None, norm: float | None, evaluation: Evaluation | None
    ) -> None:
        """Progress line, metrics file and monitors; only rank 0 has any of them."""
        speed = self._speed() if self._unreported else None
        line = metrics_line(
            self.state,
            stats,
            evaluation=evaluation,
            lr=learning_rate(self.run.optimizer, max(0, self.state.iteration - 1)),
            grad_norm=norm,
            batch_size=self._batch_size,
            speed=speed,
        )
        assert self.run.training.train_iters
        logger.info(progress_line(line, self.run.training.train_iters, speed))
        self.outputs.write_metrics(line)
        write_monitors(self.engine.monitor, line)

    def _speed(self) -> Speed:
        """Of the steps since the last report; they begin anew."""
        done, self._unreported = self._unreported, []
        seconds, tokens, executed = map(sum, zip(*done, strict=True))
        assert self.run.model.seq_length
        samples_left = self.reading.samples_left(self.state.consumed_samples)
        return Speed(
            step_seconds=seconds / len(done),
            tokens_per_second=tokens / seconds,
            seconds_left=samples_left * self.run.model.seq_length * seconds / tokens,
            mfu=self._mfu(executed / seconds),
        )

    def _mfu(self, flops_per_second: float) -> float | None:
        cuda = self.engine.device.type == "cuda"
        half = self.run.dtype != torch.float32
        name = torch.cuda.get_device_name() if cuda and half else ""
        peak = device_peak_flops(name, self.run.report.peak_tflops)
        return None if peak is None else flops_per_second / (peak * self.mesh.world_size)

    def _save(self) -> None:
        options = self.run.checkpoint
        if self.outputs.save is None or self._saved_iteration == self.state.iteration:
            return
        self._saved_iteration = self.state.iteration
        with self.phases("checkpoint", waits=self.mesh.world_size > 1):
            folder = save_checkpoint(
                self.engine,
                self.outputs.save,
                state=self.state,
                run=self.run_record,
                tokenizer=self.datasets.train.source.tokenizer,
                keep_last=options.keep_last,
            )
        logger.info("saved %s", folder)
