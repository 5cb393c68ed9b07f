"""Our weights as GPT2LMHeadModel and back."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, MambaConfig

from megatron_eslm.data.tokenizers.from_transformers import folder_tokenizer
from megatron_eslm.errors import ConfigError
from megatron_eslm.interop.huggingface import (
    LOGIT_TOLERANCE,
    compare_logits,
    export,
    to_hf,
)
from megatron_eslm.interop.prompts import prompts_ids
from megatron_eslm.model.hf.folder import from_hf, load_hf
from megatron_eslm.model.hf.state import weight_sizes

from .conftest import edit_json, files_of, random_gpt2


def test_qkv_layout_by_hand():
    """Row (head, part, k) of ours is column (part, head, k) of theirs."""
    model = random_gpt2(n_layer=1)
    weights, shape = from_hf(model, model.config, 128)
    theirs = model.transformer.h[0].attn.c_attn
    heads, width = shape.num_attention_heads, shape.head_dim
    for head in range(heads):
        for part in range(3):
            for k in range(width):
                ours = (head * 3 + part) * width + k
                column = (part * heads + head) * width + k
                assert torch.equal(
                    weights["blocks.0.attention.qkv.weight"][ours], theirs.weight[:, column]
                )
                assert weights["blocks.0.attention.qkv.bias"][ours] == theirs.bias[column]


@pytest.mark.parametrize("multiple", [1, 128, 257])
def test_import_pads_the_vocabulary_with_zeros(gpt2, multiple):
    weights, shape = from_hf(gpt2, gpt2.config, multiple)
    assert shape.vocab_size == 257
    assert shape.padded_vocab_size == {1: 257, 128: 384, 257: 257}[multiple]
    assert shape.layernorm_epsilon == 2e-5
    assert {name: tuple(w.shape) for name, w in weights.items()} == weight_sizes(shape)
    words = weights["embedding.word.weight"]
    assert torch.equal(words[:257], gpt2.transformer.wte.weight)
    assert not words[257:].any()
    assert all(w.dtype == torch.float32 and w.is_contiguous() for w in weights.values())


def test_import_accepts_state_dicts_of_every_kind(gpt2):
    expected, _ = from_hf(gpt2, gpt2.config, 128)
    old_file = {
        **gpt2.transformer.state_dict(),
        "h.0.attn.bias": torch.ones(1, 1, 40, 40),
        "h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    for state in (gpt2.state_dict(), gpt2.transformer, old_file):
        weights, _ = from_hf(state, gpt2.config, 128)
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_import_neither_changes_nor_shares(gpt2):
    before = {name: tensor.clone() for name, tensor in gpt2.state_dict().items()}
    weights, _ = from_hf(gpt2, gpt2.config, 128)
    for tensor in weights.values():
        tensor.zero_()
    after = gpt2.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_import_of_half_precision(gpt2):
    weights, _ = from_hf(gpt2.to(torch.bfloat16), gpt2.config, 128)
    assert all(w.dtype == torch.float32 for w in weights.values())


def test_memory_round_trip_is_exact(gpt2):
    weights, shape = from_hf(gpt2, gpt2.config, 128)
    again = to_hf(weights, shape, eod=256)
    assert not again.training
    assert again.lm_head.weight is again.transformer.wte.weight
    assert again.config.vocab_size == 257
    expected = gpt2.state_dict()
    actual = again.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n_layer": 1, "n_head": 1},
        {"vocab_size": 300},
        {"n_inner": 50, "activation_function": "gelu_pytorch_tanh"},
        {"n_positions": 200},
    ],
)
def test_logits_equal_transformers(fields, byte_tokenizer):
    """Against a model that was built by transformers, not exported by us."""
    model = random_gpt2(**fields)
    weights, shape = from_hf(model, model.config, 128)
    prompts = prompts_ids(byte_tokenizer, shape)
    assert max(map(len, prompts)) == shape.max_position_embeddings
    assert min(map(len, prompts)) == 1
    assert compare_logits(weights, shape, model, prompts) < LOGIT_TOLERANCE


def test_compare_logits_sees_one_wrong_weight(gpt2, byte_tokenizer):
    weights, shape = from_hf(gpt2, gpt2.config, 128)
    prompts = prompts_ids(byte_tokenizer, shape)
    wrong = {**weights, "final_norm.bias": weights["final_norm.bias"] + 0.01}
    assert compare_logits(wrong, shape, gpt2, prompts) > LOGIT_TOLERANCE
    broken = {**weights, "final_norm.bias": weights["final_norm.bias"] + math.nan}
    assert compare_logits(broken, shape, gpt2, prompts) == math.inf


def test_export_import_export_is_byte_identical(tmp_path, any_tokenizer):
    model = random_gpt2(vocab_size=any_tokenizer.vocab_size)
    weights, shape = from_hf(model, model.config, 128)
    export(tmp_path / "one", weights, shape, any_tokenizer)
    loaded = load_hf(tmp_path / "one")
    weights, shape = from_hf(loaded, loaded.config, 128)
    export(tmp_path / "two", weights, shape, folder_tokenizer(tmp_path / "one"))
    one, two = files_of(tmp_path / "one"), files_of(tmp_path / "two")
    assert {"config.json", "model.safetensors", "generation_config.json"} < one.keys()
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []


def test_exported_folder_loads_by_the_usual_means(tmp_path, gpt2, any_tokenizer):
    model = random_gpt2(vocab_size=any_tokenizer.vocab_size)
    weights, shape = from_hf(model, model.config, 128)
    export(tmp_path, weights, shape, any_tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "the cat sat on größer mats"
    assert tokenizer.encode(text, add_special_tokens=False) == any_tokenizer.encode(text)
    assert tokenizer.decode(any_tokenizer.encode(text)) == text
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "GPT2LMHeadModel"
    assert loaded.config.eos_token_id == tokenizer.eos_token_id == any_tokenizer.eod
    assert loaded.config.resid_pdrop == 0.0
    tokens = torch.tensor([any_tokenizer.encode(text)])
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_export_of_another_mlp_width(tmp_path, byte_tokenizer):
    """Trained with --ffn-hidden-size, it goes out as n_inner."""
    model = random_gpt2(n_inner=50)
    weights, shape = from_hf(model, model.config, 128)
    assert shape.ffn_hidden_size == 50
    export(tmp_path, weights, shape, byte_tokenizer)
    loaded = load_hf(tmp_path)
    assert loaded.config.n_inner == 50
    prompts = prompts_ids(byte_tokenizer, shape)
    assert compare_logits(weights, shape, loaded, prompts) < LOGIT_TOLERANCE


def test_sharded_folders_are_read(tmp_path, gpt2):
    gpt2.save_pretrained(tmp_path, max_shard_size="20KB")
    assert list(tmp_path.glob("model-0000*-of-*.safetensors"))
    loaded = load_hf(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in gpt2.state_dict().items())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation_function": "relu"}, "activation_function = 'relu'; supported is 'gelu_new'"),
        ({"activation_function": "gelu"}, "activation_function = 'gelu'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ({"scale_attn_weights": False}, "scale_attn_weights = False; supported is true"),
        ({"add_cross_attention": True}, "add_cross_attention = True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_unsupported_fields_are_named(gpt2, fields, message):
    config = GPT2Config(**{**gpt2.config.to_dict(), **fields})
    with pytest.raises(ConfigError) as error:
        from_hf(gpt2, config, 128)
    assert message in str(error.value)


def test_unsupported_architecture(gpt2):
    with pytest.raises(ConfigError, match=r"model_type = 'mamba'.*'gpt2' or 'llama'"):
        from_hf(gpt2, MambaConfig(), 128)


def test_untied_head(gpt2):
    state = {**gpt2.state_dict(), "lm_head.weight": gpt2.lm_head.weight + 1}
    with pytest.raises(ConfigError, match=r"untied head: lm_head\.weight"):
        from_hf(state, gpt2.config, 128)


def test_bad_multiple(gpt2):
    with pytest.raises(ConfigError, match="--make-vocab-size-divisible-by 0"):
        from_hf(gpt2, gpt2.config, 0)


def test_tensors_that_do_not_fit(gpt2):
    weights, shape = from_hf(gpt2, gpt2.config, 128)
    lacking = {name: w for name, w in weights.items() if name != "final_norm.bias"}
    with pytest.raises(ConfigError, match=r"it lacks final_norm\.bias\. "):
        to_hf(lacking, shape, 256)
    with pytest.raises(ConfigError, match="it holds the unknown extra"):
        to_hf({**weights, "extra": torch.ones(1)}, shape, 256)
    with pytest.raises(ConfigError, match=r"final_norm\.bias has size \(3,\)"):
        to_hf({**weights, "final_norm.bias": torch.ones(3)}, shape, 256)
    state = gpt2.state_dict()
    del state["transformer.h.1.mlp.c_fc.bias"]
    with pytest.raises(ConfigError, match=r"lacks transformer\.h\.1\.mlp\.c_fc\.bias"):
        from_hf(state, gpt2.config, 128)
    with pytest.raises(ConfigError, match="end-of-document id 300 is outside"):
        to_hf(weights, shape, 300)


def test_tokenizer_of_another_model(tmp_path, byte_tokenizer):
    model = random_gpt2(vocab_size=100, bos_token_id=0, eos_token_id=0)
    weights, shape = from_hf(model, model.config, 128)
    with pytest.raises(ConfigError, match="ByteTokenizer has 257 ids, but the model only 100"):
        export(tmp_path, weights, shape, byte_tokenizer)


def test_export_to_a_place_that_cannot_be_written(tmp_path, gpt2, byte_tokenizer):
    weights, shape = from_hf(gpt2, gpt2.config, 128)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        export(tmp_path / "file" / "x", weights, shape, byte_tokenizer)


def test_folders_that_cannot_be_loaded(tmp_path, gpt2):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_hf(tmp_path)
    gpt2.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()

    edit_json(tmp_path / "config.json", model_type="mamba")
    with pytest.raises(ConfigError, match="model_type = 'mamba'"):
        load_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is not JSON.*Download the model again"):
        load_hf(tmp_path)
    (tmp_path / "config.json").write_text(config)
    edit_json(tmp_path / "config.json", n_layer=3)
    with pytest.raises(ConfigError, match=r"lacks transformer\.h\.2\."):
        load_hf(tmp_path)
    edit_json(tmp_path / "config.json", n_layer=2, n_positions=41)
    with pytest.raises(ConfigError, match=r"of size .*config\.json asks for"):
        load_hf(tmp_path)
    (tmp_path / "config.json").write_text(config)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-1000])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_hf(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_hf(tmp_path)


def test_untied_head_in_a_folder_is_seen(tmp_path, gpt2):
    """A head that differs is refused although config.json calls it tied."""
    from safetensors.torch import load_file, save_file

    gpt2.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = state["transformer.wte.weight"] + 1
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="untied"):
        loaded = load_hf(tmp_path)
        from_hf(loaded, loaded.config, 128)
