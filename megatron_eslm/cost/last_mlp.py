"""Resolve `--last-mlp-backward`: whether the last MLP runs backward over kept tokens only."""

from __future__ import annotations

import torch

from megatron_eslm.config.run import RunConfig
from megatron_eslm.errors import ConfigError
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.selection.build import policy_traits

KEPT_MLP_PAYS_FROM = {"cuda": 190, "cpu": 25}
"""Smallest hidden size x alpha for which skipping dropped tokens pays. It saves 32 alpha D^2
operations per token, at 300 TFLOP/s (0.1 per CPU core), but reads and writes 10 D values per
selected row, at 2 TB/s in 16 bits (10 GB/s per CPU core in 32 bits)."""


def last_mlp_kept(run: RunConfig, shape: ModelShape, device_type: str | None = None) -> bool:
    """Resolve --last-mlp-backward.

    Args:
        run: the run; its layout was checked by config/layouts.py.
        shape: the model's shape.
        device_type: device to run on; None: this machine's.

    Raises:
        ConfigError: `kept` is requested although no token is dropped.
    """
    asked, engine = run.model.last_mlp_backward, run.engine
    traits = policy_traits(run.selection)
    drops = traits.selects_tokens and not traits.holds_dropped_tokens
    if asked == "kept":
        if not drops:
            raise ConfigError(
                f"--last-mlp-backward kept with --selection {run.selection.selection}: all tokens "
                "that reach the last MLP are in the loss. Leave out --last-mlp-backward."
            )
        return True
    whole = engine.zero_stage != 3 and not engine.sequence_parallel and run.model.lora is None
    device = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    pays = shape.hidden_size * run.selection.largest_alpha >= KEPT_MLP_PAYS_FROM[device]
    return asked == "auto" and drops and whole and pays
