"""Small models and tokenizers for the tests of the Hugging Face side."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from megatron_eslm.data.tokenizers.build import ByteTokenizer, build_tokenizer

TEXT = "the cat sat on the mat; the dog ate the cat's hat and sat on that mat.\n" * 3


@pytest.fixture
def gpt2() -> GPT2LMHeadModel:
    """A GPT-2 over bytes whose every parameter is random (transformers starts biases at zero)."""
    return random_gpt2()


def random_llama(positions: int) -> LlamaForCausalLM:
    """A model of random weights far from zero: grouped heads, head of its own."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        bos_token_id=256,
        eos_token_id=256,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def random_gpt2(**fields) -> GPT2LMHeadModel:
    settings = {
        "n_layer": 2,
        "n_embd": 24,
        "n_head": 3,
        "n_positions": 40,
        "vocab_size": 257,
        "bos_token_id": 256,
        "eos_token_id": 256,
        "layer_norm_epsilon": 2e-5,
    }
    config = GPT2Config(**{**settings, **fields})
    model = GPT2LMHeadModel(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture
def byte_tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory) -> Path:
    """A small byte-level BPE as vocab.json + merges.txt and as tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("bpe")
    rust = Tokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rust.train_from_iterator([TEXT], trainer)
    rust.save(str(folder / "tokenizer.json"))
    rust.model.save(str(folder))
    return folder


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory) -> Path:
    """A small SentencePiece model that keeps text as it is."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text.txt").write_text(TEXT + "the größer cat on the mats")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture(
    params=[
        "ByteTokenizer",
        "GPT2BPETokenizer",
        "HuggingFaceTokenizer",
        "SentencePieceTokenizer",
    ]
)
def any_tokenizer(request, bpe_folder, sentencepiece_model):
    """One tokenizer of each kind."""
    if request.param == "SentencePieceTokenizer":
        return build_tokenizer(request.param, tokenizer_model=str(sentencepiece_model))
    if request.param == "GPT2BPETokenizer":
        return build_tokenizer(
            request.param,
            vocab_file=str(bpe_folder / "vocab.json"),
            merge_file=str(bpe_folder / "merges.txt"),
        )
    if request.param == "HuggingFaceTokenizer":
        return build_tokenizer(request.param, tokenizer_model=str(bpe_folder / "tokenizer.json"))
    return build_tokenizer(request.param)


def load_tool(name: str) -> ModuleType:
    """The module of a command."""
    return importlib.import_module(f"megatron_eslm.commands.{name}")


def edit_json(path: Path, **fields) -> None:
    """Change fields of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def files_of(folder: Path) -> dict[str, bytes]:
    """Relative name -> content of every file."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
