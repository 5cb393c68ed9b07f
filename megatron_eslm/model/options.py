"""The model's shape as flags; unset ones come from `--model-size`."""

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


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters beside the linear layers of the blocks (model/lora.py)."""

    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        """What the product of an adapter is multiplied by."""
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Model."""

    model_size: Literal["124M", "350M", "774M", "1.5B"] | None = None
    """GPT-2 size with the paper's recipe: sets shape, batch, learning rate and schedule where no
    flag of their own does."""

    num_layers: Annotated[int, ONE_OR_MORE] | None = None
    """Transformer blocks."""

    hidden_size: Annotated[int, ONE_OR_MORE] | None = None
    """Width of the residual stream."""

    num_attention_heads: Annotated[int, ONE_OR_MORE] | None = None
    """Attention heads; must divide the hidden size."""

    ffn_hidden_size: Annotated[int, ONE_OR_MORE] | None = None
    """Width inside the MLP; default 4 x hidden size."""

    seq_length: Annotated[int, Range(at_least=2)] | None = None
    """Tokens a sequence; also the number of learned positions."""

    make_vocab_size_divisible_by: Annotated[int, ONE_OR_MORE] = 128
    """The vocabulary is padded to a multiple of this times the tensor-parallel size."""

    hidden_dropout: Annotated[float, BELOW_ONE] = 0.0
    """Dropout on embeddings and on what each block adds to the residual stream."""

    attention_dropout: Annotated[float, BELOW_ONE] = 0.0
    """Dropout on attention weights."""

    init_method_std: Annotated[float, POSITIVE] = 0.02
    """Standard deviation of the initial weights; projections into the residual stream are scaled
    down by sqrt(2 x layers)."""

    layernorm_epsilon: Annotated[float, POSITIVE] = 1e-5
    """Added to the variance in layer norms."""

    head_logits: Literal["auto", "keep", "recompute"] = "auto"
    """Keep the head's logits in the compute type for the backward pass, or compute those of kept
    tokens again; auto keeps them while they fit into 2 GiB."""

    last_mlp_backward: Literal["auto", "kept", "all"] = "auto"
    """Run the backward pass of the last block's MLP over the tokens in the loss only, or over all;
    auto does the former where tokens are dropped and it pays."""

    compile: bool = False
    """Compile the blocks with torch.compile, which takes minutes at the start. Needs a C++
    compiler, on CUDA Triton and a C compiler."""

    head_kernel: Literal["auto", "torch", "triton", "triton-fused"] = "auto"
    """What computes the head's statistics and gradients: PyTorch, or Triton kernels, which need
    CUDA and a C compiler; triton-fused never writes the logits that only statistics need (where
    logits are kept it is triton). auto is triton where it can run and torch elsewhere."""

    activation_checkpoint_interval: Annotated[int, NOT_NEGATIVE] = 0
    """Blocks whose activations are kept only at the first of them, and computed again in the
    backward pass; 0 keeps all."""

    lora_rank: Annotated[int, NOT_NEGATIVE] = 0
    """Train low-rank adapters (LoRA) of this rank on the four linear layers of each block, and
    nothing else, of a model whose weights --load names; export merges them. 0 trains all
    weights."""

    lora_alpha: Annotated[float, POSITIVE] | None = None
    """Adapters are multiplied by this over their rank; default: twice the rank."""

    @property
    def lora(self) -> Lora | None:
        """--lora-rank and --lora-alpha, resolved; None where all weights train."""
        if not self.lora_rank:
            return None
        alpha = 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha
        return Lora(self.lora_rank, alpha)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.lora_alpha is not None and not self.lora_rank:
            raise ConfigError(
                f"--lora-alpha {self.lora_alpha:g} scales adapters and there are none without "
                "--lora-rank; give that, or leave it out."
            )
