"""Initial weights depend on seed and name alone."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from megatron_eslm.errors import ConfigError
from megatron_eslm.model.arithmetic import num_params, num_params_block
from megatron_eslm.model.gpt import GPT, ModelSettings, build_gpt, load_weights, reference_logits
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.objectives.causal_lm import CausalLM
from megatron_eslm.parallel.mesh import build_mesh
from megatron_eslm.selection.build import build_policy
from megatron_eslm.selection.selection_options import SelectionOptions
from megatron_eslm.selection.state import Peers, Recorder, SelectionState

from ..harness import run_ranks
from .reference import Config, logits_of
from .small import CONFIG, SHAPE, make_batch, small_gpt


def build(shape: ModelShape = SHAPE, *, seed: int = 0, tp: int = 1, **options) -> GPT:
    selection = SelectionOptions(**options)
    policy = build_policy(selection, SelectionState(alpha=0.1), Peers(0, 1, None), seed=seed)
    return build_gpt(
        shape, build_mesh(tp), policy, Recorder(), CausalLM(), ModelSettings(), seed=seed
    )


def weights_of(model: GPT) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_names_and_number_of_parameters(process_group: None) -> None:
    weights = weights_of(build())
    assert sum(w.numel() for w in weights.values()) == num_params(SHAPE)
    block = sum(w.numel() for name, w in weights.items() if name.startswith("blocks.1."))
    assert block == num_params_block(SHAPE)
    assert {name.split(".")[0] for name in weights} == {"embedding", "blocks", "final_norm"}


def test_the_same_for_every_policy_and_state_of_the_world(process_group: None) -> None:
    torch.manual_seed(1)
    first = weights_of(build(selection="clm"))
    torch.manual_seed(2)
    for options in (
        {"selection": "eslm"},
        {"selection": "eslm", "eslm_proxy_layers": 2, "eslm_score": "entropy"},
        {"selection": "eslm", "eslm_level": "token"},
        {"selection": "random"},
    ):
        assert equal(weights_of(build(**options)), first), options


def test_every_weight_matrix_differs_from_seed_to_seed_and_name_to_name(
    process_group: None,
) -> None:
    first, second = weights_of(build(seed=1)), weights_of(build(seed=2))
    matrices = [name for name in first if first[name].dim() == 2]
    assert len(matrices) == 2 + 4 * SHAPE.num_layers
    for name in matrices:
        assert not torch.equal(first[name], second[name]), name
    for i, name in enumerate(matrices):
        for other in matrices[i + 1 :]:
            if first[name].shape == first[other].shape:
                assert not torch.equal(first[name], first[other]), (name, other)


def test_distribution_is_that_of_gpt2(process_group: None) -> None:
    shape = ModelShape(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        ffn_hidden_size=256,
        max_position_embeddings=64,
        vocab_size=500,
        padded_vocab_size=512,
    )
    for name, weight in weights_of(build(shape)).items():
        if name.endswith("bias"):
            assert not weight.any(), name
        elif "norm" in name:
            assert (weight == 1).all(), name
        else:
            into_residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
            std = 0.02 / math.sqrt(4) if into_residual else 0.02
            assert weight.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(weight.mean().item()) < 0.1 * std, name


def test_more_padding_of_the_vocabulary_changes_no_token(process_group: None) -> None:
    """The padding grows with the tensor-parallel size; real rows must not notice."""
    name = "embedding.word.weight"
    first = weights_of(build())[name][: SHAPE.vocab_size]
    for padded in (64, 96):
        shape = ModelShape(**{**SHAPE.to_dict(), "padded_vocab_size": padded})
        assert torch.equal(weights_of(build(shape))[name][: SHAPE.vocab_size], first)


def test_tensor_parallel_shards_are_cut_from_the_whole() -> None:
    def on_rank(rank: int) -> dict[str, tuple[torch.Tensor, int | None]]:
        model = build(tp=dist.get_world_size())
        return {
            name: (p.detach(), getattr(p, "partition_dim", None))
            for name, p in model.named_parameters()
        }

    (whole,) = run_ranks(1, on_rank)
    shards = run_ranks(2, on_rank)
    for name, (weight, dim) in whole.items():
        parts = [shard[name][0] for shard in shards]
        if dim is None:
            assert all(torch.equal(part, weight) for part in parts), name
        else:
            assert torch.equal(torch.cat(parts, dim=dim), weight), name
    cut = {name.split(".", 2)[-1] for name, (_, dim) in whole.items() if dim is not None}
    assert cut == {
        "weight",  # of embedding.word
        "attention.qkv.weight",
        "attention.qkv.bias",
        "attention.out.weight",
        "mlp.up.weight",
        "mlp.up.bias",
        "mlp.down.weight",
    }


def test_proxy_as_deep_as_the_model_is_refused(process_group: None) -> None:
    with pytest.raises(ConfigError, match=r"--eslm-proxy-layers 3 must be smaller than --num-l"):
        build(eslm_proxy_layers=3)
    build(eslm_proxy_layers=3, eslm_level="token")  # nothing exits early
    build(eslm_proxy_layers=3, selection="random")


def test_heads_that_do_not_divide_are_refused() -> None:
    shape = ModelShape(**{**SHAPE.to_dict(), "num_attention_heads": 3})

    def on_rank(rank: int) -> str:
        with pytest.raises(ConfigError) as error:
            build(shape, tp=2)
        return str(error.value)

    assert "--num-attention-heads 3 is not a multiple" in run_ranks(2, on_rank)[0]


def test_reference_logits_are_those_of_the_weights(process_group: None) -> None:
    model, _ = small_gpt()
    weights = weights_of(model)
    tokens_MT = make_batch(3).tokens_MU[:, :-1]
    got = reference_logits(weights, SHAPE, tokens_MT)
    assert got.shape == (3, tokens_MT.shape[1], SHAPE.vocab_size)
    doubles = {name: w.double() for name, w in weights.items()}
    for row, tokens_T in zip(got, tokens_MT, strict=True):
        plain = logits_of(tokens_T, doubles, CONFIG, SHAPE.num_layers)
        torch.testing.assert_close(row.double(), plain, rtol=1e-4, atol=1e-4)


def test_another_epsilon_reaches_every_norm(process_group: None) -> None:
    shape = ModelShape(**{**SHAPE.to_dict(), "layernorm_epsilon": 0.5})
    model, _ = small_gpt(shape=shape)
    weights = weights_of(model)
    tokens_MT = make_batch(1).tokens_MU[:, :-1]
    doubles = {name: w.double() for name, w in weights.items()}
    plain = logits_of(tokens_MT[0], doubles, Config(3, 2, 45, epsilon=0.5), 3)
    got = reference_logits(weights, shape, tokens_MT)[0]
    torch.testing.assert_close(got.double(), plain, rtol=1e-4, atol=1e-4)


def test_weights_that_do_not_fit_are_refused(process_group: None) -> None:
    model = build()
    weights = weights_of(build(seed=5))
    load_weights(model, weights)
    assert equal(weights_of(model), weights)
    missing = {name: w for name, w in weights.items() if name != "final_norm.bias"}
    with pytest.raises(ConfigError, match=r"lack final_norm.bias \(1 in all\)"):
        load_weights(model, missing)
    with pytest.raises(ConfigError, match=r"hold unknown lm_head.weight"):
        load_weights(model, {**weights, "lm_head.weight": torch.zeros(1)})
    with pytest.raises(ConfigError, match=r"final_norm.bias is \[3\] in the weights and \[24\]"):
        load_weights(model, {**weights, "final_norm.bias": torch.zeros(3)})
