"""Predict what a recipe's trainings cost on GPUs, without data or checkpoints."""

from __future__ import annotations

from typing import NamedTuple

from megatron_eslm.config.run import RunConfig, parse_run
from megatron_eslm.cost.of_run import build_flops, step_work
from megatron_eslm.planning.cost import step_cost
from megatron_eslm.planning.hardware import Machine
from megatron_eslm.planning.request import GPT2_VOCAB_SIZE
from megatron_eslm.planning.setting import Setting
from megatron_eslm.recipes.recipe import Recipe, RecipeRun
from megatron_eslm.selection.build import policy_traits
from megatron_eslm.selection.state import SelectionState

ASSUMED = (
    "Steps only, at --eslm-alpha, by the cost model of docs/scaling.md; GPT-2's vocabulary. A "
    "teacher or reference model that runs is as large as the model that is trained."
)


class RunCost(NamedTuple):
    """Predicted cost of one training."""

    steps: int
    flops: float
    """FLOPs executed over all steps and GPUs."""
    seconds: float | None
    """None for a selection by gradients, whose time the cost model does not know."""


class RecipeCost:
    """Predicts the cost of a recipe's trainings.

    Args:
        recipe: the recipe.
        machine: where they run.
        gpus: devices of each training.
    """

    def __init__(self, recipe: Recipe, machine: Machine, gpus: int) -> None:
        self._recipe = recipe
        self._machine = machine
        self._gpus = gpus
        self._known: dict[str, RunCost] = {}

    def of(self, run: RecipeRun) -> RunCost:
        """The cost of a run.

        Raises:
            ConfigError: its flags cannot be used with this many GPUs.
        """
        # No seed changes the cost.
        if run.method not in self._known:
            self._known[run.method] = self._predicted(run)
        return self._known[run.method]

    def _predicted(self, run: RecipeRun) -> RunCost:
        config = parse_run(run.words(planned=True), self._gpus)
        setting, steps = Setting.of(config, GPT2_VOCAB_SIZE), config.training.train_iters
        if run.flops_of is not None:
            counted = self.of(self._recipe.run(run.flops_of, run.seed))
            steps = round(counted.flops / _flops_per_step(config))
        salt = config.objective.distill == "salt"
        taught = min(steps, config.objective.salt_iters) if salt else steps
        flops = taught * _flops_per_step(config)
        flops += (steps - taught) * _flops_per_step(config, taught=False)
        if setting.traits.needs_gradients:
            return RunCost(steps, flops, None)
        # Frozen models compute at the speed of the one that is trained.
        speed = setting.flops.executed(setting.work) / step_cost(setting, self._machine).seconds
        return RunCost(steps, flops, flops / speed)


def _flops_per_step(run: RunConfig, *, taught: bool = True) -> float:
    """Executed FLOPs of a step, with those of the reference model and, if `taught`, the teacher."""
    shape = run.shape(GPT2_VOCAB_SIZE)
    traits = policy_traits(run.selection)
    teacher = run.objective.distill_teacher is not None or traits.holds_dropped_tokens
    model = build_flops(
        run,
        shape,
        SelectionState(alpha=run.selection.initial_alpha),
        teacher=shape if teacher and taught else None,
        reference=shape if run.reference.reference is not None else None,
        device_type="cuda",
    )
    return model.executed(step_work(run))
