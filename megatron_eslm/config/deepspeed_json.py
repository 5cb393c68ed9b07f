"""The DeepSpeed JSON: what a user's file says, and the full one derived from the flags."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_eslm.errors import ConfigError
from megatron_eslm.files import json_file
from megatron_eslm.launch.bootstrap import quiet_imports

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


def read_json(path: str) -> Json:
    """Parse and check a DeepSpeed JSON file.

    Raises:
        ConfigError: it is missing, not JSON, or says what DeepSpeed would not take or what has no
            meaning here.
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
    # DeepSpeed takes seconds to import, which runs without such a file need not wait for here.
    quiet_imports()
    from megatron_eslm.config import deepspeed_schema

    return deepspeed_schema


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
    """The JSON that the engine gets: the user's, with all that the flags decide filled in.

    Args:
        content: what the user's file says; empty without one.
        path: the file.
        pipeline_stages: 1 for none.

    Raises:
        ConfigError: the whole does not go together.
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
        # A step whose gradients are not finite is skipped, in every stage.
        full["bf16"].setdefault("check_grad_overflow", True)
        # Each 16-bit gradient is added to its float32 sum and freed as soon as it is there.
        full["bf16"].setdefault("immediate_grad_update", True)
    if (bf16 or fp16) and zero_stage > 0:
        # 40 micro-steps added up in 8 bits of mantissa lose the small ones.
        full.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    if pipeline_stages > 1:
        # By default tensor-parallel ranks would each send a part of the activations, cut as in the
        # first micro-step. The number of rows changes with alpha, and with sequence parallelism
        # each rank's activations are its own.
        full["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    if path is not None:
        if zero_stage >= 2 and full.get("gradient_predivide_factor", 1) != 1:
            raise ConfigError(
                f"{_where(path)}: gradient_predivide_factor has no meaning in ZeRO stage "
                f"{zero_stage}. Remove it, or use --zero-stage 0 or 1."
            )
        _schema().check_whole(full, _where(path))
    return full


@contextmanager
def blamed_on(path: str | None) -> Iterator[None]:
    """Around the making of the engine: what DeepSpeed refuses there is owed to the user's file.

    Args:
        path: the file; without one, exceptions pass.

    Raises:
        ConfigError: instead of any exception but a RuntimeError, which is about memory, kernels or
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
        f"DeepSpeed does not make an engine with {_where(path)}: {said}. Take out what it names, "
        "or start from a file in ds_configs/."
    )
