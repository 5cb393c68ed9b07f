"""Folders that claim to be a GPT-2: what is in them is checked before anything is made of it."""

from __future__ import annotations

import logging
import os
import pickle

import pytest
import torch

from megatron_eslm.errors import ConfigError
from megatron_eslm.model.hf.folder import from_hf, hf_shape, load_hf, read_hf_shape, with_vocabulary
from tests.interop.conftest import edit_json, random_gpt2


@pytest.fixture
def folder(tmp_path):
    """A folder as transformers writes it."""
    random_gpt2().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_layer": 10**7}, r"\d+ parameters \(10000000 layers.*weight files have only"),
        ({"n_positions": 10**9}, "weight files have only"),
        ({"vocab_size": 10**9}, "weight files have only"),
        ({"n_inner": 10**9}, "weight files have only"),
        ({"n_positions": 10**12}, r"n_positions: input should be less than"),
        ({"n_layer": "2"}, "n_layer: input should be a valid integer"),
        ({"n_layer": True}, "n_layer: input should be a valid integer"),
        ({"n_layer": -1}, "n_layer: input should be greater than or equal to 1"),
        ({"n_head": 0}, "n_head: input should be greater than or equal to 1"),
        ({"n_head": 7}, "n_head = 7; supported is a divisor of n_embd = 24"),
        ({"vocab_size": None}, "vocab_size: input should be a valid integer"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon: input should be greater than 0"),
        ({"layer_norm_epsilon": "a"}, "layer_norm_epsilon: input should be a valid number"),
        ({"activation_function": 5}, "activation_function: input should be a valid string"),
        ({"model_type": ["gpt2"]}, r"model_type = \['gpt2'\]"),
    ],
)
def test_what_config_json_says_is_not_believed(folder, fields, message):
    """Ten million layers used to be built for minutes before anyone looked at the tensors."""
    edit_json(folder / "config.json", **fields)
    with pytest.raises(ConfigError, match=message):
        load_hf(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "[" * 100_000, "config.json is not readable JSON: nested too deep"),
        ("config.json", "[]", "config.json is not a JSON object"),
        ("config.json", None, "config.json must be a regular file but is a named pipe"),
        ("generation_config.json", "[" * 100_000, "generation_config.json .*nested too deep"),
        ("generation_config.json", "[]", "cannot be loaded"),
        ("model.safetensors", None, "model.safetensors must be a regular file"),
        ("model.safetensors", "x" * 30_000, "cannot be loaded"),
    ],
)
def test_files_that_are_none(folder, name, content, message):
    (folder / name).unlink()
    if content is None:
        os.mkfifo(folder / name)
    else:
        (folder / name).write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        load_hf(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"vocab_size": 258},
            r"has transformer\.wte\.weight of size \(257, 24\), .* for \(258, 24\)\.",
        ),
        ({"n_positions": 41}, r"has transformer\.wpe\.weight of size \(40, 24\)"),
        ({"n_layer": 3}, r"lacks transformer\.h\.2\..* \(and 11 more\)"),
    ],
)
def test_tensors_of_another_size(folder, fields, message, capfd):
    edit_json(folder / "config.json", **fields)
    with pytest.raises(ConfigError, match=message):
        load_hf(folder)
    assert capfd.readouterr().err == ""


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        read_hf_shape(folder)


class Harm:
    """What a pickle can do when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("how", [torch.save, lambda thing, file: pickle.dump(thing, file)])
def test_code_in_pickled_weights_is_refused_in_one_paragraph(folder, how, capfd):
    """PyTorch's own message takes three, and tells how to run the code."""
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as file:
        how({"transformer.wte.weight": Harm(folder / "harmed"), "fill": b"x" * 30_000}, file)
    with pytest.raises(ConfigError, match=r"contains more than tensors.*so it is refused") as error:
        load_hf(folder)
    assert "weights_only" not in str(error.value)
    assert "\n" not in str(error.value)
    assert not (folder / "harmed").exists()
    assert capfd.readouterr().err == ""


def test_plain_pickled_weights_are_read(folder):
    model = random_gpt2()
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    loaded = load_hf(folder).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_names_that_transformers_takes_too():
    shape = hf_shape({"model_type": "gpt2", "num_hidden_layers": 3, "hidden_size": 24})
    assert (shape.num_layers, shape.hidden_size, shape.num_attention_heads) == (3, 24, 12)
    shape = hf_shape({"model_type": "gpt2", "num_hidden_layers": 3, "n_layer": 4})
    assert shape.num_layers == 4


def test_rows_beyond_the_tokenizer_are_padding(caplog):
    """50257 ids in 50304 rows is how most folders with a padded vocabulary look."""
    model = random_gpt2(vocab_size=300)
    with caplog.at_level(logging.INFO):
        weights, shape = from_hf(model, model.config, 128, 257)
    (record,) = caplog.records
    assert "300 rows of embeddings and its tokenizer 257 ids: the last 43" in record.getMessage()
    assert (shape.vocab_size, shape.padded_vocab_size) == (257, 384)
    words = weights["embedding.word.weight"]
    assert torch.equal(words[:257], model.transformer.wte.weight[:257])
    assert not words[257:].any()
    with pytest.raises(ConfigError, match="tokenizer has 301 ids, but the model only 300 rows"):
        from_hf(model, model.config, 128, 301)


@pytest.mark.parametrize("multiple", [0, -5, 2**40])
def test_padding_out_of_all_proportion(multiple):
    shape = hf_shape({"model_type": "gpt2"})
    with pytest.raises(ConfigError, match=f"--make-vocab-size-divisible-by {multiple} must be"):
        with_vocabulary(shape, multiple)
