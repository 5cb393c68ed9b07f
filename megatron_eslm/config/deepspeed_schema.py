"""Schema of a DeepSpeed JSON: DeepSpeed's own models of its sections, and keys refused here.

Imports DeepSpeed: call `launch.bootstrap.quiet_imports` first.
"""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pydantic
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import Field, StrictBool

from megatron_eslm.errors import ConfigError, did_you_mean
from megatron_eslm.files.schema import STRICT, Size

_GONE = "is no longer in DeepSpeed"
_LOADER = "has no effect: DeepSpeed does not load the data"
_CHECKPOINT = "has no effect: checkpoints are not DeepSpeed's"
_COMPETES = "would compete with --lr, --adam-beta1, --lr-warmup-iters and the like"
_EXPERTS = "is for models with experts"
_TYPES = "follows from --bf16 and --fp16"
_QUANTIZED = "is not supported: gradients and weights are communicated unquantized"
_OFFLOAD = 'has a new form: "offload_optimizer": {"device": "cpu"}'
_NVME = 'keeps state that checkpoints cannot save; use {"device": "cpu"}'

NOT_HERE = {
    "optimizer": _COMPETES,
    "scheduler": _COMPETES,
    "pipeline": "would compete with --pipeline-model-parallel-size, --pipeline-split and "
    "--activation-checkpoint-interval",
    "tensor_parallel": "would compete with --tensor-model-parallel-size",
    "activation_checkpointing": "has no effect; use --activation-checkpoint-interval",
    "compile": "has no effect; use --compile",
    "torch_autocast": "would compete with --bf16 and --fp16",
    "bfloat16": 'has a new name: "bf16"',
    "sequence_parallel_size": "is not supported; --sequence-parallel is Megatron's kind",
    "data_parallel_size": "follows from the number of processes",
    "seq_parallel_communication_data_type": "has no effect",
    "data_efficiency": _LOADER,
    "curriculum_learning": _LOADER,
    "dataloader_drop_last": _LOADER,
    "checkpoint": _CHECKPOINT,
    "datastates_ckpt": _CHECKPOINT,
    "nebula": _GONE,
    "amp": _GONE,
    "compression_training": _GONE,
    "quantize_training": _GONE,
    "sparse_gradients": _GONE,
    "sparse_attention": _GONE,
    "eigenvalue": _GONE,
    "elasticity": _GONE,
    "graph_harvesting": _GONE,
    "progressive_layer_drop": _GONE,
    "autotuning": "has no effect; tools/plan_run.py compares layouts",
    "hybrid_engine": "is for generation during training",
    "weight_quantization": "is for inference",
    "expert_parallel": _EXPERTS,
    "use_data_before_expert_parallelism": _EXPERTS,
    "aio": "is for offload to NVMe, which is not supported",
    "vocabulary_size": "has no effect",
    "disable_allgather": "has no effect",
    "managed_gradient_accumulation": "would conflict with the training loop, which ends steps",
    "gradient_allreduce_op": "would change the loss, which is a mean over all ranks",
    "data_types.param_dtype": _TYPES,
    "data_types.buffer_dtype": _TYPES,
    "data_types.keep_in_fp32_modules": _TYPES,
    "zero_optimization.mics_shard_size": _GONE,
    "zero_optimization.mics_hierarchical_params_gather": _GONE,
    "zero_optimization.zeropp_loco_param": _GONE,
    "zero_optimization.legacy_stage1": _GONE,
    "zero_optimization.cpu_offload": _OFFLOAD,
    "zero_optimization.cpu_offload_param": 'has a new form: "offload_param": {"device": "cpu"}',
    "zero_optimization.cpu_offload_use_pin_memory": 'has a new place: "pin_memory" beside "device"',
    "zero_optimization.offload_optimizer.device": _NVME,
    "zero_optimization.offload_optimizer.ratio": _NVME,
    "zero_optimization.offload_optimizer.super_offload": "is not supported",
    "zero_optimization.offload_param.device": _NVME,
    "zero_optimization.zenflow": "is not supported",
    "zero_optimization.compute_grad_norm": "is needed: every step reports the gradient's norm",
    "zero_optimization.zero_quantized_weights": _QUANTIZED,
    "zero_optimization.zero_quantized_nontrainable_weights": _QUANTIZED,
    "zero_optimization.zero_quantized_gradients": _QUANTIZED,
    "zero_optimization.elastic_checkpoint": _CHECKPOINT,
    "zero_optimization.load_from_fp32_weights": _CHECKPOINT,
    "zero_optimization.pipeline_loading_checkpoint": _CHECKPOINT,
    "zero_optimization.gather_16bit_weights_on_model_save": _CHECKPOINT,
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _CHECKPOINT,
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": _CHECKPOINT,
    "zero_optimization.save_muon_momentum_buffer_in_memory": "is for another optimizer",
}
"""Keys that DeepSpeed knows, or once knew, and that a run here must not set -> the reason."""

_ASKS_NOTHING: dict[str, tuple[Any, ...]] = {
    "gradient_allreduce_op": ("mean",),
    "zero_optimization.offload_optimizer.device": ("cpu", "none", "auto", None),
    "zero_optimization.offload_optimizer.ratio": (1, 1.0),
    "zero_optimization.offload_param.device": ("cpu", "none", "auto", None),
    "zero_optimization.compute_grad_norm": (True,),
    "zero_optimization.load_from_fp32_weights": (True,),
}
"""Harmless values of refused keys, which pass. For other keys in a section: false and null."""

_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
"""Packages that monitors need."""


