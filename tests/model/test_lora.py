"""Adapters against merged weights: losses, gradients, initial values, and shards of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from megatron_eslm.config.run import parse_run
from megatron_eslm.errors import ConfigError
from megatron_eslm.model.gpt import GPT, ModelSettings, build_gpt, load_weights
from megatron_eslm.model.lora import adapter_names, is_adapter
from megatron_eslm.model.model_options import Lora, ModelOptions
from megatron_eslm.objectives.causal_lm import CausalLM
from megatron_eslm.parallel.mesh import build_mesh
from megatron_eslm.selection.build import build_policy
from megatron_eslm.selection.selection_options import SelectionOptions
from megatron_eslm.selection.state import Peers, Recorder, SelectionState
from tests.harness import run_ranks

from .small import INIT_STD, SHAPE, make_batch, perturb, relative_difference

LORA = Lora(rank=3, alpha=7.0)
SCALE = 7.0 / 3.0
ADAPTED = ("attention.qkv", "attention.out", "mlp.up", "mlp.down")


@dataclass
class Passed:
    """A forward and backward pass on one rank."""

    loss: float
    weights: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    kept_rows: list[bool]
    kept_tokens: list[list[bool]]
    cut: dict[str, int]
    """Dimension in which each adapter's factor is cut, where it is."""


def build(lora: Lora | None, *, tp: int = 1, sequence_parallel: bool = False) -> GPT:
    options = SelectionOptions(eslm_alpha=0.3)
    policy = build_policy(options, SelectionState(alpha=0.3), Peers(0, 1, None), seed=0)
    settings = ModelSettings(sequence_parallel=sequence_parallel, lora=lora)
    mesh = build_mesh(tp)
    model = build_gpt(
        SHAPE, mesh, policy, Recorder(), CausalLM(), settings, seed=3, init_std=INIT_STD
    )
    perturb(model, mesh)
    return model


@torch.no_grad()
def train_adapters(model: GPT, tp: int, rank: int) -> None:
    """Give B of every adapter known values, shard by shard."""
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            cut = getattr(parameter, "tensor_model_parallel", False)
            rows = parameter.shape[0] * (tp if cut else 1)
            full = torch.sin(1.3 * torch.arange(rows * LORA.rank) + len(name)).view(rows, -1) / 4
            parameter.copy_(full.chunk(tp)[rank] if cut else full)


def passed(model: GPT) -> Passed:
    # 12 positions, which two sequence-parallel ranks share.
    tokens_MU = torch.cat([make_batch(6).tokens_MU, make_batch(6, seed=1).tokens_MU[:, :1]], dim=1)
    model.train()
    loss = model(tokens_MU, torch.ones_like(tokens_MU[:, 1:], dtype=torch.bool))
    loss.backward()
    (record,) = model.recorder.take()
    named = dict(model.named_parameters())
    return Passed(
        loss=loss.item(),
        weights={name: p.detach().clone() for name, p in named.items()},
        gradients={name: p.grad.clone() for name, p in named.items() if p.grad is not None},
        kept_rows=record.instance_kept_M.tolist(),
        kept_tokens=record.token_kept_MT.tolist(),
        cut={
            name: p.partition_dim
            for name, p in named.items()
            if is_adapter(name) and getattr(p, "tensor_model_parallel", False)
        },
    )


def in_layout(tp: int, sequence_parallel: bool = False, trained: bool = True) -> list[Passed]:
    def fn(rank: int) -> Passed:
        model = build(LORA, tp=tp, sequence_parallel=sequence_parallel)
        if trained:
            train_adapters(model, tp, rank)
        return passed(model)

    return run_ranks(tp, fn)


