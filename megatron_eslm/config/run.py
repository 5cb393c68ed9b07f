"""All options of a run: parsing and resolving."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_eslm.config import deepspeed_json
from megatron_eslm.config.fill_training import fill_optimizer, fill_training
from megatron_eslm.config.filler import SHAPE, Filler, with_shape
from megatron_eslm.config.flags import flag_of, parse_groups
from megatron_eslm.config.layouts import layout_table, why_eager
from megatron_eslm.config.resolved import (
    ResolvedEngine,
    ResolvedModel,
    ResolvedOptimizer,
    ResolvedTraining,
    resolved,
)
from megatron_eslm.config.rules import (
    check_documents,
    check_engine_options,
    check_lora,
    check_model_options,
    check_reference,
    check_sets_apart,
    check_split,
    layout_request,
)
from megatron_eslm.config.scope import fill_scope, warn_of_ramp
from megatron_eslm.config.training_options import (
    CheckpointOptions,
    EngineOptions,
    OptimizerOptions,
    ReportOptions,
    TrainingOptions,
)
from megatron_eslm.data.batch_schedule import BatchSchedule
from megatron_eslm.data.data_options import DataOptions
from megatron_eslm.data.label_noise import check_label_noise
from megatron_eslm.model.architectures.registry import ARCHITECTURES
from megatron_eslm.model.model_options import ModelOptions
from megatron_eslm.model.presets import PRESETS, Preset
from megatron_eslm.model.shape import ModelShape, pad_vocab_size
from megatron_eslm.objectives.objective_options import ObjectiveOptions, check_objective
from megatron_eslm.ops.keep_rule import StepShape
from megatron_eslm.parallel.mesh import check_layout
from megatron_eslm.selection.build import policy_traits
from megatron_eslm.selection.reference_options import ReferenceOptions
from megatron_eslm.selection.selection_options import Scope, SelectionOptions

GROUPS: dict[str, type] = {
    "model": ModelOptions,
    "selection": SelectionOptions,
    "objective": ObjectiveOptions,
    "reference": ReferenceOptions,
    "data": DataOptions,
    "training": TrainingOptions,
    "optimizer": OptimizerOptions,
    "engine": EngineOptions,
    "checkpoint": CheckpointOptions,
    "report": ReportOptions,
}

PAGES = {
    "--help-layouts": (
        "Show which parallel sizes, ZeRO stages and offloads combine, and exit.",
        layout_table,
    )
}

AUTO_KEEP_LOGITS_BYTES = 2 * 2**30
"""Largest logits of a micro-batch that `--head-logits auto` keeps."""

DEMO_ROWS = 20
DEMO_PRESET = Preset(
    num_layers=4,
    hidden_size=192,
    num_attention_heads=6,
    seq_length=128,
    micro_batch_size=DEMO_ROWS,
    gradient_accumulation_steps=1,
    lr=2e-3,
    min_lr=2e-4,
    lr_warmup_iters=None,
    lr_decay_iters=None,
    train_iters=300,
    eslm_adapt_interval=None,
)
"""Preset used without --data-path: a model that two CPU cores train in minutes."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The fully resolved options of a run. Immutable after resolve()."""

    model: ResolvedModel
    selection: SelectionOptions
    objective: ObjectiveOptions
    reference: ReferenceOptions
    data: DataOptions
    training: ResolvedTraining
    optimizer: ResolvedOptimizer
    engine: ResolvedEngine
    checkpoint: CheckpointOptions
    report: ReportOptions
    demo: bool
    """Whether the demo corpus is the data."""
    dp_size: int
    gradient_accumulation_steps: int
    """Micro-steps per step that reads --global-batch-size; fewer while the batch ramps up."""
    deepspeed: dict[str, Any]
    """The JSON passed to deepspeed.initialize."""

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype."""
        if self.engine.bf16:
            return torch.bfloat16
        return torch.float16 if self.engine.fp16 else torch.float32

    @property
    def batch_schedule(self) -> BatchSchedule:
        """Number of sequences that each step reads."""
        return BatchSchedule(self.training.global_batch_size, self.training.rampup_batch_size)

    @property
    def step_shape(self) -> StepShape:
        """Micro-batches per rank in a step that reads --global-batch-size."""
        return StepShape(self.gradient_accumulation_steps, self.training.micro_batch_size)

    @property
    def step_shape_trained(self) -> StepShape:
        """The part of `step_shape` trained on at the run's alpha.

        In-model selection drops rows of it later.
        """
        if not policy_traits(self.selection).selects_per_step:
            return self.step_shape
        return self.step_shape.kept(self.selection.initial_alpha)

    @property
    def why_eager(self) -> str | None:
        """Why the blocks of this run cannot be compiled; None if they can."""
        steps = self.gradient_accumulation_steps
        found = why_eager(layout_request(self.model, self.selection, self.engine, steps))
        return None if found is None else found[0]

    def keeps_logits(self, shape: ModelShape) -> bool:
        """Whether the head keeps its logits for the backward pass (`--head-logits`, resolved)."""
        tokens = self.training.micro_batch_size * self.model.seq_length
        width = shape.padded_vocab_size // self.engine.tensor_model_parallel_size
        fits = tokens * width * self.dtype.itemsize <= AUTO_KEEP_LOGITS_BYTES
        return self.model.head_logits == "keep" or (self.model.head_logits == "auto" and fits)

    def shape(self, vocab_size: int) -> ModelShape:
        """The model's shape, given the tokenizer's vocabulary size."""
        m = self.model
        multiple = m.make_vocab_size_divisible_by * self.engine.tensor_model_parallel_size
        return ModelShape(
            architecture=m.architecture,
            num_layers=m.num_layers,
            hidden_size=m.hidden_size,
            num_attention_heads=m.num_attention_heads,
            num_query_groups=m.num_query_groups,
            ffn_hidden_size=m.ffn_hidden_size,
            max_position_embeddings=m.seq_length,
            vocab_size=vocab_size,
            padded_vocab_size=pad_vocab_size(vocab_size, multiple),
            layernorm_epsilon=m.layernorm_epsilon,
            tied_head=not m.untie_embeddings_and_output_weights,
            rotary_base=m.rotary_base,
            rotary_scaling=m.rotary_scaling,
            rotary_scaling_factor=m.rotary_scaling_factor,
            rotary_original_positions=m.rotary_original_positions,
        )

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values, for run.json and the metrics file."""
        return dataclasses.asdict(self)


