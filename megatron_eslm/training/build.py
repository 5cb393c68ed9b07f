"""Build a Trainer from a resolved run: checks first, then data, model, engine and state."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from megatron_eslm import __version__
from megatron_eslm.checkpoint.adapters import check_adapters
from megatron_eslm.checkpoint.load import load_model
from megatron_eslm.checkpoint.optimizer_state import OptimizerState
from megatron_eslm.checkpoint.resume import (
    carried_on,
    check_continues,
    continues_itself,
    resets_optimizer,
    resume,
)
from megatron_eslm.config.run import RunConfig
from megatron_eslm.cost.last_mlp import last_mlp_kept
from megatron_eslm.cost.of_run import build_flops, step_work
from megatron_eslm.cost.stages import plan_stages, plan_text
from megatron_eslm.data.documents import DocumentRules, document_rules
from megatron_eslm.data.mixture import build_datasets
from megatron_eslm.engine.compile import compile_blocks, resolve_compile
from megatron_eslm.engine.engine import Engine, EngineSettings
from megatron_eslm.frozen.reference import find_run_reference, load_reference
from megatron_eslm.launch.bootstrap import set_timeout_of_all_groups
from megatron_eslm.model.gpt import GPT, ModelSettings, build_gpt
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.objectives.base import Objective
from megatron_eslm.objectives.causal_lm import CausalLM
from megatron_eslm.ops.attention import choose_attention
from megatron_eslm.ops.head.dispatch import resolve_head_kernel
from megatron_eslm.parallel.collectives import on_every_rank, on_rank_zero
from megatron_eslm.parallel.mesh import Mesh, build_mesh
from megatron_eslm.selection.build import build_policy
from megatron_eslm.selection.policy import SelectionPolicy
from megatron_eslm.selection.state import Peers, Recorder
from megatron_eslm.training.build_objective import (
    build_objective,
    find_run_teacher,
    teacher_shape,
)
from megatron_eslm.training.callbacks import standard_callbacks
from megatron_eslm.training.gradient_alignment import (
    align_before_micro_steps,
    rows_to_choose_by,
)
from megatron_eslm.training.header import header
from megatron_eslm.training.loop import Callback, Trainer
from megatron_eslm.training.outputs import Outputs
from megatron_eslm.training.run_data import (
    check_reading,
    data_record,
    find_reading,
    open_run_data,
    open_stored_losses,
    plan_run,
)
from megatron_eslm.watchdog.phases import Phases

logger = logging.getLogger(__name__)


def build_trainer(
    run: RunConfig, phases: Phases | None = None, callbacks: Sequence[Callback] = ()
) -> Trainer:
    """Build everything. Collective. Reports bad input before the model is built.

    Args:
        phases: reports the phases of this rank to the watchdog.
        callbacks: called before the standard callbacks (training/callbacks.py).
    """
    outputs = Outputs(run)
    try:
        return _build_trainer(run, phases or Phases(), outputs, callbacks)
    except BaseException:
        outputs.close()
        raise


def _build_trainer(
    run: RunConfig, phases: Phases, outputs: Outputs, callbacks: Sequence[Callback]
) -> Trainer:
    on_every_rank(lambda: check_kernels(run))
    timeout_seconds = run.engine.collective_timeout_seconds
    mesh = build_mesh(
        run.engine.tensor_model_parallel_size,
        run.engine.pipeline_model_parallel_size,
        timeout_seconds,
    )
    source, options = open_run_data(run)
    outputs.take_folders()  # an earlier run may still save until then
    found, state, reading = find_reading(run, source)
    report = plan_run(run, source, reading)
    check_reading(run, options, reading, report)
    shape = run.shape(source.tokenizer.vocab_size)
    attention = on_every_rank(lambda: attention_kernel(run, shape))
    names = [domain.name for domain in source.domains]
    logger.info("%s", header(run, shape, names, attention))
    stored = open_stored_losses(run, source)
    data = data_record(run, source, stored, report)
    check_adapters(run, found)
    if found is not None:
        check_continues(run, found, shape, data, source.tokenizer)
    reference = on_rank_zero(lambda: find_run_reference(run, shape, source.tokenizer))
    teacher = find_run_teacher(run, shape, source.tokenizer, found)

    datasets = build_datasets(
        source,
        options,
        seq_length=run.model.seq_length,
        train_samples=report.train_samples,
        valid_samples=report.valid_samples,
        test_samples=report.test_samples,
        seed=run.training.seed,
        aligns=rows_to_choose_by(run),
        reference=stored,
    )
    recorder = Recorder()
    peers = Peers(mesh.dp_rank, mesh.dp_size, mesh.dp_group, phases)
    policy = build_policy(run.selection, state.selection, peers, run.training.seed)
    flops = build_flops(
        run,
        shape,
        policy.state,
        teacher_shape(run, shape, teacher),
        None if reference is None else reference.shape,
    )
    plan = plan_stages(run, shape, flops, step_work(run))
    if mesh.pp_size > 1:
        logger.info("%s", plan_text(plan))
    documents = document_rules(run.data, source.tokenizer.eod)
    objective = build_objective(run, mesh, teacher, documents)
    blocks = plan.blocks(mesh.pp_rank)
    model = build_model(run, shape, mesh, policy, recorder, blocks, objective, documents)
    if found is not None and found.kind == "weights":
        load_model(model, mesh, found)
        logger.info("weights from %s", found.folder)
    engine = build_engine(run, model, mesh, phases)
    set_timeout_of_all_groups(timeout_seconds)
    align_before_micro_steps(run, engine, datasets.alignment)
    if reference is not None:
        policy.reference = load_reference(
            reference,
            mesh,
            engine.device,
            run.dtype,
            run.model.head_kernel,
            documents,
            every_stage=policy.traits.selects_sequences,
        )
    if outputs.save is not None:
        OptimizerState(engine)  # refuses now an optimizer that could not be saved later
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
        callbacks=[*callbacks, *standard_callbacks(run)],
    )


def check_kernels(run: RunConfig) -> None:
    """Raise ConfigError unless this machine meets the needs of the requested kernels."""
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    kernel = resolve_head_kernel(run.model.head_kernel, device_type)
    if device_type == "cuda" and kernel == "torch" and run.model.head_kernel == "auto":
        logger.warning(
            "--head-kernel auto uses torch: Triton or its C compiler is missing (run python -m "
            "megatron_eslm.doctor)"
        )
    _, obstacle = resolve_compile(run.model.compile, run.why_eager)
    if obstacle is not None:
        logger.warning("The blocks are not compiled, as they would be on CUDA: %s.", obstacle)


def attention_kernel(run: RunConfig, shape: ModelShape) -> str:
    """Choose the kernel of `--attention-backend`; returns its name.

    Raises:
        ConfigError: it cannot compute this model on this device.
    """
    if run.model.attention_dropout:
        return "unfused"  # model.layers draws masks of its own
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tp, length, channels = (
        run.engine.tensor_model_parallel_size,
        run.model.seq_length,
        shape.head_dim,
    )
    heads, groups = shape.num_attention_heads // tp, max(1, shape.num_key_value_heads // tp)
    mask = None
    if run.data.reset_attention_mask:
        # As model.layers does: with a mask, keys and values are repeated for their groups.
        groups = heads
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=device)
    q = torch.empty(1, heads, length, channels, dtype=run.dtype, device=device)
    k = torch.empty(1, groups, length, channels, dtype=run.dtype, device=device)
    return choose_attention(run.model.attention_backend, q, k, grouped=groups < heads, mask=mask)


def build_model(
    run: RunConfig,
    shape: ModelShape,
    mesh: Mesh,
    policy: SelectionPolicy,
    recorder: Recorder,
    blocks: range,
    objective: Objective | None = None,
    documents: DocumentRules | None = None,
) -> GPT:
    """Build a run's model or pipeline stage with initial weights, in float32 on the CPU."""
    settings = ModelSettings(
        hidden_dropout=run.model.hidden_dropout,
        attention_dropout=run.model.attention_dropout,
        dropout_seed=run.training.seed,
        sequence_parallel=run.engine.sequence_parallel,
        activation_checkpoint_interval=run.model.activation_checkpoint_interval,
        keep_logits=run.keeps_logits(shape),
        head_kernel=run.model.head_kernel,
        last_mlp_kept=last_mlp_kept(run, shape),
        documents=documents,
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
    if resolve_compile(run.model.compile, run.why_eager)[0]:
        compile_blocks(model)
    return model


def build_engine(run: RunConfig, model: GPT, mesh: Mesh, phases: Phases) -> Engine:
    """Build the engine for a full model or a pipeline stage. Collective."""
    settings = EngineSettings(
        optimizer=run.optimizer, engine=run.engine, dtype=run.dtype, deepspeed=run.deepspeed
    )
    if mesh.pp_size == 1:
        return Engine(settings, model, mesh, phases)
    from megatron_eslm.engine.pipeline import PipelinedEngine

    return PipelinedEngine(settings, model, mesh, phases)
