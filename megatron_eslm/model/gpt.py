"""The GPT: embedding, blocks with an instance selector between them, and the selective head.

One class represents the full model or one pipeline stage; a stage has a subset of the same parts,
under the same names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron_eslm.data.batch import Batch, Rows
from megatron_eslm.data.documents import CAUSAL, DocumentRules, MaskAndPositions
from megatron_eslm.errors import ConfigError
from megatron_eslm.model.architectures.registry import architecture_of
from megatron_eslm.model.dropout import DropoutKey, NamedDropout
from megatron_eslm.model.early_exit import EarlyExit, ExitLayers, as_copy
from megatron_eslm.model.head import SelectiveHead
from megatron_eslm.model.init import init_parameters
from megatron_eslm.model.instance_selector import InstanceSelector, Selected
from megatron_eslm.model.layers import Block, Embedding, Layout, Output, final_norm
from megatron_eslm.model.lora import freeze_all_but_adapters
from megatron_eslm.model.model_options import Lora
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.objectives.base import Objective
from megatron_eslm.objectives.loss_tokens import LossTokens
from megatron_eslm.ops.head.contract import HeadKernel
from megatron_eslm.ops.head.statistics import VocabShard
from megatron_eslm.ops.kept_tokens_mlp import LossTokenIndex
from megatron_eslm.parallel.mesh import Mesh, build_mesh
from megatron_eslm.selection.build import build_policy
from megatron_eslm.selection.policy import SelectionPolicy
from megatron_eslm.selection.selection_options import SelectionOptions
from megatron_eslm.selection.state import Peers, Recorder, SelectionState


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Settings besides the shape."""

    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    dropout_seed: int = 0
    keep_logits: bool = True
    """Keep the head's logits for the backward pass instead of recomputing them."""
    head_kernel: HeadKernel = "auto"
    """Backend of the head's statistics and gradients."""
    sequence_parallel: bool = False
    """Shard norms and residuals over the tensor-parallel ranks by position."""
    activation_checkpoint_interval: int = 0
    """Blocks per recomputed group, of which only the first block's input is kept; 0 keeps all."""
    last_mlp_kept: bool = False
    """Run the backward pass of the last block's MLP over the tokens in the loss only."""
    documents: DocumentRules | None = None
    """Keep attention or positions inside documents."""
    lora: Lora | None = None
    """Adapters on the blocks' linear layers; if set, nothing else trains."""


