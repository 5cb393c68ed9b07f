"""Header of a run's log: method, model, machine, layout, batch, data."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist

from megatron_eslm.config.run import RunConfig
from megatron_eslm.model.arithmetic import num_params
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.training.method import method_text


def header(
    run: RunConfig, shape: ModelShape, domains: Iterable[str], attention: str | None = None
) -> str:
    """Two header lines for the log.

    Args:
        run: the run.
        shape: the model's shape.
        domains: names of the data domains.
        attention: name of the attention kernel.
    """
    t, names = run.training, ", ".join(domains)
    data = f"demo corpus ({names})" if run.demo else names
    first = (
        method_text(run.selection, run.objective.distill),
        f"{num_params(shape):,} parameters ({shape.num_layers} blocks x {shape.hidden_size})",
        machine_text(run) + ("" if attention is None else f", {attention} attention"),
    )
    second = (
        layout_text(run),
        f"{t.train_iters} steps of {batch_text(run)}",
        f"data: {data}",
    )
    return "\n".join(" | ".join(parts) for parts in (first, second))


def machine_text(run: RunConfig) -> str:
    """Compute dtype, device, and communication backend."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    backend = f" over {dist.get_backend()}" if dist.is_initialized() else ""
    return f"{str(run.dtype).removeprefix('torch.')} on {device}{backend}"


def layout_text(run: RunConfig) -> str:
    """Parallel sizes, ZeRO stage and other layout options."""
    engine, interval = run.engine, run.model.activation_checkpoint_interval
    facts = [
        f"{engine.tensor_model_parallel_size} tensor x {engine.pipeline_model_parallel_size} "
        f"pipeline x {run.dp_size} data-parallel ranks",
        f"ZeRO {engine.zero_stage}",
        *(["CPU offload"] if engine.cpu_offload else []),
        *(["sequence parallel"] if engine.sequence_parallel else []),
        *([f"activation checkpoints every {interval} blocks"] if interval else []),
    ]
    return ", ".join(facts)


def batch_text(run: RunConfig) -> str:
    """What a step reads, per rank and micro-step, and trains on if known in advance."""
    text = (
        f"{run.training.global_batch_size} sequences x {run.model.seq_length} tokens = "
        f"{run.gradient_accumulation_steps} micro-steps x {run.dp_size} ranks x "
        f"{run.training.micro_batch_size}"
    )
    return f"{text}{_kept_text(run)}"


def _kept_text(run: RunConfig) -> str:
    read, kept = run.step_shape, run.step_shape_trained
    if kept == read:
        return ""
    return (
        f"; trained on {kept.sequences * run.dp_size} = {kept.micro_steps} x {run.dp_size} x "
        f"{kept.rows} ({1 - kept.sequences / read.sequences:.1%} dropped)"
    )
