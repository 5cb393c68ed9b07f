"""Flags of the model; unset flags of its shape come from `--model-size`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_eslm.errors import ConfigError
from megatron_eslm.limits import (
    BELOW_ONE,
    NOT_NEGATIVE,
    ONE_OR_MORE,
    POSITIVE,
    Range,
    check_fields,
)
from megatron_eslm.model.architectures.names import ArchitectureName
from megatron_eslm.model.presets import ModelSize
from megatron_eslm.model.shape import RotaryScalingName
from megatron_eslm.ops.attention import AttentionBackend


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters beside the linear layers of the blocks (model/lora.py)."""

    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        """Factor applied to an adapter's output."""
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Model."""

    model_size: ModelSize | None = None
    """Size with its recipe: sets shape, batch, learning rate and schedule unless their own flags
    are given. 124M to 1.5B are the paper's GPT-2 models; llama-1B to llama-8B have the shapes of
    Llama 3."""

    architecture: ArchitectureName | None = None
    """Block of the model. gpt2: layer norm, learned positions, GELU, biases. llama: RMSNorm, rotary
    positions, SwiGLU, grouped-query attention, no biases. Default: gpt2."""

    num_layers: Annotated[int, ONE_OR_MORE] | None = None
    """Transformer blocks."""

    hidden_size: Annotated[int, ONE_OR_MORE] | None = None
    """Hidden size: the width of the residual stream."""

    num_attention_heads: Annotated[int, ONE_OR_MORE] | None = None
    """Attention heads; must divide the hidden size."""

    num_query_groups: Annotated[int, ONE_OR_MORE] | None = None
    """Key-value heads, each shared by a group of query heads (llama). Default: one per query
    head."""

    ffn_hidden_size: Annotated[int, ONE_OR_MORE] | None = None
    """Width inside the MLP. Default: 4 x hidden size in gpt2; 8/3 x, rounded up to a multiple of
    256, in llama."""

    untie_embeddings_and_output_weights: bool = False
    """Give the head a weight of its own instead of the word embedding (llama)."""

    rotary_base: Annotated[float, Range(above=1)] | None = None
    """Base of the rotary frequencies (llama). Default: 10000."""

    rotary_scaling: RotaryScalingName | None = None
    """Scaling of the rotary frequencies, to fine-tune on longer sequences (llama). Default:
    none."""

    rotary_scaling_factor: Annotated[float, Range(at_least=1)] | None = None
    """Factor of --rotary-scaling."""

    rotary_original_positions: Annotated[int, ONE_OR_MORE] | None = None
    """Sequence length of the model before --rotary-scaling llama3."""

    seq_length: Annotated[int, Range(at_least=2)] | None = None
    """Tokens per sequence; also the number of positions of the model."""

    make_vocab_size_divisible_by: Annotated[int, ONE_OR_MORE] = 128
    """Pad the vocabulary to a multiple of this times the tensor-parallel size."""

    hidden_dropout: Annotated[float, BELOW_ONE] = 0.0
    """Dropout on embeddings and on each branch's output before the residual addition."""

    attention_dropout: Annotated[float, BELOW_ONE] = 0.0
    """Dropout on attention weights."""

    init_method_std: Annotated[float, POSITIVE] = 0.02
    """Standard deviation of the initial weights; projections into the residual stream are scaled
    down by sqrt(2 x layers)."""

    layernorm_epsilon: Annotated[float, POSITIVE] = 1e-5
    """Added to the variance in layer norms, and to the mean square in RMSNorm."""

    head_logits: Literal["auto", "keep", "recompute"] = "auto"
    """Keep the head's logits in the compute dtype for the backward pass, or recompute those of kept
    tokens. auto keeps them if they fit into 2 GiB."""

    last_mlp_backward: Literal["auto", "kept", "all"] = "auto"
    """Run the backward pass of the last block's MLP over the tokens in the loss only (kept) or over
    all. auto uses kept where tokens are dropped and it saves time."""

    compile: bool | None = None
    """Compile the blocks with torch.compile, which takes minutes at the start. Needs a C++
    compiler; on CUDA, Triton and a C compiler. Default: on CUDA if these are there and the run
    allows it (--help-layouts), and not on the CPU."""

    attention_backend: AttentionBackend = "auto"
    """Kernel of torch's attention. auto takes the fastest that works; flash and cudnn need bf16 or
    fp16 on CUDA, efficient needs CUDA. Has no effect with --attention-dropout."""

    head_kernel: Literal["auto", "torch", "triton", "triton-fused"] = "auto"
    """Implementation of the head's statistics and gradients: PyTorch, or Triton kernels, which need
    CUDA and a C compiler. triton-fused does not write logits that only statistics need; where
    logits are kept it equals triton. auto is triton where it can run, else torch."""

    activation_checkpoint_interval: Annotated[int, NOT_NEGATIVE] = 0
    """Keep activations only at every n-th block and recompute the rest in the backward pass. 0
    keeps all."""

    lora_rank: Annotated[int, NOT_NEGATIVE] = 0
    """Freeze the weights of --load and train only low-rank adapters (LoRA) of this rank on the four
    linear layers of each block. Export merges them. 0 trains all weights."""

    lora_alpha: Annotated[float, POSITIVE] | None = None
    """Scale of the adapters: their output is multiplied by this over their rank. Default: twice the
    rank."""

    @property
    def lora(self) -> Lora | None:
        """--lora-rank and --lora-alpha, resolved; None if all weights train."""
        if not self.lora_rank:
            return None
        alpha = 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha
        return Lora(self.lora_rank, alpha)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.lora_alpha is not None and not self.lora_rank:
            raise ConfigError(
                f"--lora-alpha {self.lora_alpha:g} scales adapters, and without --lora-rank there "
                "are none. Give --lora-rank, or leave out --lora-alpha."
            )
