"""`--eval-tasks`: tasks of lm-eval during training, on the live weights.

Every rank gets the whole model, without its parallel layout, and a share of the documents. The
model is built for each evaluation and dropped after it, in the compute type and beside the one
that trains.
"""

from __future__ import annotations

import dataclasses
import datetime
import logging
import math
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_eslm.checkpoint.live_weights import live_weights
from megatron_eslm.config.run import RunConfig
from megatron_eslm.config.training_options import ReportOptions
from megatron_eslm.errors import ConfigError
from megatron_eslm.evaluation.suite import SUITES
from megatron_eslm.evaluation.tasks import (
    ReadyTask,
    TaskSources,
    load_suite,
    load_tasks,
    need_lm_eval,
)
from megatron_eslm.frozen.model import FrozenModel
from megatron_eslm.model.gpt import bare_gpt
from megatron_eslm.parallel.collectives import on_every_rank
from megatron_eslm.parallel.mesh import Mesh
from megatron_eslm.training.loop import Callback, StepOutcome, Trainer

if TYPE_CHECKING:
    from megatron_eslm.evaluation.native_lm import NativeLM

logger = logging.getLogger(__name__)


def tasks_to_evaluate(report: ReportOptions) -> list[ReadyTask]:
    """Load the tasks that --eval-tasks names.

    Raises:
        ConfigError: lm-eval, a named task or its data is missing, or all data of a suite.
    """
    need_lm_eval("--eval-tasks")
    sources = TaskSources(
        include_path=report.eval_tasks_path, task_data=report.eval_tasks_data, download=False
    )
    names = [name for name in report.eval_tasks if name not in SUITES]
    tasks = load_tasks(names, sources)[0] if names else []
    for suite in [name for name in report.eval_tasks if name in SUITES]:
        found, missing = load_suite(SUITES[suite], sources)
        tasks += found
        for name, why in missing.items():
            logger.warning("--eval-tasks %s: without %s. %s", suite, name, why)
    if not tasks:
        raise ConfigError(
            f"--eval-tasks {' '.join(report.eval_tasks)}: no task of it has its documents here; "
            "the warnings say where they are looked for. Give --eval-tasks-data, or leave it out."
        )
    return tasks


class TaskEvaluator(Callback):
    """Evaluates every --eval-tasks-interval steps and at the end. Collective."""

    def __init__(self, run: RunConfig) -> None:
        """Load the tasks.

        Raises:
            ConfigError: lm-eval, a task or its data is missing.
        """
        report = run.report
        self._limit, self._interval = report.eval_tasks_limit, report.eval_tasks_interval
        self._tasks = on_every_rank(lambda: tasks_to_evaluate(report))
        self._alone: Mesh | None = None

    def on_start(self, trainer: Trainer) -> None:
        mesh, group = trainer.mesh, trainer.mesh.tp_group
        if mesh.tp_size > 1:
            seconds = trainer.run.engine.collective_timeout_seconds
            group, _ = dist.new_subgroups(1, timeout=datetime.timedelta(seconds=seconds))
        self._alone = dataclasses.replace(mesh, tp_size=1, tp_rank=0, tp_group=group)

    def on_step(self, trainer: Trainer, step: StepOutcome) -> None:
        due = trainer.state.iteration % self._interval == 0
        if not step.stop and (step.is_last or due):
            trainer.tasks_evaluated(self.evaluate(trainer))

    def evaluate(self, trainer: Trainer) -> dict[str, float]:
        """Metrics by tasks/NAME/METRIC, on every rank."""
        from megatron_eslm.evaluation.run import run_tasks

        metrics: dict[str, float] = {}
        with trainer.phases("tasks", waits=True):
            lm = self._lm(trainer)
            for result in run_tasks(lm, self._tasks, self._limit):
                shown = {k: v for k, v in result.metrics.items() if math.isfinite(v)}
                metrics |= {f"tasks/{result.task}/{name}": shown[name] for name in shown}
                logger.info(
                    "iteration %d | task %s | %s | %.1f s",
                    trainer.state.iteration,
                    result.task,
                    ", ".join(f"{name} {value:.4f}" for name, value in shown.items()),
                    result.seconds,
                )
        return metrics

    def _lm(self, trainer: Trainer) -> NativeLM:
        """The model with its weights of now. Collective."""
        from megatron_eslm.evaluation.native_lm import NativeLM
        from megatron_eslm.evaluation.scorer import Scorer

        assert self._alone is not None
        run, engine, phases = trainer.run, trainer.engine, trainer.phases
        shape = engine.model.shape
        weights = live_weights(engine, shape.vocab_size)
        model = bare_gpt(shape, self._alone)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.zero_()  # rows of padding have no weights
                parameter.narrow(0, 0, len(weights[name])).copy_(weights.pop(name))
        frozen = FrozenModel(model.to(device=engine.device, dtype=run.dtype))

        def beat() -> None:
            with phases("batch of a task", waits=True):
                pass  # so that the watchdog sees progress

        batch_tokens = run.training.micro_batch_size * run.model.seq_length
        scorer = Scorer(frozen, shape, self._alone.tp_group, batch_tokens, beat)
        return NativeLM(
            scorer, trainer.datasets.train.source.tokenizer, dist.group.WORLD, quiet=True
        )
