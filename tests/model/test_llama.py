"""Llama against transformers, and what its layers must do under selection."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import LlamaForCausalLM

from megatron_eslm.config.run import parse_run
from megatron_eslm.data.batch import Batch
from megatron_eslm.errors import ConfigError
from megatron_eslm.interop.huggingface import hf_config, to_hf
from megatron_eslm.model.architectures.registry import architecture_of
from megatron_eslm.model.arithmetic import (
    adapter_params,
    num_params,
    saved_widths,
    stage_params,
)
from megatron_eslm.model.gpt import bare_gpt, load_weights, reference_logits
from megatron_eslm.model.hf.folder import from_hf, hf_shape
from megatron_eslm.model.hf.state import weight_sizes
from megatron_eslm.model.presets import PRESETS
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.ops.activations import ACTIVATIONS
from megatron_eslm.ops.kept_tokens_mlp import LossTokenIndex, kept_tokens_mlp
from megatron_eslm.parallel.mesh import build_mesh
from tests.model.small import small_gpt

SHAPE = ModelShape(
    architecture="llama",
    num_layers=3,
    hidden_size=48,
    num_attention_heads=4,
    ffn_hidden_size=56,
    max_position_embeddings=32,
    vocab_size=45,
    padded_vocab_size=48,
)
VARIANTS = {
    "full heads": {},
    "grouped": {"num_query_groups": 2},
    "one key-value head, untied": {"num_query_groups": 1, "tied_head": False},
    "linear": {"rotary_scaling": "linear", "rotary_scaling_factor": 3.0, "rotary_base": 500.0},
    "llama3": {
        "num_query_groups": 2,
        "rotary_scaling": "llama3",
        "rotary_scaling_factor": 8.0,
        "rotary_original_positions": 8,
    },
}


def random_weights(shape: ModelShape) -> dict[str, torch.Tensor]:
    """Random weights; padding of the vocabulary is zero, as in checkpoints."""
    torch.manual_seed(0)
    weights = {name: torch.randn(size) * 0.3 for name, size in weight_sizes(shape).items()}
    for name in weights.keys() & {"embedding.word.weight", "output.weight"}:
        weights[name][shape.vocab_size :] = 0.0
    return weights


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_logits_and_gradients_as_transformers(process_group, variant):
    shape = dataclasses.replace(SHAPE, **VARIANTS[variant])
    weights = random_weights(shape)
    tokens_BT = torch.randint(0, shape.vocab_size, (3, 32))
    # Ours and theirs differentiate the same sum of logits.
    factors_BTV = torch.randn(3, 32, shape.vocab_size)

    theirs = to_hf(weights, shape, eod=0)
    assert isinstance(theirs, LlamaForCausalLM)
    logits_BTV = theirs(tokens_BT, use_cache=False).logits
    (logits_BTV * factors_BTV).sum().backward()
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    expected, _ = from_hf(expected, theirs.config, 48, shape.vocab_size)

    assert torch.allclose(reference_logits(weights, shape, tokens_BT), logits_BTV, atol=1e-5)
    model = bare_gpt(shape, build_mesh())
    load_weights(model, weights)
    padded_BU = torch.cat([tokens_BT, tokens_BT[:, :1]], dim=1)
    hidden, _ = model.run(Batch.of(padded_BU, torch.ones_like(tokens_BT, dtype=torch.bool)))
    ours = model.final_norm(hidden) @ model.output_layer.weight[: shape.vocab_size].t()
    (ours.transpose(0, 1) * factors_BTV).sum().backward()
    for name, parameter in model.named_parameters():
        scale = expected[name].abs().max()
        assert torch.allclose(parameter.grad, expected[name], atol=1e-5 * scale, rtol=0), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_conversion_there_and_back(variant):
    shape = dataclasses.replace(SHAPE, **VARIANTS[variant])
    weights = random_weights(shape)
    model = to_hf(weights, shape, eod=0)
    back, back_shape = from_hf(model, model.config, 48, shape.vocab_size)
    assert back_shape == shape
    assert all(torch.equal(back[name], weight) for name, weight in weights.items())


def test_config_of_older_files():
    """Files of transformers 4 have rope_theta and rope_scaling beside each other."""
    shape = dataclasses.replace(SHAPE, **VARIANTS["llama3"], rotary_base=5e5)
    config = hf_config(shape, eod=0).to_dict()
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": 500000, "rope_scaling": {**rope, "factor": 8}}
    del config["rope_scaling"]["rope_theta"]
    assert hf_shape(config) == dataclasses.replace(shape, padded_vocab_size=shape.vocab_size)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_bias": True}, "attention_bias = True; supported is false"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'; supported is \"silu\""),
        ({"head_dim": 16}, "head_dim = 16; supported is 12"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type = 'yarn'"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 2.0}},
            "low_freq_factor and high_freq_factor",
        ),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "llama3 scaling"),
        ({"num_key_value_heads": 3}, "--num-attention-heads 4 is not a multiple"),
        ({"hidden_size": 12}, "heads of odd width 3"),
    ],
)
def test_unsupported_fields_are_named(fields, message):
    config = hf_config(SHAPE, eod=0).to_dict() | {"head_dim": None} | fields
    with pytest.raises(ConfigError) as error:
        hf_shape(config)
    assert message in str(error.value)


def test_flags_of_presets():
    """Heads given beside a preset with full heads bring as many key-value heads."""
    argv = ["--data-path", "x", "--model-size"]
    small = parse_run([*argv, "llama-125M", "--num-attention-heads", "4"], 1)
    assert small.model.num_query_groups == 4
    assert parse_run([*argv, "llama-1B"], 1).model.num_query_groups == 8


@pytest.mark.parametrize(
    "flags",
    [
        ("--rotary-base", "5000"),
        ("--rotary-scaling", "linear", "--rotary-scaling-factor", "2"),
        ("--rotary-original-positions", "64"),
        ("--num-query-groups", "4"),
        ("--untie-embeddings-and-output-weights",),
    ],
)
def test_gpt2_refuses_flags_of_llama(flags):
    with pytest.raises(ConfigError, match=f"^{flags[0]}.* with --architecture gpt2"):
        parse_run(["--data-path", "x", "--model-size", "124M", *flags], 1)


@pytest.mark.parametrize("name", ["gelu", "swiglu"])
@pytest.mark.parametrize("bias", [True, False])
def test_backward_over_kept_tokens_is_exact(name, bias):
    """Gradients equal those of the plain MLP when dropped tokens have zero gradients."""
    torch.manual_seed(1)
    activation, width = ACTIVATIONS[name], 14 if name == "swiglu" else 7
    x = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    up = torch.randn(width, 5, dtype=torch.float64, requires_grad=True)
    up_bias = torch.randn(width, dtype=torch.float64, requires_grad=True) if bias else None
    down = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    chosen = torch.tensor([0, 3, 4, 8])
    grad = torch.zeros(9, 5, dtype=torch.float64)
    grad[chosen] = torch.randn(4, 5, dtype=torch.float64)
    leaves = [leaf for leaf in (x, up, up_bias, down) if leaf is not None]

    wide = x @ up.t() + (0 if up_bias is None else up_bias)
    if name == "swiglu":
        gate, value = wide[:, 0::2], wide[:, 1::2]
        active = torch.nn.functional.silu(gate) * value
    else:
        active = torch.nn.functional.gelu(wide, approximate="tanh")
    plain = active @ down.t()
    expected = torch.autograd.grad(plain, leaves, grad)
    ours = kept_tokens_mlp(x, up, up_bias, down, activation, LossTokenIndex(chosen))
    assert torch.allclose(ours, plain)
    for got, wanted in zip(torch.autograd.grad(ours, leaves, grad), expected, strict=True):
        assert torch.allclose(got, wanted)


def test_swiglu_derivative():
    wide = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ACTIVATIONS["swiglu"].apply, wide)


def test_counts_equal_the_model(process_group):
    shape = dataclasses.replace(SHAPE, num_query_groups=2, tied_head=False)
    model, _ = small_gpt(shape=shape, selection="clm", alpha=0.0)
    sizes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert sizes == weight_sizes(shape)
    assert sum(p.numel() for p in model.parameters()) == num_params(shape)
    assert stage_params(shape, 3, first=True, last=True) == num_params(shape)
    # An untied head is in the last stage only.
    first, last = (stage_params(shape, 1, first=end, last=not end) for end in (True, False))
    block = stage_params(shape, 1, first=False, last=False)
    assert first - block == 48 * 48
    assert last - block == 48 * 48 + 48
    # qkv 48 -> 96, out 48 -> 48, up 48 -> 112, down 56 -> 48.
    assert adapter_params(shape, 1, rank=2) == 2 * (144 + 96 + 160 + 104)
    # One factor per layer is divided by two ranks.
    assert adapter_params(shape, 1, rank=2, tp=2) == 2 * (48 + 48 + 24 + 48 + 48 + 56 + 28 + 48)
    # qkv 96, rotated queries and keys 72, attention 48, gate and up 112, their product 56.
    assert saved_widths(shape) == (4 * 48, 96 + 72 + 48 + 112 + 56)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-125M", 0.124),
        ("llama-350M", 0.360),
        ("llama-1B", 1.236),
        ("llama-3B", 3.213),
        ("llama-8B", 8.030),
    ],
)
def test_presets_have_the_published_sizes(name, billions):
    """With Llama 3's vocabulary, 1B to 8B have the parameters of the published models."""
    preset, vocabulary = PRESETS[name], 128_256 if "B" in name else 50_304
    shape = ModelShape(
        architecture=preset.architecture,
        num_layers=preset.num_layers,
        hidden_size=preset.hidden_size,
        num_attention_heads=preset.num_attention_heads,
        num_query_groups=preset.num_query_groups,
        ffn_hidden_size=preset.ffn_hidden_size,
        max_position_embeddings=preset.seq_length,
        vocab_size=vocabulary,
        padded_vocab_size=vocabulary,
        tied_head=not preset.untie_embeddings_and_output_weights,
    )
    architecture_of(shape).check(shape)
    assert num_params(shape) / 1e9 == pytest.approx(billions, abs=6e-4)
