"""Flags of the objective: terms besides the causal language modelling loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_eslm.errors import ConfigError
from megatron_eslm.limits import ONE_OR_MORE, Range, check_fields


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """Objective: knowledge distillation."""

    distill: Literal["dense", "eslm", "salt"] | None = None
    """Also learn from a teacher's distributions. eslm: on the tokens that --selection eslm keeps
    (ESLM-KD, Algorithm 3). dense: on all tokens (--selection clm). salt: on all tokens for the
    first --salt-iters steps, then without the teacher (--selection clm)."""

    distill_teacher: str | None = None
    """The teacher, of any size with the same tokenizer: a folder of checkpoints, one checkpoint, or
    a Hugging Face model. With --selection uncertainty: the starting weights, if --load does not
    name them."""

    distill_teacher_dtype: Literal["bf16", "float32"] = "bf16"
    """Compute dtype of the teacher; its logits are always compared in float32."""

    distill_weight: Annotated[
        float,
        Range(
            at_least=0, at_most=1, why="it is the teacher's share of the loss; the paper uses 0.5"
        ),
    ] = 0.5
    """Weight of the divergence from the teacher in the loss (lambda); the rest is the causal
    language modelling loss."""

    distill_temperature: Annotated[float, Range(above=0, why="the paper uses 1")] = 1.0
    """Temperature of both distributions, teacher's and student's (rho)."""

    salt_iters: Annotated[int, ONE_OR_MORE] = 12_000
    """Steps with the teacher under --distill salt."""

    def __post_init__(self) -> None:
        check_fields(self)


def check_objective(
    options: ObjectiveOptions, selection: str, *, loads: bool, given: frozenset[str] = frozenset()
) -> None:
    """Check the objective against the rest of the run.

    Args:
        options: options of the objective.
        selection: --selection.
        loads: whether --load is given.
        given: names of the flags that were set.

    Raises:
        ConfigError: objective and selection do not fit together, or a flag would have no effect.
    """
    kind = options.distill
    fitting = {None: None, "dense": "clm", "salt": "clm", "eslm": "eslm"}[kind]
    if fitting is not None and selection != fitting:
        on = "the tokens that ESLM keeps" if fitting == "eslm" else "all tokens"
        raise ConfigError(
            f"--distill {kind} trains on {on}, but --selection is {selection}; use --selection "
            f"{fitting}{', or --distill eslm' if selection == 'eslm' else ''}."
        )
    if kind is not None and options.distill_teacher is None:
        raise ConfigError(
            f"--distill {kind} needs a teacher, but --distill-teacher is not set. Give a folder of "
            "checkpoints or of a Hugging Face model."
        )
    idle = given & {"distill_weight", "distill_temperature", "salt_iters"}
    if kind is not None:
        idle -= {"distill_weight", "distill_temperature"}
    if kind == "salt":
        idle -= {"salt_iters"}
    if kind is None and selection != "uncertainty":
        idle |= given & {"distill_teacher", "distill_teacher_dtype"}
    if idle:
        flag = "--" + min(idle).replace("_", "-")
        wanted = "--distill salt" if flag == "--salt-iters" else "--distill dense, eslm or salt"
        raise ConfigError(f"{flag} has no effect without {wanted}; give that, or leave it out.")
    if selection == "uncertainty" and not loads:
        raise ConfigError(
            "--selection uncertainty regularizes a trained model towards its starting weights and "
            "needs --load with such weights (tools/convert_from_hf.py converts a Hugging Face "
            "model). To train from scratch, use another --selection."
        )
