"""From a resolved run to a Trainer: data, model, engine, state; what can fail comes first."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

import torch

from megatron_eslm import __version__
from megatron_eslm.config.run import RunConfig
from megatron_eslm.data.demo_corpus import prepare_demo_corpus
from megatron_eslm.data.mixture import build_datasets
from megatron_eslm.data.options import DataOptions
from megatron_eslm.data.plan import (
    MixtureReport,
    check_epochs,
    check_skipped,
    plan_mixture,
)
from megatron_eslm.data.reference_losses import ReferenceLosses, open_reference_losses
from megatron_eslm.data.source import DataSource, canonical_split, open_data
from megatron_eslm.errors import ConfigError
from megatron_eslm.model.gpt import GPT, ModelSettings, build_gpt
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.objectives.causal_lm import CausalLM
from megatron_eslm.ops.head_kernel import resolve_head_kernel
from megatron_eslm.parallel.collectives import on_every_rank, on_rank_zero
from megatron_eslm.parallel.mesh import Mesh, build_mesh
from megatron_eslm.parallel.phases import Phases
from megatron_eslm.parallel.ranks import rank_zero_first
from megatron_eslm.selection.objective import Objective
from megatron_eslm.selection.policy import SelectionPolicy, build_policy
from megatron_eslm.selection.state import Peers, Recorder, SelectionState
from megatron_eslm.training.adapters import check_adapters
from megatron_eslm.training.checkpoint import load_model
from megatron_eslm.training.compile import check_compiler, compile_blocks
from megatron_eslm.training.continuation import (
    carried_on,
    check_continues,
    continues_itself,
    find_start,
    resets_optimizer,
    resume,
    starting_state,
)
from megatron_eslm.training.engine import Engine
from megatron_eslm.training.estimate import dry_run_text, step_work
from megatron_eslm.training.finding import Found
from megatron_eslm.training.flops import FlopsModel, TeacherCost
from megatron_eslm.training.frozen import FrozenSource
from megatron_eslm.training.gradient_alignment import (
    align_before_micro_steps,
    alignment_rows,
    check_alignment,
    rows_to_choose_by,
)
from megatron_eslm.training.header import header
from megatron_eslm.training.last_mlp import last_mlp_kept
from megatron_eslm.training.loop import Trainer
from megatron_eslm.training.manifest import new_run_id
from megatron_eslm.training.objectives import (
    build_objective,
    find_run_teacher,
    teacher_shape,
)
from megatron_eslm.training.optimizer_state import OptimizerState
from megatron_eslm.training.outputs import Outputs
from megatron_eslm.training.reading_plan import ReadingPlan, forget_ahead, plan_reading
from megatron_eslm.training.reference import find_run_reference, load_reference
from megatron_eslm.training.stages import plan_stages, plan_text
from megatron_eslm.training.state import TrainState
from megatron_eslm.training.teacher import find_teacher

logger = logging.getLogger(__name__)

DEMO_FOLDER = "demo/corpus"


def open_run_data(run: RunConfig) -> tuple[DataSource, DataOptions]:
    """The data of a run; without --data-path the demo corpus, made on first use."""
    options = run.data
    if run.demo:
        logger.info(
            "no --data-path: using the demo corpus in %s (this Python's own source and "
            "documentation)",
            DEMO_FOLDER,
        )
        words = rank_zero_first(lambda: prepare_demo_corpus(DEMO_FOLDER))
        options = dataclasses.replace(options, data_path=tuple(words))
    return open_data(options), options


def plan_run(
    run: RunConfig, source: DataSource, options: DataOptions, reading: ReadingPlan
) -> MixtureReport:
    """What the run reads of each domain."""
    t = run.training
    assert t.micro_batch_size and run.model.seq_length
    return plan_mixture(
        source,
        options,
        run.model.seq_length,
        train_samples=reading.end,
        valid_samples=t.eval_iters * t.micro_batch_size * run.dp_size,
        aligns=rows_to_choose_by(run),
    )


def build_flops(
    run: RunConfig,
    shape: ModelShape,
    policy: SelectionPolicy,
    teacher: ModelShape | None = None,
    reference: FrozenSource | None = None,
    *,
    device_type: str | None = None,
) -> FlopsModel:
    """The FLOPs ledgers of this run.

    Args:
        run: the run.
        shape: of the model.
        policy: that selects.
        teacher: shape of the teacher, if there is one.
        reference: the model that runs beside training to compare with, if there is one.
        device_type: what it would run on; None is this machine's.
    """
    assert run.model.seq_length
    last = run.objective.salt_iters if run.objective.distill == "salt" else run.training.train_iters
    assert last is not None
    return FlopsModel(
        shape=shape,
        seq_length=run.model.seq_length,
        selector_depth=policy.selector_depth,
        proxy=policy.instance_source == "head",
        proxy_stride=policy.proxy_stride,
        ahead=policy.selects_per_step,
        logits_recomputed=not run.keeps_logits(shape),
        blocks_recomputed=run.model.activation_checkpoint_interval > 0,
        last_mlp_kept=last_mlp_kept(run, shape, policy, device_type),
        lora_rank=run.model.lora_rank,
        alignment_rows=alignment_rows(run),
        teacher=None
        if teacher is None
        else TeacherCost(shape=teacher, runs=lambda: policy.state.iteration < last),
        reference=None if reference is None else reference.shape,
        refers=None if reference is None else lambda: policy.drops_tokens,
    )


def open_stored_losses(run: RunConfig, source: DataSource) -> ReferenceLosses | None:
    """What --reference-losses names. Collective."""
    name = run.reference.reference_losses
    if name is None:
        return None
    losses = on_every_rank(lambda: open_reference_losses(source, name))
    if losses.seq_length != run.model.seq_length:
        logger.info(
            "--reference-losses %s: scored in windows of %d tokens, training reads %d",
            name,
            losses.seq_length,
            run.model.seq_length,
        )
    return losses


def check_reading(
    run: RunConfig, options: DataOptions, reading: ReadingPlan, report: MixtureReport
) -> None:
    """ConfigError where a run reads more than there is, or than was consented to."""
    check_skipped(report, options.max_epochs, reading.skipped)
    check_epochs(report, options.max_epochs)
    check_alignment(run, report)


def data_record(
    run: RunConfig, source: DataSource, stored: ReferenceLosses | None, report: MixtureReport
) -> dict[str, Any]:
    """What decides what is read, and in which order; compared when a run continues."""
    return {
        **order_record(run, source, report),
        "eod_mask_loss": run.data.eod_mask_loss,
        "global_batch_size": run.training.global_batch_size,
        "rampup_batch_size": list(run.training.rampup_batch_size) or None,
        "micro_batch_rows": (run.training.micro_batch_size or 0) * run.dp_size,
        # None where there is none, as in checkpoints from before there could be any.
        "label_noise": run.data.label_noise or None,
        "reference_losses": stored.weights if stored is not None else None,
        # Which those are depends on how many are evaluated.
        "alignment_samples": report.alignment_samples or None,
    }


def order_record(run: RunConfig, source: DataSource, report: MixtureReport) -> dict[str, Any]:
    """What of it decides which sequence has which number."""
    epochs = [math.ceil(domain.epochs) for domain in report.domains]
    return {
        "fingerprint": source.fingerprint,
        "weights": list(source.weights),
        "split": canonical_split(run.data.split),
        "seed": run.training.seed,
        "seq_length": run.model.seq_length,
        # While nothing is read twice, the order does not depend on how much is read in all.
        "epochs": epochs if max(epochs) > 1 else None,
    }


def find_reading(
    run: RunConfig, source: DataSource, options: DataOptions
) -> tuple[Found | None, TrainState, ReadingPlan]:
    """The checkpoint that a run starts from, where it then stands, and what is left to read.

    Collective.
    """
    found = on_rank_zero(lambda: find_start(run))
    run_id = on_rank_zero(new_run_id)

    def plan() -> tuple[TrainState, ReadingPlan]:
        state = starting_state(run, found, run_id)
        recorded = carried_on(found, "skipped_samples")
        reading = plan_reading(run, state, recorded)
        if found is not None and any(end > state.consumed_samples for _, end in recorded):
            there = found.run["data"]
            here = order_record(run, source, plan_run(run, source, options, reading))
            if any(there.get(key) != value for key, value in here.items()):
                recorded = forget_ahead(recorded, state.consumed_samples)
                reading = plan_reading(run, state, recorded)
        return state, reading

    return found, *on_every_rank(plan)


def dry_run(run: RunConfig) -> tuple[str, ConfigError | None]:
    """The text of `--dry-run`, and why the run would be refused all the same (None: it would not).

    What a run would read is what one wants to know of a run that reads too much.
    """
    source, options = open_run_data(run)
    _, start, reading = find_reading(run, source, options)
    report = plan_run(run, source, options, reading)
    shape = run.shape(source.tokenizer.vocab_size)
    open_stored_losses(run, source)
    reference = on_rank_zero(lambda: find_run_reference(run, shape, source.tokenizer))
    state = SelectionState(alpha=run.selection.initial_alpha)
    policy = build_policy(run.selection, state, Peers(0, run.dp_size, None), run.training.seed)
    named = run.objective.distill_teacher is not None
    teacher = on_rank_zero(lambda: find_teacher(run, shape, source.tokenizer)) if named else None
    flops = build_flops(run, shape, policy, teacher_shape(run, shape, teacher), reference)
    text = dry_run_text(run, shape, flops, report, reading, start)
    try:
        check_reading(run, options, reading, report)
    except ConfigError as error:
        return text, error
    return text, None


def build_trainer(run: RunConfig, phases: Phases | None = None) -> Trainer:
    """Build everything. Collective; what can fail for the user's reasons fails before the model.

    Args:
        phases: where this rank says what it is doing, for a watchdog.
    """
    outputs = Outputs(run)
    try:
        return _build_trainer(run, phases or Phases(), outputs)
    except BaseException:
        outputs.close()
        raise


def _build_trainer(run: RunConfig, phases: Phases, outputs: Outputs) -> Trainer:
    on_every_rank(lambda: check_kernels(run))
    mesh = build_mesh(
        run.engine.tensor_model_parallel_size, run.engine.pipeline_model_parallel_size
    )
    source, options = open_run_data(run)
    outputs.take_folders()  # a run before this one may save until then
    found, state, reading = find_reading(run, source, options)
    report = plan_run(run, source, options, reading)
    check_reading(run, options, reading, report)
    shape = run.shape(source.tokenizer.vocab_size)
    logger.info("%s", header(run, shape, (domain.name for domain in source.domains)))
    stored = open_stored_losses(run, source)
    data = data_record(run, source, stored, report)
    check_adapters(run, found)
    if found is not None:
        check_continues(run, found, shape, data, source.tokenizer)
    reference = on_rank_zero(lambda: find_run_reference(run, shape, source.tokenizer))
    teacher = find_run_teacher(run, shape, source.tokenizer, found)

    assert run.model.seq_length
    datasets = build_datasets(
        source,
        options,
        seq_length=run.model.seq_length,
        train_samples=report.train_samples,
        valid_samples=report.valid_samples,
        seed=run.training.seed,
        aligns=rows_to_choose_by(run),
        reference=stored,
    )
    recorder = Recorder()
    peers = Peers(mesh.dp_rank, mesh.dp_size, mesh.dp_group, phases)
    policy = build_policy(run.selection, state.selection, peers, run.training.seed)
    flops = build_flops(run, shape, policy, teacher_shape(run, shape, teacher), reference)
    plan = plan_stages(run, shape, flops, step_work(run))
    if mesh.pp_size > 1:
        logger.info("%s", plan_text(plan))
    objective = build_objective(run, mesh, teacher)
    model = build_model(run, shape, mesh, policy, recorder, plan.blocks(mesh.pp_rank), objective)
    if found is not None and found.kind == "weights":
        load_model(model, mesh, found)
        logger.info("weights from %s", found.folder)
    engine = build_engine(run, model, mesh, phases)
    align_before_micro_steps(run, engine, datasets.alignment)
    if reference is not None:
        policy.reference = load_reference(
            reference, mesh, engine.device, run.dtype, run.model.head_kernel
        )
    if outputs.save is not None:
        OptimizerState(engine)  # refuses now what could not be saved later
    if found is not None and found.kind == "training":
        resume(run, engine, found)
    outputs.open_metrics(resumed=state.iteration > 0, restarts=continues_itself(run))
    return Trainer(
        run=run,
        mesh=mesh,
        engine=engine,
        datasets=datasets,
        reading=reading,
        state=state,
        recorder=recorder,
        flops=flops,
        run_record={
            "version": __version__,
            "options": run.to_dict(),
            "dtype": str(run.dtype),
            "shape": shape.to_dict(),
            "data": data,
            "domains": [{"name": d.name, "epochs": d.epochs} for d in report.domains],
            "skipped_samples": [list(part) for part in reading.skipped.ranges],
            "optimizer_resets": [
                *carried_on(found, "optimizer_resets"),
                *([state.iteration] if resets_optimizer(run, found) else []),
            ],
        },
        outputs=outputs,
        phases=phases,
    )


def check_kernels(run: RunConfig) -> None:
    """ConfigError unless this machine has what the kernels that were asked for need."""
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    kernel = resolve_head_kernel(run.model.head_kernel, device_type)
    if device_type == "cuda" and kernel == "torch" and run.model.head_kernel == "auto":
        logger.warning(
            "--head-kernel auto is torch: Triton or a C compiler for it is missing (python -m "
            "megatron_eslm.doctor)"
        )
    if run.model.compile:
        check_compiler()


def build_model(
    run: RunConfig,
    shape: ModelShape,
    mesh: Mesh,
    policy: SelectionPolicy,
    recorder: Recorder,
    blocks: range,
    objective: Objective | None = None,
) -> GPT:
    """The model of a run, or its pipeline stage, with initial weights, in float32 on the CPU."""
    settings = ModelSettings(
        hidden_dropout=run.model.hidden_dropout,
        attention_dropout=run.model.attention_dropout,
        dropout_seed=run.training.seed,
        sequence_parallel=run.engine.sequence_parallel,
        activation_checkpoint_interval=run.model.activation_checkpoint_interval,
        keep_logits=run.keeps_logits(shape),
        head_kernel=run.model.head_kernel,
        last_mlp_kept=last_mlp_kept(run, shape, policy),
        lora=run.model.lora,
    )
    model = build_gpt(
        shape,
        mesh,
        policy,
        recorder,
        objective or CausalLM(),
        settings,
        seed=run.training.seed,
        init_std=run.model.init_method_std,
        blocks=blocks,
    )
    if run.model.compile:
        compile_blocks(model)
    return model


def build_engine(run: RunConfig, model: GPT, mesh: Mesh, phases: Phases) -> Engine:
    """The engine for a whole model or for a stage of it. Collective."""
    if mesh.pp_size == 1:
        return Engine(run, model, mesh, phases)
    from megatron_eslm.training.pipeline import PipelinedEngine

    return PipelinedEngine(run, model, mesh, phases)
