"""Continuing texts."""

from __future__ import annotations

import pytest
import torch

from megatron_eslm.errors import ConfigError
from megatron_eslm.interop.generation import Sampling, generate

from .conftest import random_gpt2


def greedy_ids(model, ids, count, eod):
    """Likeliest tokens one by one, without a cache."""
    ids = list(ids)
    for _ in range(count):
        with torch.no_grad():
            best = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if best == eod:
            break
        ids.append(best)
    return ids


def test_greedy_is_the_likeliest_token_each_time(gpt2, byte_tokenizer):
    for prompt in ("a cat", "x", "mats and hats"):
        expected = greedy_ids(gpt2, byte_tokenizer.encode(prompt), 20, byte_tokenizer.eod)
        sampling = Sampling(max_new_tokens=20, temperature=0)
        texts = generate(gpt2, byte_tokenizer, prompt, sampling)
        assert texts == [byte_tokenizer.decode(expected)]


def test_greedy_equals_plain_transformers(gpt2, byte_tokenizer):
    tokens = torch.tensor([byte_tokenizer.encode("a cat")])
    output = gpt2.generate(tokens, max_new_tokens=20, do_sample=False, pad_token_id=256)
    ids = [i for i in output[0].tolist() if i != byte_tokenizer.eod]
    sampling = Sampling(max_new_tokens=20, temperature=0)
    assert generate(gpt2, byte_tokenizer, "a cat", sampling) == [byte_tokenizer.decode(ids)]


def test_empty_prompt_starts_a_document(gpt2, byte_tokenizer):
    eod = byte_tokenizer.eod
    expected = greedy_ids(gpt2, [eod], 20, eod)[1:]
    sampling = Sampling(max_new_tokens=20, temperature=0)
    assert generate(gpt2, byte_tokenizer, "", sampling) == [byte_tokenizer.decode(expected)]


def test_seed_decides_the_samples(gpt2, byte_tokenizer):
    def texts(seed):
        sampling = Sampling(max_new_tokens=20, num_samples=3, seed=seed)
        return generate(gpt2, byte_tokenizer, "a", sampling)

    before = torch.random.get_rng_state()
    first = texts(1)
    assert len(set(first)) == 3
    assert first == texts(1)
    assert first != texts(2)
    assert torch.equal(before, torch.random.get_rng_state())


def test_top_k_and_top_p_narrow_the_choice(gpt2, byte_tokenizer):
    greedy = generate(gpt2, byte_tokenizer, "a", Sampling(max_new_tokens=9, temperature=0))
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        assert generate(gpt2, byte_tokenizer, "a", Sampling(max_new_tokens=9, **narrow)) == greedy


def test_whole_vocabulary_is_sampled_unless_narrowed(byte_tokenizer):
    """transformers' own default keeps the 50 likeliest only."""
    model = random_gpt2(n_layer=1)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    sampling = Sampling(max_new_tokens=1, num_samples=400)
    texts = generate(model, byte_tokenizer, "a", sampling)
    assert len(set(texts)) > 100


def test_end_of_document_ends_the_text(byte_tokenizer):
    model = random_gpt2(n_layer=1)
    with torch.no_grad():
        # Every position has the same hidden state, which points at the end-of-document embedding.
        model.transformer.ln_f.weight.zero_()
        model.lm_head.weight[byte_tokenizer.eod] = 5.0
        model.transformer.ln_f.bias.fill_(5.0)
    assert generate(model, byte_tokenizer, "a", Sampling(max_new_tokens=5)) == ["a"]


def test_ids_beyond_the_tokenizer_are_never_said(byte_tokenizer):
    model = random_gpt2(n_layer=1, vocab_size=400)
    with torch.no_grad():
        model.lm_head.weight[257:] = 0.0
        model.lm_head.weight[:257] = -1.0
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
    texts = generate(model, byte_tokenizer, "a", Sampling(max_new_tokens=5, num_samples=4))
    assert all(text.startswith("a") for text in texts)


def test_context_limit_is_named(gpt2, byte_tokenizer):
    generate(gpt2, byte_tokenizer, "a" * 10, Sampling(max_new_tokens=30, temperature=0))
    with pytest.raises(ConfigError, match=r"10 tokens.* 40 positions.*--max-new-tokens 30 or"):
        generate(gpt2, byte_tokenizer, "a" * 10, Sampling(max_new_tokens=31))
    with pytest.raises(ConfigError, match="40 positions of this model; shorten the prompt"):
        generate(gpt2, byte_tokenizer, "a" * 40, Sampling(max_new_tokens=1))


@pytest.mark.parametrize(
    ("fields", "flag"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens 0"),
        ({"temperature": -1.0}, "--temperature -1"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"temperature": 1e-300}, "--temperature 1e-300"),
        ({"num_samples": 10**8}, "--num-samples 100000000"),
        ({"seed": -1}, "--seed -1"),
        ({"seed": 2**64}, "--seed 18446744073709551616"),
        ({"top_k": -1}, "--top-k -1"),
        ({"top_p": 0.0}, "--top-p 0"),
        ({"top_p": 1.5}, "--top-p 1.5"),
        ({"num_samples": 0}, "--num-samples 0"),
        ({"num_samples": 2, "temperature": 0}, "--num-samples 2 with --temperature 0"),
    ],
)
def test_bad_sampling(fields, flag):
    with pytest.raises(ConfigError, match=flag):
        Sampling(**fields)
