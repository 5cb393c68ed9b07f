"""Rules across the options of several components; each names the flag and the remedy."""

from __future__ import annotations

import logging

import torch

from megatron_eslm.config.layouts import (
    LayoutRequest,
    check_layout_rules,
    early_exit_layers,
    layout_warnings,
)
from megatron_eslm.config.resolved import ResolvedEngine, ResolvedModel
from megatron_eslm.config.training_options import CheckpointOptions, EngineOptions
from megatron_eslm.data.data_options import DataOptions
from megatron_eslm.errors import ConfigError
from megatron_eslm.model.architectures.registry import ARCHITECTURES
from megatron_eslm.model.model_options import ModelOptions
from megatron_eslm.selection.build import policy_traits
from megatron_eslm.selection.reference_options import ReferenceOptions
from megatron_eslm.selection.selection_options import SelectionOptions

logger = logging.getLogger(__name__)


def check_engine_options(engine: EngineOptions) -> None:
    """Check that the device computes in the precision asked for.

    Raises:
        ConfigError: the combination cannot be used.
    """
    if engine.bf16 and engine.fp16:
        raise ConfigError("bf16 and fp16 are both enabled, by flags and DeepSpeed JSON together.")
    cuda = torch.cuda.is_available()
    if engine.bf16 and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(
            f"--bf16 needs a GPU of compute capability 8.0 or newer (A100, H100) and this one is "
            f"{torch.cuda.get_device_name()}. Use --fp16, or neither."
        )
    if engine.fp16 and not cuda:
        from deepspeed.accelerator import get_accelerator

        if not get_accelerator().is_fp16_supported():
            raise ConfigError("--fp16 is not supported by this processor; use --bf16 or neither.")


def check_model_options(model: ResolvedModel, selection: SelectionOptions) -> None:
    """Check the model's sizes against each other and against the early exit's.

    Raises:
        ConfigError: the combination cannot be used.
    """
    if model.hidden_size % model.num_attention_heads:
        raise ConfigError(
            f"--hidden-size {model.hidden_size} is not a multiple of --num-attention-heads "
            f"{model.num_attention_heads}; change one of them."
        )
    blocks = ARCHITECTURES[model.architecture]
    if policy_traits(selection).needs_gradients and blocks.norm != "layer":
        raise ConfigError(
            f"--selection greats knows the gradient products of GPT-2's layers only, but "
            f"--architecture is {model.architecture}. Use another --selection."
        )
    depth = early_exit_layers(selection)
    if depth >= model.num_layers:
        raise ConfigError(
            f"--eslm-proxy-layers {depth} must be smaller than --num-layers {model.num_layers}: "
            "the early exit would be the whole model."
        )
    if depth and selection.eslm_proxy_stride > model.seq_length:
        raise ConfigError(
            f"--eslm-proxy-stride {selection.eslm_proxy_stride} is longer than --seq-length "
            f"{model.seq_length}; it would score one position per sequence. Lower it."
        )


def check_documents(data: DataOptions, engine: EngineOptions) -> None:
    """Check that every pipeline stage reads the tokens that mark documents.

    Raises:
        ConfigError: the combination cannot be used.
    """
    stages = engine.pipeline_model_parallel_size
    if stages > 2 and (data.reset_attention_mask or data.reset_position_ids):
        flag = "attention-mask" if data.reset_attention_mask else "position-ids"
        raise ConfigError(
            f"--reset-{flag} with --pipeline-model-parallel-size {stages}: only the first and the "
            "last stage read tokens, which mark the documents. Use at most 2 stages."
        )


def check_sets_apart(data: DataOptions, eval_iters: int, selection: SelectionOptions) -> None:
    """Check that data given for evaluation are evaluated.

    Raises:
        ConfigError: --eval-iters is 0.
    """
    unread = {"--test-data-path": data.test_data_path}
    if not policy_traits(selection).needs_gradients:  # else validation sequences guide it
        unread = {"--valid-data-path": data.valid_data_path, **unread}
    for flag, words in unread.items():
        if words and eval_iters == 0:
            raise ConfigError(
                f"{flag} is not read with --eval-iters 0. Leave it out, or raise --eval-iters."
            )


def check_lora(
    model: ModelOptions, selection: SelectionOptions, checkpoint: CheckpointOptions
) -> None:
    """Check what --lora-rank needs and what it excludes.

    Raises:
        ConfigError: the combination cannot be used.
    """
    if model.lora is None:
        return
    if checkpoint.load is None:
        raise ConfigError(
            f"--lora-rank {model.lora_rank} trains adapters on top of existing weights, but --load "
            "is not set. Give --load (tools/convert_from_hf.py converts a Hugging Face model), or "
            "leave out --lora-rank."
        )
    if policy_traits(selection).needs_gradients:
        raise ConfigError(
            f"--selection greats computes inner products of the gradients of all weights, but "
            f"--lora-rank {model.lora_rank} freezes them. Use another --selection, or leave out "
            "--lora-rank."
        )


def check_reference(
    selection: SelectionOptions, reference: ReferenceOptions, data: DataOptions
) -> None:
    """Check that a reference model is given where it is read, in a form that can be used.

    Raises:
        ConfigError: the combination cannot be used.
    """
    traits = policy_traits(selection)
    needed, method = traits.needs_reference, f"--selection {selection.selection}"
    if "eslm_score" in traits.reads:
        method = f"--eslm-score {selection.eslm_score}"
    if needed and not reference.given:
        raise ConfigError(
            f"{method} needs the losses of a reference model. Score the text once with "
            "tools/score_reference.py and give its --name as --reference-losses, or give "
            "--reference a folder of checkpoints."
        )
    if reference.given and not needed:
        flag = "--reference" if reference.reference is not None else "--reference-losses"
        raise ConfigError(
            f"{flag} has no meaning with --selection {selection.selection}, which uses no "
            f"reference model. Leave out {flag}, or use --selection rho1 or --eslm-score excess."
        )
    if reference.reference_losses is not None and data.label_noise:
        raise ConfigError(
            f"--label-noise {data.label_noise:g} with --reference-losses "
            f"{reference.reference_losses}: the stored losses are those of the original targets, "
            "not of the permuted ones. Use --reference, which scores the targets used in training."
        )


def check_split(asked: LayoutRequest) -> None:
    """Check how the model is divided among ranks; warn of what a layout costs.

    Raises:
        ConfigError: the combination cannot be used.
    """
    check_layout_rules(asked)
    for warning in layout_warnings(asked):
        logger.warning("%s", warning)


def layout_request(
    model: ResolvedModel, selection: SelectionOptions, engine: ResolvedEngine, micro_steps: int
) -> LayoutRequest:
    """What the options ask of the layout; `micro_steps` per optimizer step."""
    return LayoutRequest(
        tp=engine.tensor_model_parallel_size,
        pp=engine.pipeline_model_parallel_size,
        zero_stage=engine.zero_stage,
        cpu_offload=engine.cpu_offload,
        bf16=engine.bf16,
        fp16=engine.fp16,
        sequence_parallel=engine.sequence_parallel,
        split=engine.pipeline_blocks,
        micro_steps=micro_steps,
        early_exit=early_exit_layers(selection),
        num_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        ffn_hidden_size=model.ffn_hidden_size,
        seq_length=model.seq_length,
        needs_gradients=policy_traits(selection).needs_gradients,
        compiles=bool(model.compile),
        drops_out=model.hidden_dropout > 0 or model.attention_dropout > 0,
        trains_adapters=model.lora is not None,
        last_mlp_kept=model.last_mlp_backward == "kept",
    )
