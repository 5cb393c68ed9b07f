"""The DeepSpeed JSON: what a user's file says, and the full one derived from the flags."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from megatron_eslm.errors import ConfigError

Json = dict[str, Any]

# Where a flag and a key of DeepSpeed's JSON say the same thing.
_SAME = {
    "micro_batch_size": ("train_micro_batch_size_per_gpu",),
    "global_batch_size": ("train_batch_size",),
    "clip_grad": ("gradient_clipping",),
    "bf16": ("bf16", "enabled"),
    "fp16": ("fp16", "enabled"),
    "zero_stage": ("zero_optimization", "stage"),
}
# Sections that would compete with flags, and those flags.
_FLAGS_INSTEAD = {
    "optimizer": "--lr, --adam-beta1, --lr-warmup-iters and the like",
    "scheduler": "--lr, --adam-beta1, --lr-warmup-iters and the like",
    "pipeline": "--pipeline-model-parallel-size, --pipeline-split and "
    "--activation-checkpoint-interval",
    "tensor_parallel": "--tensor-model-parallel-size",
}
_NUMBERS = (int, float)


def read_json(path: str) -> Json:
    """Parse a DeepSpeed JSON file.

    Raises:
        ConfigError: it is missing, not JSON, or has a section for what flags set.
    """
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"--deepspeed_config {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:  # not JSON, or not even text
        raise ConfigError(f"--deepspeed_config {path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--deepspeed_config {path} must hold one JSON object.")
    for section, flags in _FLAGS_INSTEAD.items():
        if section in content:
            raise ConfigError(
                f'--deepspeed_config {path} has a "{section}" section, which would compete with '
                f"{flags}. Remove it."
            )
    _check_types(path, content)
    return content


def _check_types(path: str, content: Json) -> None:
    """ConfigError where a value that we read has a type that DeepSpeed would not take."""
    for section in ("bf16", "fp16", "zero_optimization"):
        if not isinstance(content.get(section, {}), dict):
            raise ConfigError(
                f"--deepspeed_config {path}: {section} must be an object, as in "
                f'"{section}": {{...}}.'
            )
    for name, keys in {**_SAME, "": ("gradient_accumulation_steps",)}.items():
        value, key = _get(content, keys), ".".join(keys)
        if name in ("bf16", "fp16"):
            if not (value is None or isinstance(value, bool)):
                raise ConfigError(f"--deepspeed_config {path}: {key} must be true or false.")
        elif value is not None and (isinstance(value, bool) or not isinstance(value, _NUMBERS)):
            raise ConfigError(f"--deepspeed_config {path}: {key} must be a number, not {value!r}.")
        elif isinstance(value, float) and name != "clip_grad":
            raise ConfigError(f"--deepspeed_config {path}: {key} must be a whole number.")
        elif value is not None and value < 1 and name not in ("clip_grad", "zero_stage"):
            raise ConfigError(f"--deepspeed_config {path}: {key} {value} must be 1 or more.")


def _get(content: Json, keys: tuple[str, ...]) -> Any:
    value: Any = content
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return None if value == "auto" else value


def values_from(content: Json) -> dict[str, Any]:
    """The flags that a DeepSpeed JSON sets, by field name ("auto" leaves one open)."""
    found = {name: _get(content, keys) for name, keys in _SAME.items()}
    if (device := _get(content, ("zero_optimization", "offload_optimizer", "device"))) is not None:
        found["cpu_offload"] = device == "cpu"
    return {name: value for name, value in found.items() if value is not None}


def accumulation_steps(content: Json) -> int | None:
    """gradient_accumulation_steps where the file sets it; there is no flag for it."""
    return _get(content, ("gradient_accumulation_steps",))


def check_agreement(path: str, content: Json, name: str, flag: str, value: Any) -> None:
    """ConfigError if the file and a flag that was given set `name` differently."""
    other = values_from(content).get(name)
    if other is not None and other != value:
        key = (
            "zero_optimization.offload_optimizer"
            if name == "cpu_offload"
            else ".".join(_SAME[name])
        )
        raise ConfigError(
            f"{flag} says {value} and {path} says {key} = {other}. Remove one of them or set the "
            'key to "auto".'
        )


def complete(
    content: Json,
    *,
    micro_batch_size: int,
    global_batch_size: int,
    gradient_accumulation_steps: int,
    clip_grad: float,
    bf16: bool,
    fp16: bool,
    zero_stage: int,
    cpu_offload: bool,
    pipeline_stages: int,
) -> Json:
    """The JSON that the engine gets: the user's, with all that the flags decide filled in."""
    full = copy.deepcopy({k: v for k, v in content.items() if not k.startswith("_")})
    steps = accumulation_steps(full)
    if steps is not None and steps != gradient_accumulation_steps:
        raise ConfigError(
            f"gradient_accumulation_steps = {steps} in the DeepSpeed JSON does not fit: "
            f"--global-batch-size {global_batch_size} makes it {gradient_accumulation_steps}. Set "
            'it to "auto".'
        )
    full.update(
        train_micro_batch_size_per_gpu=micro_batch_size,
        train_batch_size=global_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        gradient_clipping=clip_grad,
    )
    full.setdefault("steps_per_print", 2**31)
    zero = full.setdefault("zero_optimization", {})
    zero["stage"] = zero_stage
    if cpu_offload:
        zero.setdefault("offload_optimizer", {"device": "cpu"})
    full.setdefault("bf16", {})["enabled"] = bf16
    full.setdefault("fp16", {})["enabled"] = fp16
    if bf16:
        # A step whose gradients are not finite is skipped, in every stage.
        full["bf16"].setdefault("check_grad_overflow", True)
    if (bf16 or fp16) and zero_stage > 0:
        # 40 micro-steps added up in 8 bits of mantissa lose the small ones.
        full.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    if pipeline_stages > 1:
        # By default tensor-parallel ranks would each send a part of the activations, cut as in the
        # first micro-step. Every micro-step keeps another number of rows, and with sequence
        # parallelism each rank's activations are its own.
        full["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    return full
