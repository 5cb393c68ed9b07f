"""GREATS' selection pass: inner products of gradients, before each micro-step.

Runs one forward and backward pass of the full model over the rank's micro-batch and a micro-batch
of validation sequences, with frozen weights. Gradients flow to activations only, so `.grad` and the
engine's hooks are unaffected. Each layer's products are computed when its output gradient arrives
(ops.ghost_products); its input is then freed. Dropout is off, so the choice is a function of
weights and sequences.

Covers all parameters: weights and biases of linear layers, norms, positions, and the word embedding
with its gradients as lookup and as head.

Shape legend: R rows, the first M candidates and the others validation; T positions; D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import nn

from megatron_eslm.config.run import RunConfig
from megatron_eslm.cost.of_run import alignment_rows
from megatron_eslm.data.batch import Batch
from megatron_eslm.data.data_options import DEFAULT_SPLIT
from megatron_eslm.data.mixture import Mixture
from megatron_eslm.data.plan import MixtureReport
from megatron_eslm.engine.engine import Engine
from megatron_eslm.errors import ConfigError
from megatron_eslm.model.gpt import GPT
from megatron_eslm.model.layers import Embedding
from megatron_eslm.model.lora import is_adapter
from megatron_eslm.ops.ghost_products import (
    GradientProducts,
    head_gradients,
    linear_products,
    tied_embedding_products,
    vector_products,
)
from megatron_eslm.parallel.seeding import generator
from megatron_eslm.selection.policies.greats import Greats


def rows_to_choose_by(run: RunConfig) -> int:
    """Validation sequences needed for selection and kept out of evaluation; 0 if none."""
    rows = alignment_rows(run)
    return 0 if rows is None else rows[1]


def check_alignment(run: RunConfig, report: MixtureReport) -> None:
    """Refuse a greats run with too few candidates or too few validation sequences.

    Args:
        run: the run.
        report: what the run reads.

    Raises:
        ConfigError: micro-batches have one row, or evaluation leaves too few sequences of the
            validation split (it leaves at least half of it).
    """
    rows = alignment_rows(run)
    if rows is None:
        return
    if rows[0] == 1:
        raise ConfigError(
            "--selection greats selects among the sequences of each rank's micro-batch, but "
            "--micro-batch-size is 1, which leaves no choice. Raise it."
        )
    if report.alignment_samples < rows[1]:
        raise ConfigError(
            f"--selection greats needs {rows[1]} validation sequences (--greats-valid-share "
            f"{run.selection.greats_valid_share:g} of --micro-batch-size {rows[0]}) that are not "
            f"used in evaluation, but evaluation takes {report.valid_samples} of the validation "
            f"split and leaves {report.alignment_samples}. "
            + (
                "Add data to --valid-data-path"
                if run.data.train_data_path
                else f"Raise the split's share in --split {run.data.split or DEFAULT_SPLIT}"
            )
            + f", or lower --eval-iters {run.training.eval_iters}."
        )


def align_before_micro_steps(
    run: RunConfig, engine: Engine, validation: Mixture | None
) -> GradientAlignment | None:
    """If the policy is greats, run its selection pass before each of the engine's micro-steps.

    Args:
        run: the run.
        engine: engine with the model.
        validation: sequences for the validation gradient; disjoint from those evaluated.
    """
    policy, rows = engine.model.policy, alignment_rows(run)
    if not isinstance(policy, Greats):
        return None
    assert validation is not None and rows is not None
    alignment = GradientAlignment(
        engine.model,
        policy,
        validation,
        rows[1],
        lambda: engine.ds.optimizer.param_groups[0]["lr"],
    )

    def choose(batch: Batch) -> None:
        with engine.phases("gradient alignment"):
            alignment(batch)

    engine.before_micro_step = choose
    return alignment


class GradientAlignment:
    """Computes gradient products of a batch and lets the policy select rows.

    Args:
        model: the full model on this rank.
        policy: the model's policy; receives the products.
        validation: dataset from which validation rows are drawn.
        num_validation: validation rows per micro-step.
        learning_rate: returns the current learning rate.
    """

    def __init__(
        self,
        model: GPT,
        policy: Greats,
        validation: Mixture,
        num_validation: int,
        learning_rate: Callable[[], float],
    ) -> None:
        check_covered(model)
        self.model = model
        self.policy = policy
        self.validation = validation
        self.num_validation = num_validation
        self.learning_rate = learning_rate

    def __call__(self, batch: Batch) -> None:
        if not self.policy.drops_rows(len(batch.tokens_MU)):
            return
        rows = self.validation_rows(len(self.model.recorder.records))
        items = [self.validation[i] for i in rows]
        device = batch.tokens_MU.device
        validation = Batch.of(
            torch.stack([item["tokens"] for item in items]).to(device),
            torch.stack([item["valid"] for item in items]).to(device),
        )
        products = gradient_products(self.model, batch, validation)
        self.policy.choose(products, self.learning_rate(), batch)

    def validation_rows(self, micro_step: int) -> list[int]:
        """Draw the validation sequences of a micro-step of this rank."""
        rng = generator(
            self.policy.seed,
            "greats",
            self.policy.state.iteration,
            micro_step,
            self.policy.peers.rank,
        )
        return torch.randperm(len(self.validation), generator=rng)[: self.num_validation].tolist()


def check_covered(model: GPT) -> None:
    """Raise ConfigError if a parameter belongs to a layer without known products."""
    known = (ColumnParallelLinear, RowParallelLinear, nn.LayerNorm, Embedding)
    names = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, known)
        for name, _ in module.named_parameters()
        if not is_adapter(f"{path}.{name}")
    }
    unknown = sorted({name for name, _ in model.named_parameters()} - names)
    if unknown:
        raise ConfigError(
            f"--selection greats knows no gradient products of {', '.join(unknown[:3])} "
            f"({len(unknown)} in all). Use another --selection with this model."
        )


def gradient_products(model: GPT, candidates: Batch, validation: Batch) -> GradientProducts:
    """Compute inner products of the gradients of each candidate's mean token loss.

    Args:
        model: the full model; its `.grad` and all other state are unchanged.
        candidates: M rows, with the labels to train on.
        validation: other rows; G is the gradient of the mean loss of all their tokens.

    Returns:
        Products over all parameters, float32. Rows without any label have zeros.
    """
    num_candidates = len(candidates.tokens_MU)
    tokens_RU, valid_RT, labels_RT = (
        torch.cat([getattr(candidates, name), getattr(validation, name)])
        for name in ("tokens_MU", "valid_MT", "labels_MT")
    )
    layers = _Layers(num_candidates, tokens_RU.device)
    with layers.watched(model):
        normed_TRD = _with_frozen_weights(model, Batch.of(tokens_RU, valid_RT))
    normed_RTD = normed_TRD.detach().transpose(0, 1)
    head = head_gradients(
        normed_RTD,
        model.output_layer.weight.detach(),
        labels_RT,
        valid_RT,
        num_candidates,
        model.shape.vocab_size,
    )
    # The embedding's output is the only leaf of the graph.
    normed_TRD.backward(head.hidden_RTD.transpose(0, 1))
    assert layers.embedded_TRD.grad is not None
    lookup_RTD, total = layers.embedded_TRD.grad.transpose(0, 1), layers.products
    # Every sequence uses row t of the position table once.
    total += vector_products(lookup_RTD.flatten(1), num_candidates)
    total += tied_embedding_products(head, normed_RTD, tokens_RU[:, :-1], lookup_RTD)
    return _of_means(total, valid_RT.sum(dim=1), num_candidates)


def _of_means(
    sums: GradientProducts, num_valid_R: torch.Tensor, num_candidates: int
) -> GradientProducts:
    """Convert products of gradients of summed losses to those of mean losses."""
    share_M = 1.0 / num_valid_R[:num_candidates].clamp(min=1)
    num_validation = num_valid_R[num_candidates:].sum().clamp(min=1)
    return GradientProducts(
        sums.pairs_MM * share_M * share_M[:, None], sums.validation_M * share_M / num_validation
    )


def _with_frozen_weights(model: GPT, batch: Batch) -> torch.Tensor:
    """Compute the head's input [T, R, D] in evaluation mode, with gradients of activations."""
    body = _Body(model)
    weights = {name: parameter.detach() for name, parameter in body.named_parameters()}
    was_training = model.training
    model.eval()  # all rows, no dropout, no activation checkpointing, no records
    try:
        return torch.func.functional_call(body, weights, (batch,))
    finally:
        model.train(was_training)


