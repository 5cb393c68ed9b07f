"""Flags of the training loop, the optimizer, the engine, checkpoints and reports."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_eslm.errors import ConfigError
from megatron_eslm.launch.signals import ALWAYS, EXIT_SIGNALS
from megatron_eslm.limits import (
    BELOW_ONE,
    NOT_NEGATIVE,
    ONE_OR_MORE,
    POSITIVE,
    Commas,
    Range,
    check_fields,
)

MOST_MINUTES = 1_000_000
"""Two years, which every clock can count."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Training."""

    train_iters: Annotated[int, ONE_OR_MORE] | None = None
    """Optimizer steps of the whole run."""

    micro_batch_size: Annotated[int, ONE_OR_MORE] | None = None
    """Sequences a rank reads a micro-step (M): what selection chooses among, together with the
    other data-parallel ranks."""

    global_batch_size: Annotated[int, ONE_OR_MORE] | None = None
    """Sequences read an optimizer step over all ranks and micro-steps; default: 40 micro-steps for
    the presets, one otherwise."""

    rampup_batch_size: tuple[Annotated[int, ONE_OR_MORE], ...] = ()
    """START INCREMENT SAMPLES, as in Megatron-LM: the batch grows from START sequences to
    --global-batch-size over the first SAMPLES samples. A step that begins after c of them reads
    START + floor(c n / SAMPLES) INCREMENT sequences, n = (global batch size - START) / INCREMENT;
    from c = SAMPLES on it reads --global-batch-size. Each batch must be a multiple of
    --micro-batch-size times the data-parallel ranks. Skipped samples count."""

    skip_samples: tuple[str, ...] = ()
    """Ranges A:B of the training order that are not trained on: samples A to B - 1, counted from
    0, as warnings about scores that are not finite name them. Checkpoints carry them on; a range
    that begins before the position of --load is refused."""

    seed: Annotated[int, Range(at_least=0, below=2**32)] = 1234
    """Initial weights, data order, dropout and random selection."""

    log_interval: Annotated[int, ONE_OR_MORE] = 10
    """Steps between progress lines."""

    eval_interval: Annotated[int, ONE_OR_MORE] | None = None
    """Steps between evaluations; default 1000, or a tenth of --train-iters if that is less. The
    last step is always evaluated."""

    eval_iters: Annotated[int, NOT_NEGATIVE] = 200
    """Global micro-batches an evaluation reads at most; it never reads a token twice. 0 evaluates
    nothing."""

    exit_interval: Annotated[int, ONE_OR_MORE] | None = None
    """Save and stop after the step whose number is a multiple of this."""

    exit_duration_minutes: Annotated[float, Range(above=0, at_most=MOST_MINUTES)] | None = None
    """Save and stop after the first step that ends so long after the program began."""

    exit_signal: str | None = None
    """A signal that has the run save and stop after the step under way, as SIGTERM and SIGINT
    always do: USR1, USR2, HUP or XCPU. The exit code, 128 + its number, tells it from them."""

    def __post_init__(self) -> None:
        check_fields(self)
        if len(self.rampup_batch_size) not in (0, 3):
            given = " ".join(map(str, self.rampup_batch_size))
            raise ConfigError(
                f"--rampup-batch-size {given} must be three numbers: START "
                "INCREMENT SAMPLES, as in 16 16 100000."
            )
        _ = self.stop_signals

    @property
    def stop_signals(self) -> tuple[signal.Signals, ...]:
        """The signals that stop the run: SIGTERM, SIGINT and that of --exit-signal."""
        if self.exit_signal is None:
            return ALWAYS
        name = self.exit_signal.upper().removeprefix("SIG")
        if name not in EXIT_SIGNALS:
            raise ConfigError(
                f"--exit-signal {self.exit_signal} is not one of {', '.join(EXIT_SIGNALS)}. "
                "SIGTERM and SIGINT stop a run without it."
            )
        return (*ALWAYS, signal.Signals[f"SIG{name}"])


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """Optimizer: AdamW, cosine decay with linear warm-up (Table 4 of the paper)."""

    lr: Annotated[float, NOT_NEGATIVE] | None = None
    """Highest learning rate."""

    min_lr: Annotated[float, NOT_NEGATIVE] | None = None
    """Learning rate at the end of the decay; default: a tenth of --lr."""

    lr_warmup_iters: Annotated[int, NOT_NEGATIVE] | None = None
    """Steps of linear warm-up; default: a twentieth of --train-iters, or of --lr-decay-iters where
    that is less."""

    lr_decay_iters: Annotated[int, NOT_NEGATIVE] | None = None
    """Step at which --min-lr is reached; default: --train-iters, or the end of a longer warm-up."""

    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.1
    """Decay of matrices; biases and norms are not decayed."""

    adam_beta1: Annotated[float, BELOW_ONE] = 0.9
    """Decay of the first moment."""

    adam_beta2: Annotated[float, BELOW_ONE] = 0.95
    """Decay of the second moment."""

    adam_eps: Annotated[float, POSITIVE] = 1e-8
    """Added to the root of the second moment."""

    clip_grad: Annotated[float, NOT_NEGATIVE] = 1.0
    """Largest norm of the gradient; 0 does not clip."""

    def __post_init__(self) -> None:
        check_fields(self)


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

    tensor_model_parallel_size: Annotated[int, ONE_OR_MORE] = 1
    """Ranks that share each layer's columns."""

    sequence_parallel: bool = False
    """Tensor-parallel ranks also share the positions of norms, dropout and residual stream, which
    saves their activations (needs --tensor-model-parallel-size above 1)."""

    pipeline_model_parallel_size: Annotated[int, ONE_OR_MORE] = 1
    """Pipeline stages."""

    tf32: bool = False
    """Compute float32 matrix products in TF32 on CUDA: about six times faster on an A100 or H100,
    with 10 bits of mantissa."""

    deterministic: bool = False
    """Use deterministic kernels on CUDA, so that a resumed run gives the same bits; slower. On the
    CPU runs are deterministic anyway."""

    pipeline_split: Annotated[str, Commas()] | None = None
    """Blocks of each pipeline stage, as in 4,4,3,1; default: the split whose most expensive stage
    is cheapest (--dry-run prints it)."""

    deepspeed_config: str | None = None
    """DeepSpeed JSON to start from (ds_configs/ has one for each ZeRO stage). Flags fill what it
    leaves open or sets to "auto"; where both set a value they must agree."""

    distributed_timeout_minutes: Annotated[float, Range(above=0, at_most=MOST_MINUTES)] = 10.0
    """How long no rank may go on before the job ends with a message that names the one to blame;
    collectives wait twice that and a minute."""

    rendezvous_timeout_minutes: Annotated[float, Range(above=0, at_most=MOST_MINUTES)] = 5.0
    """How long a rank waits in the start for the others, before the job ends with a message that
    names the missing ones."""

    local_rank: int | None = None
    """Set by the deepspeed launcher."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.bf16 and self.fp16:
            raise ConfigError("--bf16 and --fp16 exclude each other; give one of them.")
        if self.zero_stage is not None and self.zero_stage not in (0, 1, 2, 3):
            raise ConfigError(f"--zero-stage {self.zero_stage} is not one of 0, 1, 2, 3.")
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
    equal --save: then an empty folder starts a new run, which suits jobs that are requeued. It
    brings the flags of the model's shape along."""

    save_interval: Annotated[int, ONE_OR_MORE] = 1000
    """Steps between checkpoints."""

    keep_last: Annotated[int, NOT_NEGATIVE] = 2
    """Checkpoints to keep; older ones are removed once a newer one is complete. 0 keeps all."""

    allow_data_change: bool = False
    """Continue although data, mixture, seed or batch size differ from the checkpoint's. Reading
    goes on behind the samples that were consumed, whatever the batch size; where the order of
    samples is another one, that number counts in the new order."""

    reset_optimizer: bool = False
    """Take weights and position from --load and begin with fresh Adam moments, step count and loss
    scale; the learning rate stays on its schedule. A requeued job (--load equal to --save) does so
    once: not from a checkpoint that a run with this flag has saved."""

    allow_method_change: bool = False
    """Continue although what is trained on, or what is minimised, differs from the checkpoint's:
    --selection, --eslm-score, --eslm-level or --distill."""

    finetune: bool = False
    """Start a new run from the weights of --load, a checkpoint of training or of weights alone:
    iteration 0, a schedule and an optimizer of its own, the first sample. --save must be another
    folder."""

    @property
    def continues_itself(self) -> bool:
        """Whether the run loads from where it saves: the habit of jobs that are requeued."""
        if self.load is None or self.save is None:
            return False
        return Path(self.load).resolve() == Path(self.save).resolve()

    def __post_init__(self) -> None:
        check_fields(self)
        if self.reset_optimizer and self.load is None:
            raise ConfigError(
                "--reset-optimizer needs a checkpoint whose weights go on: give --load, or leave "
                "it out."
            )
        if self.finetune:
            self._check_finetune()

    def _check_finetune(self) -> None:
        if self.load is None:
            raise ConfigError(
                "--finetune starts from the weights of a checkpoint and --load names none. Give "
                "--load, or leave it out."
            )
        if self.continues_itself:
            raise ConfigError(
                f"--finetune starts a new run from --load {self.load}, and --save {self.save} is "
                "where that run saves. Save to another folder; or leave out --finetune to continue "
                "the run."
            )


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Reports."""

    metrics_file: str | None = None
    """Write a JSON object a line at every --log-interval and evaluation."""

    dump_selection: str | None = None
    """Folder for one .npz a step: tokens, scores, what was kept."""

    profile: str | None = None
    """Folder for traces of a few steps by torch.profiler, one per rank, to open in Perfetto."""

    profile_step_start: Annotated[int, ONE_OR_MORE] = 10
    """First step of --profile."""

    profile_step_end: Annotated[int, ONE_OR_MORE] = 12
    """Last step of --profile."""

    dry_run: bool = False
    """Print steps, tokens, epochs per domain, parameters, memory, FLOPs and a pipeline's plan, and
    train nothing."""

    dry_run_world_size: Annotated[int, ONE_OR_MORE] | None = None
    """Processes that --dry-run describes, instead of those that were started."""

    peak_tflops: Annotated[float, POSITIVE] | None = None
    """Peak of one device in the compute type, for MFU; known for common GPUs."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.profile_step_end < self.profile_step_start:
            raise ConfigError(
                f"--profile-step-end {self.profile_step_end} is before --profile-step-start "
                f"{self.profile_step_start}; change one of them."
            )
        if self.dry_run_world_size is not None and not self.dry_run:
            raise ConfigError(
                f"--dry-run-world-size {self.dry_run_world_size} says what --dry-run describes; "
                "give that too, or leave it out."
            )
