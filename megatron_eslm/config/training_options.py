"""Flags of the training loop, the optimizer, the engine, checkpoints and reports."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

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
    flag_of,
)

DecayStyle = Literal["cosine", "linear", "constant", "WSD"]
DecayShape = Literal["exponential", "linear", "cosine", "minus_sqrt"]

MOST_MINUTES = 1_000_000
"""Two years, which every clock can count."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Training."""

    train_iters: Annotated[int, ONE_OR_MORE] | None = None
    """Optimizer steps of the run, including those before --load. Default with --model-size: the
    paper's 40,000 (124M) or 30,000; 200,000 for the Llama sizes."""

    train_flops: Annotated[float, POSITIVE] | None = None
    """End the run with the first step at which the FLOPs by the paper's count (flops_paper in the
    metrics, all micro-steps) reach this budget; --train-iters remains the limit. Where all steps
    cost the same, known before the run, this is short for --train-iters with that many steps, and
    warm-up and decay fit it. Otherwise (an alpha that changes, a growing batch, a teacher or a
    reference) the schedule is that of --train-iters and is cut off."""

    micro_batch_size: Annotated[int, ONE_OR_MORE] | None = None
    """Sequences per rank and micro-step (M). With --eslm-scope global, selection chooses among
    these of all ranks."""

    global_batch_size: Annotated[int, ONE_OR_MORE] | None = None
    """Sequences per optimizer step, over all ranks and micro-steps. Default: 40 micro-steps for the
    presets, one otherwise."""

    rampup_batch_size: tuple[Annotated[int, ONE_OR_MORE], ...] = ()
    """START INCREMENT SAMPLES, as in Megatron-LM: grow the batch from START sequences to
    --global-batch-size over the first SAMPLES samples. A step that begins after c samples reads
    START + floor(c n / SAMPLES) INCREMENT sequences, with n = (global batch size - START) /
    INCREMENT; from c = SAMPLES on it reads --global-batch-size. Each batch size must be a multiple
    of --micro-batch-size times the data-parallel ranks. Skipped samples count."""

    skip_samples: tuple[str, ...] = ()
    """Ranges A:B of the training order to skip: samples A to B - 1, counted from 0, as warnings
    about non-finite scores print them. Stored in checkpoints; a range that begins before the
    position of --load is refused."""

    seed: Annotated[int, Range(at_least=0, below=2**32)] = 1234
    """Seed of initial weights, data order, dropout and random selection."""

    log_interval: Annotated[int, ONE_OR_MORE] = 10
    """Steps between progress lines."""

    eval_interval: Annotated[int, ONE_OR_MORE] | None = None
    """Steps between evaluations. Default: 1000, or a tenth of --train-iters if that is less. The
    last step is always evaluated."""

    eval_iters: Annotated[int, NOT_NEGATIVE] = 200
    """Global micro-batches per evaluation at most; no token is read twice. 0 turns evaluation
    off."""

    exit_interval: Annotated[int, ONE_OR_MORE] | None = None
    """Save and stop at the next step that is a multiple of this."""

    exit_duration_minutes: Annotated[float, Range(above=0, at_most=MOST_MINUTES)] | None = None
    """Save and stop after the first step that ends more than this many minutes after the start."""

    exit_signal: str | None = None
    """Signal on which to save and stop after the current step, as on SIGTERM and SIGINT: USR1,
    USR2, HUP or XCPU. The exit code is 128 + the signal's number."""

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
        """Signals that stop the run: SIGTERM, SIGINT and --exit-signal."""
        if self.exit_signal is None:
            return ALWAYS
        name = self.exit_signal.upper().removeprefix("SIG")
        if name not in EXIT_SIGNALS:
            raise ConfigError(
                f"--exit-signal {self.exit_signal} is not one of {', '.join(EXIT_SIGNALS)}. "
                "SIGTERM and SIGINT always stop a run."
            )
        return (*ALWAYS, signal.Signals[f"SIG{name}"])


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """Optimizer: AdamW; linear warm-up and, by default, cosine decay (Table 4 of the paper)."""

    lr: Annotated[float, NOT_NEGATIVE] | None = None
    """Peak learning rate."""

    min_lr: Annotated[float, NOT_NEGATIVE] | None = None
    """Learning rate at the end of the decay. Default: a tenth of --lr."""

    lr_warmup_iters: Annotated[int, NOT_NEGATIVE] | None = None
    """Steps of linear warm-up. Default: a twentieth of --train-iters, or of --lr-decay-iters if
    that is less."""

    lr_decay_iters: Annotated[int, NOT_NEGATIVE] | None = None
    """Step at which --min-lr is reached. Default: --train-iters, or the end of a longer warm-up;
    with --model-size the paper's 200,000, except for WSD."""

    lr_decay_style: DecayStyle = "cosine"
    """How the learning rate goes from --lr to --min-lr after the warm-up: cosine, linear, constant
    (never), or WSD, warm-up, stable, decay: --lr until --lr-wsd-decay-iters before the end.
    A function of the iteration, so a run may be continued with another style or length."""

    lr_wsd_decay_iters: Annotated[int, NOT_NEGATIVE] | None = None
    """Steps of the decay of --lr-decay-style WSD. Default: a tenth of --lr-decay-iters."""

    lr_wsd_decay_style: DecayShape = "exponential"
    """Shape of the decay of --lr-decay-style WSD; as in Megatron-LM, exponential is 2^(1-x) - 1 and
    minus_sqrt 1 - sqrt(x) at the part x of the decay."""

    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.1
    """Weight decay of matrices; biases and norms are not decayed."""

    adam_beta1: Annotated[float, BELOW_ONE] = 0.9
    """Decay rate of the first moment."""

    adam_beta2: Annotated[float, BELOW_ONE] = 0.95
    """Decay rate of the second moment."""

    adam_eps: Annotated[float, POSITIVE] = 1e-8
    """Added to the square root of the second moment."""

    clip_grad: Annotated[float, NOT_NEGATIVE] = 1.0
    """Clip the gradient to this norm; 0 does not clip."""

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
    """ZeRO stage 0, 1, 2 or 3. Default: the stage in --deepspeed_config, else 0 in float32 and 1 in
    half precision (gradients then accumulate in float32)."""

    cpu_offload: bool = False
    """Keep master weights and Adam moments in CPU memory (ZeRO 1, 2, 3)."""

    tensor_model_parallel_size: Annotated[int, ONE_OR_MORE] = 1
    """Ranks across which each layer's matrices are sharded."""

    sequence_parallel: bool = False
    """Also shard positions of norms, dropout and residual stream over tensor-parallel ranks, which
    saves activation memory (needs --tensor-model-parallel-size above 1)."""

    pipeline_model_parallel_size: Annotated[int, ONE_OR_MORE] = 1
    """Pipeline stages."""

    tf32: bool = False
    """Compute float32 matrix products in TF32 on CUDA: about six times faster on an A100 or H100,
    with 10 bits of mantissa."""

    deterministic: bool = False
    """Use deterministic kernels on CUDA, so that a resumed run gives the same bits; slower. On the
    CPU runs are deterministic anyway."""

    pipeline_split: Annotated[str, Commas()] | None = None
    """Blocks per pipeline stage, as in 4,4,3,1. Default: the split that minimizes the cost of the
    most expensive stage (--dry-run prints it)."""

    deepspeed_config: str | None = None
    """DeepSpeed JSON to start from (ds_configs/ has one for each ZeRO stage). Flags fill keys that
    are missing or "auto"; where both set a value, they must agree."""

    distributed_timeout_minutes: Annotated[float, Range(above=0, at_most=MOST_MINUTES)] = 10.0
    """Abort the job if no rank makes progress for this many minutes; the message names the rank at
    fault. Collectives time out after twice this plus one minute."""

    rendezvous_timeout_minutes: Annotated[float, Range(above=0, at_most=MOST_MINUTES)] = 5.0
    """Abort the job if a rank waits longer than this for the others at startup; the message names
    the missing ranks."""

    local_rank: int | None = None
    """Set by the deepspeed launcher."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.bf16 and self.fp16:
            raise ConfigError("--bf16 and --fp16 exclude each other; give only one of them.")
        if self.zero_stage is not None and self.zero_stage not in (0, 1, 2, 3):
            raise ConfigError(f"--zero-stage {self.zero_stage} is not one of 0, 1, 2, 3.")
        _ = self.pipeline_blocks

    @property
    def collective_timeout_seconds(self) -> float:
        """Timeout of collectives: longer than the watchdog's, which can name the rank at fault."""
        return 2 * 60.0 * self.distributed_timeout_minutes + 60.0

    @property
    def pipeline_blocks(self) -> tuple[int, ...] | None:
        """--pipeline-split as numbers; None if not given."""
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
    """Folder for checkpoints. One is also saved at the end and on SIGTERM or SIGINT."""

    load: str | None = None
    """Checkpoint to continue from, or a folder of checkpoints (the newest complete one is loaded).
    May equal --save: an empty folder then starts a new run, which suits requeued jobs. The
    checkpoint also sets the flags of the model's shape."""

    save_interval: Annotated[int, ONE_OR_MORE] = 1000
    """Steps between checkpoints."""

    async_save: bool = True
    """Write checkpoints while training goes on, from a copy of weights and moments in host memory
    (--dry-run prints its size). Saves at the end of the run, and on signals, are waited for."""

    keep_last: Annotated[int, NOT_NEGATIVE] = 2
    """Number of checkpoints to keep; older ones are removed once a newer one is complete. 0 keeps
    all."""

    allow_data_change: bool = False
    """Continue although data, mixture, seed or batch size differ from the checkpoint's. Reading
    resumes after the number of samples consumed so far, whatever the batch size. If the order of
    samples changed, that number is a position in the new order."""

    reset_optimizer: bool = False
    """Load weights and position from --load, but reset Adam moments, step count and loss scale; the
    learning rate stays on its schedule. A requeued job (--load equal to --save) resets only once:
    not from a checkpoint saved by a run with this flag."""

    allow_method_change: bool = False
    """Continue although the method differs from the checkpoint's: --selection, --eslm-score,
    --eslm-level or --distill."""

    finetune: bool = False
    """Start a new run from the weights of --load, which may be a full or a weights-only checkpoint:
    step, data, schedule and optimizer start afresh. --save must be a different folder."""

    @property
    def continues_itself(self) -> bool:
        """Whether --load equals --save, as in jobs that are requeued."""
        if self.load is None or self.save is None:
            return False
        return Path(self.load).resolve() == Path(self.save).resolve()

    def __post_init__(self) -> None:
        check_fields(self)
        if self.reset_optimizer and self.load is None:
            raise ConfigError(
                "--reset-optimizer needs a checkpoint to continue from. Give --load, or leave out "
                "--reset-optimizer."
            )
        if self.finetune:
            self._check_finetune()

    def _check_finetune(self) -> None:
        if self.load is None:
            raise ConfigError(
                "--finetune starts from the weights of a checkpoint, and --load is not set. Give "
                "--load, or leave out --finetune."
            )
        if self.continues_itself:
            raise ConfigError(
                f"--finetune starts a new run from --load {self.load}, and --save {self.save} is "
                "the same folder. Save to another folder, or leave out --finetune to continue the "
                "run."
            )


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Reports."""

    metrics_file: str | None = None
    """Write one JSON object per line at every --log-interval and evaluation to this file."""

    dump_selection: str | None = None
    """Folder for one .npz per step with tokens, scores and keep decisions."""

    profile: str | None = None
    """Folder for torch.profiler traces of a few steps, one per rank, to open in Perfetto."""

    profile_step_start: Annotated[int, ONE_OR_MORE] = 10
    """First step to profile."""

    profile_step_end: Annotated[int, ONE_OR_MORE] = 12
    """Last step to profile."""

    dry_run: bool = False
    """Print steps, tokens, epochs per domain, parameters, memory, FLOPs and the pipeline plan, and
    exit without training."""

    dry_run_world_size: Annotated[int, ONE_OR_MORE] | None = None
    """Number of processes that --dry-run assumes. Default: those that were started."""

    tensorboard_dir: str | None = None
    """Folder for TensorBoard's events."""

    wandb_project: str | None = None
    """Project on Weights & Biases; needs the extra `wandb`."""

    eval_tasks: tuple[str, ...] = ()
    """Tasks of lm-eval (extra `eval`) to evaluate during training, by name (see --eval-tasks-path),
    or `paper` for those of the paper's tables. Results are in the metrics file and the monitors as
    tasks/NAME/METRIC. Nothing is downloaded."""

    eval_tasks_interval: Annotated[int, ONE_OR_MORE] = 1000
    """Steps between evaluations of --eval-tasks. The last step is always evaluated."""

    eval_tasks_limit: Annotated[int, ONE_OR_MORE] | None = None
    """Documents of each task at most, the first ones. Default: all."""

    eval_tasks_path: str | None = None
    """Folder of tasks as YAML files in lm-eval's format, beside lm-eval's own."""

    eval_tasks_data: str | None = None
    """Folder of documents of tasks, as --task-data of tools/evaluate.py."""

    peak_tflops: Annotated[float, POSITIVE] | None = None
    """Peak TFLOP/s of one device in the compute dtype, for MFU and HFU. Default: known values for
    common GPUs."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.profile_step_end < self.profile_step_start:
            raise ConfigError(
                f"--profile-step-end {self.profile_step_end} is before --profile-step-start "
                f"{self.profile_step_start}; change one of them."
            )
        for name in ("eval_tasks_limit", "eval_tasks_path", "eval_tasks_data"):
            if getattr(self, name) is not None and not self.eval_tasks:
                raise ConfigError(
                    f"{flag_of(name)} has no effect without --eval-tasks; name the tasks there, or "
                    "leave it out."
                )
        if self.dry_run_world_size is not None and not self.dry_run:
            raise ConfigError(
                f"--dry-run-world-size {self.dry_run_world_size} has no effect without --dry-run; "
                "give that too, or leave it out."
            )