class _BF16(DeepSpeedBF16Config):
    enabled: StrictBool = False


class _FP16(DeepSpeedFP16Config):
    enabled: StrictBool = False
    initial_scale_power: int = Field(16, ge=0, le=64)


class _Zero(DeepSpeedZeroConfig):
    stage: Literal[0, 1, 2, 3] = 0


class _Part(pydantic.BaseModel):
    model_config = STRICT


class _FlopsProfiler(_Part):
    enabled: bool = False
    profile_step: Size = 1
    module_depth: int = -1
    top_modules: Size = 1
    detailed: bool = True
    output_file: str | None = None
    recompute_fwd_factor: float = 0.0


class _DataTypes(_Part):
    grad_accum_dtype: Literal["fp32", "fp16", "bf16"] | None = None


class _Timers(_Part):
    throughput: DeepSpeedThroughputTimerConfig | None = None


class _File(_Part):
    """The full file. Sections without a model in DeepSpeed are spelled out."""

    train_batch_size: Size | None = None
    train_micro_batch_size_per_gpu: Size | None = None
    gradient_accumulation_steps: Size | None = None
    gradient_clipping: Annotated[float, Field(ge=0)] | None = None
    bf16: _BF16 | None = None
    fp16: _FP16 | None = None
    zero_optimization: _Zero | None = None
    data_types: _DataTypes | None = None
    communication_data_type: Literal["fp32", "fp16", "bf16"] | None = None
    prescale_gradients: bool = False
    gradient_predivide_factor: Annotated[float, Field(gt=0)] = 1.0
    gradient_allreduce_op: Literal["mean"] = "mean"
    zero_allow_untested_optimizer: bool = False
    zero_force_ds_cpu_optimizer: bool = True
    tensorboard: TensorBoardConfig | None = None
    csv_monitor: CSVConfig | None = None
    wandb: WandbConfig | None = None
    comet: CometConfig | None = None
    flops_profiler: _FlopsProfiler | None = None
    comms_logger: CommsLoggerConfig | None = None
    timers: _Timers | None = None
    steps_per_print: Size | None = None
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False
    disable_python_gc: bool = False
    log_level: Literal["debug", "info", "warning", "error", "critical"] | None = None


_FROM_FLAGS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)
"""Top-level keys that may be "auto"; within sections, DeepSpeed itself drops "auto" values."""


def check_file(content: dict[str, Any], where: str) -> None:
    """Check a user's file before anything is built.

    Args:
        content: the JSON object without its comments.
        where: flag and file, for messages.

    Raises:
        ConfigError: a key is unknown or has no meaning here, or a value is invalid.
    """
    for key, value in _keys(content):
        nothing = _ASKS_NOTHING.get(key, (None, False) if "." in key else ())
        if key in NOT_HERE and not any(v == value and type(v) is type(value) for v in nothing):
            raise ConfigError(f"{where}: {key} {NOT_HERE[key]}. Remove it.")
    said = {
        key: value for key, value in content.items() if not (value == "auto" and key in _FROM_FLAGS)
    }
    try:
        file = _File.model_validate(said)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{where}: {_reasons(error)}") from error
    except (TypeError, ValueError, AssertionError) as error:  # raised by DeepSpeed's own checks
        raise ConfigError(f"{where}: {error}.") from error
    for name, package in _PACKAGES.items():
        monitor = getattr(file, name)
        if monitor is not None and monitor.enabled and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"{where}: {name} is enabled, but the package {package} is not installed. Install "
                "it, or set enabled to false."
            )


def check_whole(full: dict[str, Any], where: str) -> None:
    """Let DeepSpeed parse the engine's full JSON, as for a single process.

    Raises:
        ConfigError: its sections conflict.
    """

    class OneRank:
        def get_data_parallel_world_size(self) -> int:
            return 1

    one = copy.deepcopy(full)
    one["train_batch_size"] = (
        full["train_micro_batch_size_per_gpu"] * full["gradient_accumulation_steps"]
    )
    try:
        DeepSpeedConfig(one, mpu=OneRank())
    except Exception as error:  # exceptions of any type, all about the file
        said = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{where} is refused by DeepSpeed: {said}") from error


def _keys(content: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        yield f"{before}{key}", value
        if isinstance(value, dict) and before.count(".") < 2:
            yield from _keys(value, f"{before}{key}.")


def _reasons(error: pydantic.ValidationError, most: int = 3) -> str:
    found = error.errors(include_url=False, include_context=False)
    for one in found:
        if one["type"] == "extra_forbidden":
            *section, key = map(str, one["loc"])
            hint = did_you_mean(key, _known(section))
            return f"there is no key {'.'.join([*section, key])}.{hint}"
    texts = []
    for one in found[:most]:
        key = ".".join(map(str, one["loc"]))
        if one["type"] == "model_type":
            texts.append(f'{key} must be an object, as in "{key}": {{...}}')
            continue
        what = one["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        value = json.dumps(one["input"])
        shown = value if len(value) <= 40 else f"{value[:37]}..."
        texts.append(f"{key} {shown}: {what[:1].lower()}{what[1:]}")
    return "; ".join(texts) + "."


def _known(section: list[str]) -> list[str]:
    """Known keys of a section."""
    model: Any = _File
    for part in section:
        fields = {f.alias or name: f for name, f in model.model_fields.items()}
        models = (fields[part].annotation, *getattr(fields[part].annotation, "__args__", ()))
        model = next(m for m in models if hasattr(m, "model_fields"))
    return [f.alias or name for name, f in model.model_fields.items()]