def parse_flags(argv: Sequence[str]) -> dict[str, Any]:
    """Parse the command line into arguments of `resolve`, all but `world_size` and `stored`.

    Raises:
        ConfigError: a flag or value cannot be used.
    """
    return parse_groups(GROUPS, argv, "Pretrain a GPT with selection in the training step.", PAGES)


def parse_run(argv: Sequence[str], world_size: int) -> RunConfig:
    """Parse and resolve the command line without reading data or checkpoints.

    Raises:
        ConfigError: a flag, value or combination cannot be used.
    """
    return resolve(world_size=world_size, **parse_flags(argv))


def resolve(
    *,
    model: ModelOptions,
    selection: SelectionOptions,
    objective: ObjectiveOptions,
    reference: ReferenceOptions,
    data: DataOptions,
    training: TrainingOptions,
    optimizer: OptimizerOptions,
    engine: EngineOptions,
    checkpoint: CheckpointOptions,
    report: ReportOptions,
    given: frozenset[str],
    world_size: int,
    stored: ModelShape | None = None,
    stored_scope: Scope | None = None,
) -> RunConfig:
    """Fill in missing options and check all rules across components.

    Args:
        model, selection, objective, reference, data, training, optimizer, engine, checkpoint,
            report: as parsed.
        given: names of the flags that were set.
        world_size: number of processes; --dry-run-world-size overrides it.
        stored: model shape in the checkpoint to load, if any.
        stored_scope: --eslm-scope of the run to continue, if any.

    Raises:
        MissingFlags: required flags are not set and follow from nothing else.
        ConfigError: a value or combination cannot be used.
    """
    world_size = report.dry_run_world_size or world_size
    if stored is not None:
        model, of_stored = with_shape(model, stored, given)
        given |= of_stored
    json: dict[str, Any] = {}
    if engine.deepspeed_config:
        json = deepspeed_json.read_json(engine.deepspeed_config)
        for name in (*deepspeed_json._SAME, "cpu_offload"):
            if name in given:
                owner = next(o for o in (training, optimizer, engine) if hasattr(o, name))
                deepspeed_json.check_agreement(
                    engine.deepspeed_config, json, name, flag_of(name), getattr(owner, name)
                )
    demo = not data.given
    preset = PRESETS[model.model_size] if model.model_size else DEMO_PRESET if demo else None
    fill = Filler(given, json, preset)

    bf16, fp16 = fill(engine, "bf16"), fill(engine, "fp16")
    engine = resolved(
        ResolvedEngine,
        engine,
        bf16=bf16,
        fp16=fp16,
        cpu_offload=fill(engine, "cpu_offload"),
        zero_stage=fill(engine, "zero_stage", 1 if bf16 or fp16 else 0),
    )
    dp_size = check_layout(
        world_size, engine.tensor_model_parallel_size, engine.pipeline_model_parallel_size
    )
    check_engine_options(engine)

    if preset is None:
        needed = {model: SHAPE, training: ("micro_batch_size", "train_iters"), optimizer: ("lr",)}
        fill.require((options, name) for options, names in needed.items() for name in names)
    architecture = fill(model, "architecture", "gpt2")
    default_ffn = ARCHITECTURES[architecture].default_ffn
    hidden_size, heads = fill(model, "hidden_size"), fill(model, "num_attention_heads")
    model = resolved(
        ResolvedModel,
        model,
        architecture=architecture,
        num_layers=fill(model, "num_layers"),
        hidden_size=hidden_size,
        num_attention_heads=heads,
        num_query_groups=fill(model, "num_query_groups", heads),
        ffn_hidden_size=fill(model, "ffn_hidden_size", default_ffn(hidden_size)),
        untie_embeddings_and_output_weights=fill(model, "untie_embeddings_and_output_weights"),
        rotary_base=fill(model, "rotary_base", 10000.0),
        rotary_scaling=fill(model, "rotary_scaling", "none"),
        rotary_scaling_factor=fill(model, "rotary_scaling_factor", 1.0),
        seq_length=fill(model, "seq_length"),
    )
    selection = dataclasses.replace(
        selection, eslm_adapt_interval=fill(selection, "eslm_adapt_interval")
    )
    check_model_options(model, selection)
    check_reference(selection, reference, data)
    check_documents(data, engine)
    check_sets_apart(data, training.eval_iters, selection)
    check_lora(model, selection, checkpoint)
    check_objective(objective, selection.selection, loads=checkpoint.load is not None, given=given)
    check_label_noise(data.label_noise, model.seq_length)
    if preset is DEMO_PRESET:
        # A pipeline needs micro-steps, to fill it and to drop some of them.
        steps = 10 if engine.pipeline_model_parallel_size > 1 else 1
        preset = dataclasses.replace(
            preset,
            micro_batch_size=max(1, DEMO_ROWS // (steps * dp_size)),
            gradient_accumulation_steps=steps * dp_size,
        )
        fill = Filler(given, json, preset)
    training = fill_training(
        training, fill, preset, dp_size, deepspeed_json.accumulation_steps(json)
    )
    optimizer = fill_optimizer(optimizer, fill, training)

    steps = training.global_batch_size // (training.micro_batch_size * dp_size)
    check_split(layout_request(model, selection, engine, steps))
    selection = fill_scope(
        selection,
        dp_size=dp_size,
        pp_size=engine.pipeline_model_parallel_size,
        micro_batch_size=training.micro_batch_size,
        micro_steps=steps,
        stored=stored_scope,
    )
    warn_of_ramp(
        selection,
        BatchSchedule(training.global_batch_size, training.rampup_batch_size),
        training.micro_batch_size,
        dp_size,
    )
    full_json = deepspeed_json.complete(
        json,
        path=engine.deepspeed_config,
        micro_batch_size=training.micro_batch_size,
        global_batch_size=training.global_batch_size,
        gradient_accumulation_steps=steps,
        clip_grad=optimizer.clip_grad,
        bf16=engine.bf16,
        fp16=engine.fp16,
        zero_stage=engine.zero_stage,
        cpu_offload=engine.cpu_offload,
        pipeline_stages=engine.pipeline_model_parallel_size,
    )
    deepspeed_json.add_monitors(full_json, report.tensorboard_dir, report.wandb_project)
    run = RunConfig(
        model=model,
        selection=selection,
        objective=objective,
        reference=reference,
        data=data,
        training=training,
        optimizer=optimizer,
        engine=engine,
        checkpoint=checkpoint,
        report=report,
        demo=demo,
        dp_size=dp_size,
        gradient_accumulation_steps=steps,
        deepspeed=full_json,
    )
    ARCHITECTURES[model.architecture].check(run.shape(vocab_size=1))
    return run
