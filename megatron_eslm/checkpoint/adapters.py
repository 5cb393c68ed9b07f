"""Whether the adapters of a checkpoint (model/lora.py) and those of a run are the same."""

from __future__ import annotations

from megatron_eslm.checkpoint.find import CheckpointInfo
from megatron_eslm.config.run import RunConfig
from megatron_eslm.errors import ConfigError
from megatron_eslm.model.options import Lora

_TO_WEIGHTS = "start a new run from its weights with --finetune"


def check_adapters(run: RunConfig, found: CheckpointInfo | None) -> None:
    """Refuse a checkpoint whose adapters are not those that the run trains.

    Args:
        run: with or without adapters.
        found: the checkpoint that it starts from; None where --load holds none yet.

    Raises:
        ConfigError: it can neither continue that checkpoint nor start from it.
    """
    ours = run.model.lora
    if found is None:
        if ours is not None:
            raise ConfigError(
                f"{_flags(ours)} trains adapters beside weights and --load {run.checkpoint.load} "
                "holds no checkpoint yet. Put the weights to start from there, or --load them from "
                "where they are."
            )
        return
    if found.kind == "weights":  # they never hold any
        return
    theirs = found.lora
    if ours == theirs:
        return
    if theirs is None:
        assert ours is not None
        raise ConfigError(
            f"{found.folder} was saved in training without adapters, which {_flags(ours)} cannot "
            f"continue. Leave --lora-rank out, or {_TO_WEIGHTS}."
        )
    here = "without --lora-rank" if ours is None else f"with {_flags(ours)}"
    raise ConfigError(
        f"{found.folder} holds adapters of {_flags(theirs)} and cannot be continued {here}. Give "
        f"{_flags(theirs)}; or, to train what they made of the model further, {_TO_WEIGHTS}, which "
        "merges them."
    )


def _flags(lora: Lora) -> str:
    return f"--lora-rank {lora.rank} --lora-alpha {lora.alpha:g}"
