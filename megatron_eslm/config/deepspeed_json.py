"""The DeepSpeed JSON: read the user's file and complete it from the flags."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_eslm.errors import ConfigError
from megatron_eslm.files import json_file
from megatron_eslm.launch.bootstrap import quiet_imports

Json = dict[str, Any]

# Flags and the keys of DeepSpeed's JSON with the same meaning.
_SAME = {
    "micro_batch_size": ("train_micro_batch_size_per_gpu",),
    "global_batch_size": ("train_batch_size",),
    "clip_grad": ("gradient_clipping",),
    "bf16": ("bf16", "enabled"),
    "fp16": ("fp16", "enabled"),
    "zero_stage": ("zero_optimization", "stage"),
}


def read_json(path: str) -> Json:
    """Parse and check a DeepSpeed JSON file.

    Raises:
        ConfigError: the file is missing or not JSON, or has keys or values that DeepSpeed refuses
            or that have no meaning here.
    """
    try:
        content = json_file.read_json(path)
    except FileNotFoundError as error:
        raise ConfigError(f"{_where(path)} cannot be read: {error.strerror}.") from error
    except ConfigError as error:
        raise ConfigError(_where(str(error))) from error
    if not isinstance(content, dict):
        raise ConfigError(f"{_where(path)} must hold one JSON object.")
    _schema().check_file(_without_comments(content), _where(path))
    return content


def _where(path: str) -> str:
    return f"--deepspeed_config {path}"


def _without_comments(content: Json) -> Json:
    return {key: value for key, value in content.items() if not key.startswith("_")}


def _schema() -> Any:
    # Importing DeepSpeed takes seconds, and runs without a file do not need it here.
    quiet_imports()
    from megatron_eslm.config import deepspeed_schema

    return deepspeed_schema


def _get(content: Json, keys: tuple[str, ...]) -> Any:
    value: Any = content
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return None if value == "auto" else value


def values_from(content: Json) -> dict[str, Any]:
    """Values of flags that a DeepSpeed JSON sets, by field name ("auto" sets none)."""
    found = {name: _get(content, keys) for name, keys in _SAME.items()}
    if (device := _get(content, ("zero_optimization", "offload_optimizer", "device"))) is not None:
        found["cpu_offload"] = device == "cpu"
    return {name: value for name, value in found.items() if value is not None}


def accumulation_steps(content: Json) -> int | None:
    """gradient_accumulation_steps, or None if the file does not set it; there is no such flag."""
    return _get(content, ("gradient_accumulation_steps",))


def check_agreement(path: str, content: Json, name: str, flag: str, value: Any) -> None:
    """Raise ConfigError if the file and a given flag set `name` to different values."""
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
    path: str | None,
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
    """Build the engine's JSON: the user's file, with everything the flags decide filled in.

    Args:
        content: the user's file; empty without one.
        path: path of the file; None without one.
        pipeline_stages: 1 without a pipeline.

    Raises:
        ConfigError: the file's values conflict with the flags or with each other.
    """
    full = copy.deepcopy(_without_comments(content))
    steps = accumulation_steps(full)
    if steps is not None and steps != gradient_accumulation_steps:
        raise ConfigError(
            f"--deepspeed_config {path}: gradient_accumulation_steps = {steps} does not fit: "
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
    # DeepSpeed's throughput timer waits for the device twice per micro-step; ours is per step.
    full.setdefault("timers", {}).setdefault("throughput", {"enabled": False})
    zero = full.setdefault("zero_optimization", {})
    zero["stage"] = zero_stage
    # DeepSpeed's own default, 5e8 elements, is 1 GB of buffer in 16 bits.
    zero.setdefault("reduce_bucket_size", 100_000_000)
    if cpu_offload:
        zero.setdefault("offload_optimizer", {"device": "cpu"})
    full.setdefault("bf16", {})["enabled"] = bf16
    full.setdefault("fp16", {})["enabled"] = fp16
    if bf16:
        # Skip steps with non-finite gradients in every ZeRO stage.
        full["bf16"].setdefault("check_grad_overflow", True)
        # Each 16-bit gradient is added to its float32 sum and freed as soon as it is there.
        full["bf16"].setdefault("immediate_grad_update", True)
    if (bf16 or fp16) and zero_stage > 0:
        # Summing 40 micro-steps with an 8-bit mantissa loses small gradients.
        full.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    if pipeline_stages > 1:
        # By default each tensor-parallel rank sends a slice of the activations, sized in the first
        # micro-step. But the number of rows changes with alpha, and with sequence parallelism the
        # ranks' activations differ.
        full["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    if path is not None:
        if zero_stage >= 2 and full.get("gradient_predivide_factor", 1) != 1:
            raise ConfigError(
                f"{_where(path)}: gradient_predivide_factor has no meaning in ZeRO stage "
                f"{zero_stage}. Remove it, or use --zero-stage 0 or 1."
            )
        _schema().check_whole(full, _where(path))
    return full


def add_monitors(full: Json, tensorboard_dir: str | None, wandb_project: str | None) -> None:
    """Turn on the monitors that flags ask for, in the engine's JSON.

    Raises:
        ConfigError: the user's file has a section for one of them, or its package is missing.
    """
    for flag, section, key, value in (
        ("--tensorboard-dir", "tensorboard", "output_path", tensorboard_dir),
        ("--wandb-project", "wandb", "project", wandb_project),
    ):
        if value is None:
            continue
        if section in full:
            raise ConfigError(
                f"{flag} and the section {section} of --deepspeed_config are given; leave one out."
            )
        if importlib.util.find_spec(section) is None:
            raise ConfigError(
                f"{flag} needs {section}, which is not installed: pip install {section}."
            )
        full[section] = {"enabled": True, key: value}
    if tensorboard_dir is not None:
        full["tensorboard"]["job_name"] = ""  # the events are in the folder itself


@contextmanager
def blamed_on(path: str | None) -> Iterator[None]:
    """Turn DeepSpeed's exceptions while it builds the engine into errors about the user's file.

    Args:
        path: the file; None lets exceptions pass.

    Raises:
        ConfigError: instead of any exception except RuntimeError, which concerns memory, kernels or
            other ranks.
    """
    try:
        yield
    except NotImplementedError as error:
        if path is None:
            raise
        raise _refused(path, error) from error
    except (RuntimeError, ConfigError):
        raise
    except Exception as error:
        if path is None:
            raise
        raise _refused(path, error) from error


def _refused(path: str, error: Exception) -> ConfigError:
    said = " ".join(str(error).split()) or type(error).__name__
    return ConfigError(
        f"DeepSpeed does not make an engine with {_where(path)}: {said}. Remove what it names, or "
        "start from a file in ds_configs/."
    )