class GPT(nn.Module):
    """A GPT, or the pipeline stage that holds `blocks`.

    Calling the full model with the tensors of a Batch (tokens and valid suffice) returns the result
    of SelectiveHead. Stages use `run()`: the first takes a Batch, later ones the hidden states of
    the stage before. `early_exit` runs the proxy pass that selects sequences before a step.
    Parameter names (`embedding.*`, `blocks.{i}.*`, `final_norm.*`) do not depend on policy or
    layout.
    """

    def __init__(
        self,
        shape: ModelShape,
        mesh: Mesh,
        policy: SelectionPolicy,
        recorder: Recorder,
        objective: Objective,
        settings: ModelSettings,
        blocks: range | None = None,
    ) -> None:
        super().__init__()
        self.block_range = blocks = range(shape.num_layers) if blocks is None else blocks
        _check(shape, mesh, policy, blocks, settings)
        self.shape = shape
        self.policy = policy
        self.recorder = recorder
        self.settings = settings
        layout = Layout(shape, mesh, settings.sequence_parallel, settings.lora)
        shard = VocabShard.of(
            shape.vocab_size, shape.padded_vocab_size, mesh.tp_group, settings.head_kernel
        )

        def dropout(probability: float, name: str) -> NamedDropout:
            return NamedDropout(
                probability, settings.dropout_seed, name, mesh, layout.sequence_parallel
            )

        def block(number: int) -> Block:
            return Block(
                layout,
                {
                    "weights": dropout(settings.attention_dropout, f"blocks.{number}.weights"),
                    "attention": dropout(settings.hidden_dropout, f"blocks.{number}.attention"),
                    "mlp": dropout(settings.hidden_dropout, f"blocks.{number}.mlp"),
                },
            )

        def embedding(*, positions: bool) -> Embedding:
            return Embedding(
                layout, dropout(settings.hidden_dropout, "embedding"), positions=positions
            )

        if self.is_first or (self.is_last and shape.tied_head):
            self.embedding = embedding(positions=self.is_first)
        own_blocks = {number: block(number) for number in blocks}
        self.blocks = nn.ModuleDict({str(number): own for number, own in own_blocks.items()})
        if self.is_last:
            if not shape.tied_head:
                self.output = Output(layout)
            self.final_norm = final_norm(shape)
            self.head = SelectiveHead(
                policy,
                recorder,
                objective,
                layout,
                self.output_layer,
                self.final_norm,
                shard,
                settings.keep_logits,
            )
        exit_layers, self.copies = None, nn.ModuleList()
        if policy.traits.sequence_source == "head":
            # All stages score, so that none waits for the first. They use their own layers, or
            # copies of another stage's layers.
            depth = policy.traits.early_exit_blocks
            exit_embedding = self.embedding if self.is_first else embedding(positions=True)
            output: Embedding | Output = exit_embedding
            if not shape.tied_head:
                output = self.output if self.is_last else Output(layout)
            exit_layers = ExitLayers(
                embedding=exit_embedding,
                blocks=[own_blocks[i] if self.is_first else block(i) for i in range(depth)],
                final_norm=self.final_norm if self.is_last else final_norm(shape),
                output=output,
            )
            if not self.is_first:
                self.copies += [exit_layers.embedding, *exit_layers.blocks]
            if not self.is_last:
                self.copies += [exit_layers.final_norm]
                if not shape.tied_head:
                    self.copies += [output]
            as_copy(self.copies)
        self.early_exit = EarlyExit(policy, layout, exit_layers, shard, settings.documents)
        if self.is_first:
            self.selector = InstanceSelector(policy, recorder, self.early_exit)
        if settings.lora is not None:
            freeze_all_but_adapters(self)

    @property
    def is_first(self) -> bool:
        """Whether this is the first stage or the full model."""
        return self.block_range.start == 0

    @property
    def output_layer(self) -> Embedding | Output:
        """The layer whose weight is the head, on the last stage."""
        return self.embedding if self.shape.tied_head else self.output

    @property
    def is_last(self) -> bool:
        """Whether this is the last stage or the full model."""
        return self.block_range.stop == self.shape.num_layers

    def forward(self, *tensors: torch.Tensor, candidates: Rows | None = None) -> torch.Tensor:
        batch = Batch.of(*tensors)
        if candidates is not None:
            # Call through the module itself, so that ZeRO 3 gathers the weights.
            return self.early_exit.candidate_scores(batch, candidates)
        return self.loss(self.run(batch), batch)

    def run(self, inputs: Batch | torch.Tensor, batch: Batch | None = None) -> Selected:
        """Run this stage's layers, except the head, on one micro-batch.

        Args:
            inputs: the batch on the first stage, hidden states [L, M, D] on the others.
            batch: the rows of hidden states, which only document rules need.
        """
        tokens = None
        if self.training:
            self.policy.state.micro_step = self.recorder.begin()
            if self.is_last and self.settings.last_mlp_kept:
                # The head fills in the tokens later.
                tokens = self.head.tokens = LossTokenIndex()
        if isinstance(inputs, torch.Tensor):
            num_rows = inputs.shape[1]
            rows = torch.arange(num_rows, device=inputs.device)
            places = self._places(range(num_rows), num_rows)
            documents = CAUSAL if batch is None else self._documents(batch)
            hidden = self._blocks(inputs, self.block_range, places, tokens, documents)
            return Selected(hidden, rows)
        depth, num_rows = self.policy.traits.early_exit_blocks, len(inputs.tokens_MU)
        places = self._places(range(num_rows), num_rows)
        documents = self._documents(inputs)
        hidden_LMD = self.embedding(inputs.tokens_MU, places, documents)
        hidden_LMD = self._blocks(hidden_LMD, self.block_range[:depth], places, None, documents)
        hidden_LKD, kept_K = self.selector(hidden_LMD, inputs)
        if len(kept_K) < num_rows:
            places, documents = self._places(kept_K, num_rows), documents.rows(kept_K)
        hidden_LKD = self._blocks(hidden_LKD, self.block_range[depth:], places, tokens, documents)
        return Selected(hidden_LKD, kept_K)

    def _documents(self, batch: Batch) -> MaskAndPositions:
        rules = self.settings.documents
        return CAUSAL if rules is None else rules.of(batch.tokens_MU)

    def loss(self, selected: Selected, batch: Batch) -> torch.Tensor:
        """Run the head, on the last stage."""
        return self.head(selected, batch)

    def _blocks(
        self,
        hidden: torch.Tensor,
        numbers: Sequence[int],
        places: DropoutKey | None,
        tokens: LossTokenIndex | None,
        documents: MaskAndPositions,
    ) -> torch.Tensor:
        interval = self.settings.activation_checkpoint_interval
        if not interval or not self.training:
            return self._run_blocks(hidden, numbers, places, tokens, documents)
        for first in range(0, len(numbers), interval):
            # Dropout masks are seeded by name, so no RNG state has to be kept.
            hidden = checkpoint(
                self._run_blocks,
                hidden,
                numbers[first : first + interval],
                places,
                tokens,
                documents,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        return hidden

    def _run_blocks(
        self,
        hidden: torch.Tensor,
        numbers: Sequence[int],
        places: DropoutKey | None,
        tokens: LossTokenIndex | None,
        documents: MaskAndPositions,
    ) -> torch.Tensor:
        for number in numbers:
            last = number == self.shape.num_layers - 1
            hidden = self.blocks[str(number)](hidden, places, tokens if last else None, documents)
        return hidden

    def _places(self, rows_K: torch.Tensor | range, num_rows: int) -> DropoutKey | None:
        """Key of dropout masks: this rank's rows as rows of the global micro-batch."""
        if not self._drops:
            return None
        first, state = self.policy.peers.rank * num_rows, self.policy.state
        rows = rows_K.tolist() if isinstance(rows_K, torch.Tensor) else rows_K
        return DropoutKey(state.iteration, state.micro_step, tuple(first + row for row in rows))

    @property
    def _drops(self) -> bool:
        settings = self.settings
        return self.training and bool(settings.hidden_dropout or settings.attention_dropout)


def _check(
    shape: ModelShape, mesh: Mesh, policy: SelectionPolicy, blocks: range, settings: ModelSettings
) -> None:
    tp = mesh.tp_size
    architecture_of(shape).check(shape)
    for flag, value in (
        ("--num-attention-heads", shape.num_attention_heads),
        ("--num-query-groups", shape.num_key_value_heads),
        ("--ffn-hidden-size", shape.ffn_hidden_size),
    ):
        if value % tp:
            raise ConfigError(
                f"{flag} {value} is not a multiple of --tensor-model-parallel-size {tp}."
            )
    if policy.traits.sequence_source == "head" and blocks.start == 0:
        depth = policy.traits.early_exit_blocks
        if depth >= shape.num_layers:
            raise ConfigError(
                f"--eslm-proxy-layers {depth} must be smaller than --num-layers "
                f"{shape.num_layers}: the early exit would be the whole model."
            )
        if depth > len(blocks):
            raise ConfigError(
                f"--eslm-proxy-layers {depth} must not exceed the {len(blocks)} blocks of the "
                "first pipeline stage, where the early exit is. Lower it, or give the first stage "
                "more blocks with --pipeline-split."
            )


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
    blocks: range | None = None,
) -> GPT:
    """Build a GPT or one stage of it, in float32 on the CPU, with initial weights."""
    model = GPT(shape, mesh, policy, recorder, objective, settings, blocks)
    init_parameters(model, shape, mesh, seed=seed, std=init_std)
    return model


