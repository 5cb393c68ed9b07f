"""Flags of the training loop, the optimizer, the engine, checkpoints and reports."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_eslm.errors import ConfigError


def _at_least(options: object, minimum: float, *flags: str) -> None:
    for flag in flags:
        value = getattr(options, flag)
        if value is not None and not minimum <= value < math.inf:
            raise ConfigError(f"--{flag.replace('_', '-')} {value:g} must be {minimum:g} or more.")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Training."""

    train_iters: int | None = None
    """Optimizer steps of the whole run."""

    micro_batch_size: int | None = None
    """Sequences a rank reads a micro-step (M): what selection chooses among, together with the
    other data-parallel ranks."""

    global_batch_size: int | None = None
    """Sequences read an optimizer step over all ranks and micro-steps; default: 40 micro-steps for
    the presets, one otherwise."""

    seed: int = 1234
    """Initial weights, data order, dropout and random selection."""

    log_interval: int = 10
    """Steps between progress lines."""

    eval_interval: int | None = None
    """Steps between evaluations; default 1000, or a tenth of --train-iters if that is less. The
    last step is always evaluated."""

    eval_iters: int = 200
    """Global micro-batches an evaluation reads at most; it never reads a token twice. 0 evaluates
    nothing."""

    exit_interval: int | None = None
    """Save and stop after the step whose number is a multiple of this."""

    def __post_init__(self) -> None:
        _at_least(
            self,
            1,
            "train_iters",
            "micro_batch_size",
            "global_batch_size",
            "log_interval",
            "eval_interval",
            "exit_interval",
        )
        _at_least(self, 0, "eval_iters")


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """Optimizer: AdamW, cosine decay with linear warm-up (Table 4 of the paper)."""

    lr: float | None = None
    """Highest learning rate."""

    min_lr: float | None = None
    """Learning rate at the end of the decay; default: a tenth of --lr."""

    lr_warmup_iters: int | None = None
    """Steps of linear warm-up; default: a twentieth of --train-iters."""

    lr_decay_iters: int | None = None
    """Step at which --min-lr is reached; default: --train-iters."""

    weight_decay: float = 0.1
    """Decay of matrices; biases and norms are not decayed."""

    adam_beta1: float = 0.9
    """Decay of the first moment."""

    adam_beta2: float = 0.95
    """Decay of the second moment."""

    adam_eps: float = 1e-8
    """Added to the root of the second moment."""

    clip_grad: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""

    def __post_init__(self) -> None:
        _at_least(
            self,
            0,
            "lr",
            "min_lr",
            "lr_warmup_iters",
            "lr_decay_iters",
            "weight_decay",
            "adam_eps",
            "clip_grad",
        )
        for flag in ("adam_beta1", "adam_beta2"):
            if not 0.0 <= getattr(self, flag) < 1.0:
                raise ConfigError(
                    f"--{flag.replace('_', '-')} {getattr(self, flag):g} is outside [0, 1)."
                )


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Engine: precision, parallelism, ZeRO."""

    bf16: bool = False
    """Compute in bfloat16 with float32 master weights."""

    fp16: bool = False
    """Compute in float16 with loss scaling."""

    zero_stage: int | None = None
    """ZeRO stage 0, 1, 2 or 3; default: that of --deepspeed_config, else 0 in float32 and 1 in
    half precision (gradients then accumulate in float32)."""

    cpu_offload: bool = False
    """Keep master weights and moments in CPU memory (ZeRO 1, 2, 3)."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's columns."""

    sequence_parallel: bool = False
    """Tensor-parallel ranks also share the positions of norms, dropout and residual stream, which
    saves their activations (needs --tensor-model-parallel-size above 1)."""

    pipeline_model_parallel_size: int = 1
    """Pipeline stages."""

    pipeline_split: str | None = None
    """Blocks of each pipeline stage, as in 4,4,3,1; default: the split whose most expensive stage
    is cheapest (--dry-run prints it)."""

    deepspeed_config: str | None = None
    """DeepSpeed JSON to start from (ds_configs/ has one for each ZeRO stage). Flags fill what it
    leaves open or sets to "auto"; where both set a value they must agree."""

    distributed_timeout_minutes: float = 10.0
    """How long no rank may go on before the job ends with a message that names the one to blame;
    collectives wait twice that and a minute."""

    rendezvous_timeout_minutes: float = 5.0
    """How long a rank waits in the start for the others, before the job ends with a message that
    names the missing ones."""

    local_rank: int | None = None
    """Set by the deepspeed launcher."""

    def __post_init__(self) -> None:
        if self.bf16 and self.fp16:
            raise ConfigError("--bf16 and --fp16 exclude each other; give one of them.")
        if self.zero_stage is not None and self.zero_stage not in (0, 1, 2, 3):
            raise ConfigError(f"--zero-stage {self.zero_stage} is not one of 0, 1, 2, 3.")
        if self.distributed_timeout_minutes <= 0:
            raise ConfigError("--distributed-timeout-minutes must be positive.")
        if not 0 < self.rendezvous_timeout_minutes <= 1e6:
            raise ConfigError(
                f"--rendezvous-timeout-minutes {self.rendezvous_timeout_minutes:g} must be above 0 "
                "and at most 1e6."
            )
        _ = self.pipeline_blocks

    @property
    def collective_timeout_seconds(self) -> float:
        """Longer than the watchdog's, which can tell for whom a collective waits."""
        return 2 * 60.0 * self.distributed_timeout_minutes + 60.0

    @property
    def pipeline_blocks(self) -> tuple[int, ...] | None:
        """--pipeline-split as numbers; None where it is not given."""
        if self.pipeline_split is None:
            return None
        words = [word.strip() for word in self.pipeline_split.split(",")]
        if not all(word.isdecimal() and int(word) >= 1 for word in words):
            raise ConfigError(
                f"--pipeline-split {self.pipeline_split} must be the number of blocks of each "
                "stage, 1 or more, separated by commas, as in 4,4,3,1."
            )
        return tuple(map(int, words))


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """Checkpoints."""

    save: str | None = None
    """Folder for checkpoints; also written at the end and on SIGTERM or SIGINT."""

    load: str | None = None
    """Folder of checkpoints to continue from (its newest complete one), or one checkpoint. May
    equal --save: then an empty folder starts a new run, which suits jobs that are requeued."""

    save_interval: int = 1000
    """Steps between checkpoints."""

    keep_last: int = 2
    """Checkpoints to keep; older ones are removed once a newer one is complete. 0 keeps all."""

    allow_data_change: bool = False
    """Continue although data, mixture, seed or batch size differ from the checkpoint's: the data
    position then counts in the new order."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "save_interval")
        _at_least(self, 0, "keep_last")


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Reports."""

    metrics_file: str | None = None
    """Write a JSON object a line at every --log-interval and evaluation."""

    dump_selection: str | None = None
    """Folder for one .npz a micro-step: tokens, scores, what was kept."""

    dry_run: bool = False
    """Print steps, tokens, epochs per domain, parameters, memory, FLOPs and a pipeline's plan, and
    train nothing."""

    dry_run_world_size: int | None = None
    """Processes that --dry-run describes, instead of those that were started."""

    peak_tflops: float | None = None
    """Peak of one device in the compute type, for MFU; known for common GPUs."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "dry_run_world_size")
        if self.dry_run_world_size is not None and not self.dry_run:
            raise ConfigError(
                f"--dry-run-world-size {self.dry_run_world_size} says what --dry-run describes; "
                "give that too, or leave it out."
            )
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise ConfigError(f"--peak-tflops {self.peak_tflops:g} must be positive.")
