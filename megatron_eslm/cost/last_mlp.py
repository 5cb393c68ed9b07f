"""Whether the last MLP's backward pass runs over kept tokens: `--last-mlp-backward`, resolved."""

from __future__ import annotations

import torch

from megatron_eslm.config.run import RunConfig
from megatron_eslm.errors import ConfigError
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.selection.build import policy_traits

KEPT_MLP_PAYS_FROM = {"cuda": 190, "cpu": 25}
"""From which product of width and alpha on it pays. It saves 32 alpha D^2 operations a token, at
300 TFLOP/s (a core: 0.1), and reads and writes 10 D values of the rows that it picks, at 2 TB/s in
16 bits (a core: 10 GB/s in 32)."""


def last_mlp_kept(run: RunConfig, shape: ModelShape, device_type: str | None = None) -> bool:
    """What --last-mlp-backward comes to.

    Args:
        run: whose layout the table of config/layouts.py has checked.
        shape: of the model.
        device_type: what it would run on; None is this machine's.

    Raises:
        ConfigError: it is asked for where no token is dropped.
    """
    asked, engine = run.model.last_mlp_backward, run.engine
    traits = policy_traits(run.selection)
    drops = traits.selects_tokens and not traits.holds_dropped_tokens
    if asked == "kept":
        if not drops:
            raise ConfigError(
                f"--last-mlp-backward kept with --selection {run.selection.selection}: all tokens "
                "that get there are in its loss. Leave it out."
            )
        return True
    whole = engine.zero_stage != 3 and not engine.sequence_parallel and run.model.lora is None
    device = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    pays = shape.hidden_size * run.selection.initial_alpha >= KEPT_MLP_PAYS_FROM[device]
    return asked == "auto" and drops and whole and pays