@torch.no_grad()
def load_weights(model: GPT, weights: dict[str, torch.Tensor]) -> None:
    """Copy full parameters by name into a model with TP = 1, cast to its dtype.

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


class _NoObjective(Objective):
    def token_losses(self, tokens: LossTokens) -> torch.Tensor:
        raise AssertionError("a model without an objective was asked for its loss")


def bare_gpt(shape: ModelShape, mesh: Mesh, documents: DocumentRules | None = None) -> GPT:
    """Build a full GPT for inference: evaluation mode, no weights loaded, no policy, no loss.

    Args:
        shape: the model's shape.
        mesh: only its tensor-parallel group is used.
        documents: keep attention or positions inside documents.
    """
    alone = dataclasses.replace(mesh, pp_size=1, pp_rank=0)
    options = SelectionOptions(selection="clm")
    policy = build_policy(options, SelectionState(alpha=0.0), Peers(0, 1, None), seed=0)
    settings = ModelSettings(documents=documents)
    return GPT(shape, alone, policy, Recorder(), _NoObjective(), settings).eval()


@torch.no_grad()
def reference_logits(
    weights: dict[str, torch.Tensor], shape: ModelShape, tokens: torch.Tensor
) -> torch.Tensor:
    """Compute our model's logits in one process, in float32.

    Needs a process group of one rank (`launch.bootstrap.single_process`).

    Args:
        weights: parameters of GPT by name.
        shape: the model's shape.
        tokens: int64 [B, T].

    Returns:
        float32 [B, T, vocab_size], without padding columns.
    """
    model = bare_gpt(shape, build_mesh())
    load_weights(model, weights)
    # The embedding takes T+1 tokens and ignores the last, so any id serves there.
    padded = torch.cat([tokens, tokens[:, :1]], dim=1)
    hidden_TBD, *_ = model.run(Batch.of(padded, torch.ones_like(tokens, dtype=torch.bool)))
    logits = model.final_norm(hidden_TBD) @ model.output_layer.weight[: shape.vocab_size].t()
    return logits.transpose(0, 1)
