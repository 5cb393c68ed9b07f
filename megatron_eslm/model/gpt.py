"""The GPT as a list of layers, and that list as one module."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from megatron_eslm.errors import ConfigError
from megatron_eslm.model.head import Objective, SelectiveHead
from megatron_eslm.model.init import init_parameters
from megatron_eslm.model.instance_selector import InstanceSelector
from megatron_eslm.model.layers import Block, Carry, Embedding, layer_norm
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.ops.head_statistics import VocabShard
from megatron_eslm.parallel.mesh import Mesh, build_mesh
from megatron_eslm.selection.options import SelectionOptions
from megatron_eslm.selection.policy import SelectionPolicy, build_policy
from megatron_eslm.selection.state import Peers, Recorder, SelectionState


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What besides the shape decides how the model runs."""

    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    keep_logits: bool = True
    """Keep the head's logits for the backward pass instead of computing them again."""


class GPT(nn.Module):
    """Embedding, blocks with an InstanceSelector among them, and the selective head.

    Called with tokens int64 [M, T+1] and valid bool [M, T] (whether label t counts) it returns what
    SelectiveHead returns. Parameter names (`embedding.*`, `blocks.{i}.*`, `final_norm.*`) do not
    depend on policy or layout.
    """

    def __init__(
        self,
        shape: ModelShape,
        mesh: Mesh,
        policy: SelectionPolicy,
        recorder: Recorder,
        objective: Objective,
        settings: ModelSettings,
    ) -> None:
        super().__init__()
        if shape.num_attention_heads % mesh.tp_size:
            raise ConfigError(
                f"--num-attention-heads {shape.num_attention_heads} does not divide by "
                f"--tensor-model-parallel-size {mesh.tp_size}."
            )
        if policy.selector_depth >= shape.num_layers and policy.instance_source == "head":
            raise ConfigError(
                f"--eslm-proxy-layers {policy.selector_depth} must be smaller than --num-layers "
                f"{shape.num_layers}: the early exit would be the whole model."
            )
        self.shape = shape
        shard = VocabShard.of(shape.vocab_size, shape.padded_vocab_size, mesh.tp_group)
        self.embedding = Embedding(shape, mesh, settings.hidden_dropout)
        self.blocks = nn.ModuleList(
            Block(
                shape,
                mesh,
                hidden_dropout=settings.hidden_dropout,
                attention_dropout=settings.attention_dropout,
            )
            for _ in range(shape.num_layers)
        )
        self.final_norm = layer_norm(shape)
        self.selector = InstanceSelector(policy, recorder, self.embedding, self.final_norm, shard)
        self.head = SelectiveHead(
            policy,
            recorder,
            objective,
            self.embedding,
            self.final_norm,
            shard,
            settings.keep_logits,
        )
        self._depth = policy.selector_depth

    def layers(self) -> list[nn.Module]:
        """The layers in order, the head apart: what a pipeline deals out over its stages."""
        blocks: list[nn.Module] = list(self.blocks)
        return [self.embedding, *blocks[: self._depth], self.selector, *blocks[self._depth :]]

    def forward(self, tokens_MS: torch.Tensor, valid_MT: torch.Tensor) -> torch.Tensor:
        carry: Carry = (tokens_MS, valid_MT)
        for layer in self.layers():
            carry = layer(carry)
        return self.head(carry, tokens_MS[:, 1:], valid_MT)


def build_gpt(
    shape: ModelShape,
    mesh: Mesh,
    policy: SelectionPolicy,
    recorder: Recorder,
    objective: Objective,
    settings: ModelSettings,
    *,
    seed: int,
    init_std: float = 0.02,
) -> GPT:
    """A GPT in float32 on the CPU with its initial weights."""
    model = GPT(shape, mesh, policy, recorder, objective, settings)
    init_parameters(model, shape, mesh, seed=seed, std=init_std)
    return model


@torch.no_grad()
def load_weights(model: GPT, weights: dict[str, torch.Tensor]) -> None:
    """Copy full parameters by name into a model with TP = 1, cast to its type.

    Raises:
        ConfigError: a name is missing or left over, or a shape differs.
    """
    parameters = dict(model.named_parameters())
    for what, names in (
        ("lack", sorted(parameters.keys() - weights.keys())),
        ("hold unknown", sorted(weights.keys() - parameters.keys())),
    ):
        if names:
            raise ConfigError(f"The weights {what} {', '.join(names[:3])} ({len(names)} in all).")
    for name, parameter in parameters.items():
        if parameter.shape != weights[name].shape:
            raise ConfigError(
                f"{name} is {list(weights[name].shape)} in the weights and "
                f"{list(parameter.shape)} in the model; their shapes differ."
            )
        parameter.copy_(weights[name])


def _no_objective(loss_S: torch.Tensor, num_kept: int, dp_size: int) -> torch.Tensor:
    raise AssertionError("a model without an objective was asked for its loss")


@torch.no_grad()
def reference_logits(
    weights: dict[str, torch.Tensor], shape: ModelShape, tokens: torch.Tensor
) -> torch.Tensor:
    """Logits of our model in one process, in float32.

    Needs a process group of one (`parallel.bootstrap.single_process`).

    Args:
        weights: parameters of GPT by name.
        shape: its shape.
        tokens: int64 [B, T].

    Returns:
        float32 [B, T, vocab_size], padding columns cut off.
    """
    mesh = build_mesh()
    options = SelectionOptions(selection="clm")
    policy = build_policy(options, SelectionState(alpha=0.0), Peers(0, 1, None), seed=0)
    model = GPT(shape, mesh, policy, Recorder(), _no_objective, ModelSettings()).eval()
    load_weights(model, weights)
    # The embedding takes T+1 tokens and drops the last; any id does there.
    padded = torch.cat([tokens, tokens[:, :1]], dim=1)
    carry: Carry = (padded, torch.ones_like(tokens, dtype=torch.bool))
    for layer in model.layers():
        carry = layer(carry)
    hidden_TBD = model.final_norm(carry[0])
    logits = hidden_TBD @ model.embedding.word.weight[: shape.vocab_size].t()
    return logits.transpose(0, 1)