def merged(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By the formula, in float64."""
    plain = {name: tensor for name, tensor in weights.items() if not is_adapter(name)}
    for i in range(SHAPE.num_layers):
        for layer in ADAPTED:
            name = f"blocks.{i}.{layer}"
            a, b = (weights[f"{name}.lora_{factor}"].double() for factor in "ab")
            plain[f"{name}.weight"] = (
                plain[f"{name}.weight"].double() + SCALE * torch.einsum("or,ri->oi", b, a)
            ).float()
    return plain


def test_losses_and_gradients_are_those_of_merged_weights() -> None:
    (ours,) = in_layout(1)

    def fn(rank: int) -> Passed:
        model = build(None)
        load_weights(model, merged(ours.weights))
        return passed(model)

    plain = run_ranks(1, fn)[0]
    assert ours.loss == pytest.approx(plain.loss, abs=1e-5)
    assert (ours.kept_rows, ours.kept_tokens) == (plain.kept_rows, plain.kept_tokens)
    assert False in ours.kept_rows  # chosen by an early exit that has adapters
    assert set(ours.gradients) == {name for name in ours.weights if is_adapter(name)}
    assert len(ours.gradients) == SHAPE.num_layers * len(ADAPTED) * 2
    for name in plain.gradients:
        if name.endswith(tuple(f"{layer}.weight" for layer in ADAPTED)):
            a, b = adapter_names(name)
            whole = plain.gradients[name]
            for factor, wanted in (
                (a, SCALE * ours.weights[b].t() @ whole),
                (b, SCALE * whole @ ours.weights[a].t()),
            ):
                assert relative_difference(ours.gradients[factor], wanted) < 1e-4, factor


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tensor", "sequence"])
def test_tensor_parallel_ranks_have_the_shards_of_one(sequence_parallel: bool) -> None:
    (one,), two = in_layout(1), in_layout(2, sequence_parallel)
    for rank, ours in enumerate(two):
        assert ours.loss == pytest.approx(one.loss, abs=1e-5)
        assert (ours.kept_rows, ours.kept_tokens) == (one.kept_rows, one.kept_tokens)
        assert ours.gradients.keys() == one.gradients.keys()
        for name, whole in one.gradients.items():
            column = ".qkv." in name or ".up." in name
            dim = {("lora_b", True): 0, ("lora_a", False): 1}.get((name[-6:], column))
            assert ours.cut.get(name) == dim, name
            wanted, initial = whole, one.weights[name]
            if dim is not None:
                wanted, initial = (x.chunk(2, dim)[rank] for x in (whole, initial))
            assert torch.equal(ours.weights[name], initial), name
            assert relative_difference(ours.gradients[name], wanted) < 1e-4, name


def test_the_first_step_sees_the_model_that_was_loaded() -> None:
    (ours,) = in_layout(1, trained=False)
    plain = run_ranks(1, lambda rank: passed(build(None)))[0]
    assert ours.loss == plain.loss
    for name, weight in plain.weights.items():
        assert torch.equal(ours.weights[name], weight)
    for name, weight in ours.weights.items():
        if name.endswith("lora_b"):
            assert not weight.any() and ours.gradients[name].any()
        elif name.endswith("lora_a"):
            # So that A x is about as large as x.
            assert weight.std() * math.sqrt(weight.shape[1]) == pytest.approx(1.0, abs=0.35), name
            assert not ours.gradients[name].any()


def test_rank_and_alpha_as_options() -> None:
    assert ModelOptions().lora is None
    assert ModelOptions(lora_rank=32).lora == Lora(32, 64.0)
    given = ModelOptions(lora_rank=4, lora_alpha=2.0).lora
    assert given == Lora(4, 2.0) and given.scale == 0.5


BASE = (
    *("--num-layers", "2", "--hidden-size", "48", "--num-attention-heads", "6"),
    *("--seq-length", "32", "--lr", "1e-3", "--micro-batch-size", "2"),
    *("--train-iters", "10", "--data-path", "x"),
)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--lora-rank -1", "--lora-rank -1 must be 0"),
        ("--lora-rank 4 --lora-alpha 0", "--lora-alpha 0 must be above 0"),
        (
            "--lora-alpha 8",
            "--lora-alpha 8 scales adapters, and without --lora-rank there are none",
        ),
        ("--lora-rank 4", "--lora-rank 4 trains adapters .* but --load is not set. Give --load"),
        (
            "--lora-rank 4 --load x --selection greats",
            "--selection greats computes inner products of the gradients of all weights, but "
            "--lora-rank 4 freezes them. Use another --selection, or leave out --lora-rank",
        ),
    ],
)
def test_refused_options(flags: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_run([*BASE, *flags.split()], 1)


def test_the_products_of_greats_do_not_cover_adapters() -> None:
    from megatron_eslm.training.gradient_alignment import check_covered

    def fn(rank: int) -> str:
        check_covered(build(None))
        try:
            check_covered(build(LORA))
        except ConfigError as error:
            return str(error)
        return ""

    text = run_ranks(1, fn)[0]
    assert "knows no gradient products of blocks.0.attention.out.lora_a" in text