class _Body(nn.Module):
    """The model up to its head."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> torch.Tensor:
        hidden_TRD, *_ = self.model.run(batch)
        return self.model.final_norm(hidden_TRD)


class _Layers:
    """Hooks the layers for one pass and sums their products as gradients arrive."""

    def __init__(self, num_candidates: int, device: torch.device) -> None:
        self.num_candidates = num_candidates
        self.products = GradientProducts.zeros(num_candidates, device)
        self.embedded_TRD: torch.Tensor

    @contextmanager
    def watched(self, model: GPT) -> Iterator[None]:
        """Hook the model's layers during a forward pass."""
        with ExitStack() as stack:
            for module in model.modules():
                hook: Callable | None = None
                if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
                    hook = self._linear
                elif isinstance(module, nn.LayerNorm):
                    hook = self._norm
                elif isinstance(module, Embedding):
                    hook = self._embedding
                if hook is not None:
                    stack.callback(module.register_forward_hook(hook).remove)
            yield

    def _embedding(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        self.embedded_TRD = output.detach().requires_grad_()
        return self.embedded_TRD

    def _linear(self, module: Any, inputs: tuple, output: tuple) -> None:
        held = [inputs[0].detach()]
        output[0].register_hook(partial(self._add_linear, held, module.bias is not None))

    def _add_linear(self, held: list[torch.Tensor], bias: bool, grad_TRF: torch.Tensor) -> None:
        inputs_RTD, grads_RTF = held.pop().transpose(0, 1), grad_TRF.transpose(0, 1)
        self.products += linear_products(inputs_RTD, grads_RTF, self.num_candidates, bias=bias)

    def _norm(self, module: nn.LayerNorm, inputs: tuple, output: torch.Tensor) -> None:
        held = [inputs[0].detach()]
        output.register_hook(partial(self._add_norm, held, module))

    def _add_norm(
        self, held: list[torch.Tensor], module: nn.LayerNorm, grad_TRD: torch.Tensor
    ) -> None:
        normalised_TRD = F.layer_norm(held.pop(), module.normalized_shape, eps=module.eps).float()
        weight_RD = (normalised_TRD * grad_TRD.float()).sum(dim=0)
        bias_RD = grad_TRD.float().sum(dim=0)
        self.products += vector_products(torch.cat([weight_RD, bias_RD], 1), self.num_candidates)
