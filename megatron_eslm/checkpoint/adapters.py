"""Check that the adapters of a checkpoint (model/lora.py) match those of the run."""

from __future__ import annotations

from megatron_eslm.checkpoint.find import CheckpointInfo
from megatron_eslm.config.run import RunConfig
from megatron_eslm.errors import ConfigError
from megatron_eslm.model.model_options import Lora

_TO_WEIGHTS = "start a new run from its weights with --finetune"


def check_adapters(run: RunConfig, found: CheckpointInfo | None) -> None:
    """Refuse a checkpoint whose adapters differ from those that the run trains.

    Args:
        run: the run, with or without adapters.
        found: the checkpoint to start from; None if --load contains none yet.

    Raises:
        ConfigError: the run can neither continue nor start from that checkpoint.
    """
    ours = run.model.lora
    if found is None:
        if ours is not None:
            raise ConfigError(
                f"{_flags(ours)} trains adapters beside existing weights, but --load "
                f"{run.checkpoint.load} contains no checkpoint. Put the weights there, or --load "
                "them from another folder."
            )
        return
    if found.kind == "weights":  # weights-only checkpoints have no adapters
        return
    theirs = found.lora
    if ours == theirs:
        return
    if theirs is None:
        assert ours is not None
        raise ConfigError(
            f"{found.folder} was trained without adapters, which {_flags(ours)} cannot "
            f"continue. Leave --lora-rank out, or {_TO_WEIGHTS}."
        )
    here = "without --lora-rank" if ours is None else f"with {_flags(ours)}"
    raise ConfigError(
        f"{found.folder} has adapters of {_flags(theirs)} and cannot be continued {here}. Give "
        f"{_flags(theirs)}; or, to merge the adapters, {_TO_WEIGHTS}."
    )


def _flags(lora: Lora) -> str:
    return f"--lora-rank {lora.rank} --lora-alpha {lora.alpha:g}"
