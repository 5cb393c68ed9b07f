"""tools/score_reference.py: what it computes, when it is killed, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_eslm.checkpoint.weights import write_weights
from megatron_eslm.data.index_file import read_index
from megatron_eslm.data.preprocess import preprocess
from megatron_eslm.data.reference_losses import losses_path
from megatron_eslm.data.tokenizers.build import ByteTokenizer, HuggingFaceTokenizer
from megatron_eslm.data.tokenizers.train_bpe import train_bpe
from megatron_eslm.frozen import score as scoring
from megatron_eslm.frozen.reference import ReferenceModel, find_reference, load_reference
from megatron_eslm.frozen.score import Window, windows
from megatron_eslm.interop.huggingface import export
from megatron_eslm.launch.bootstrap import single_process
from megatron_eslm.model.arithmetic import forward_flops
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.parallel.mesh import build_mesh

from ..argv import later_wins
from ..interop.conftest import load_tool
from ..model.reference import Config, losses_and_entropies
from ..model.small import small_gpt

T = 16
SHAPE = ModelShape(
    num_layers=2,
    hidden_size=24,
    num_attention_heads=2,
    ffn_hidden_size=40,
    max_position_embeddings=T,
    vocab_size=257,
    padded_vocab_size=384,
)
CONFIG = Config(num_layers=2, num_heads=2, vocab_size=257)
EOD = 256


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    with single_process():
        model, _ = small_gpt(selection="clm", shape=SHAPE)
    return {name: x.detach().clone() for name, x in model.named_parameters()}


@pytest.fixture
def checkpoint(tmp_path: Path, weights: dict[str, torch.Tensor]) -> Path:
    ByteTokenizer().save(tmp_path / "tokenizer")
    write_weights(tmp_path / "reference", weights, SHAPE, tmp_path / "tokenizer", "test")
    return tmp_path / "reference"


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """Documents shorter than a window, as long as one or two with their end, and longer."""
    texts = ["a", "fifteen letters", "sixteen letters!", "thirty-one letters, end included"[:31]]
    texts += [f"{n} " + "the riskiest token is kept " * (n % 4) for n in range(12)]
    preprocess(["text"], str(tmp_path / "text"), ByteTokenizer(), documents=texts)
    return str(tmp_path / "text")


def explicit(prefix: str, weights: dict[str, torch.Tensor]) -> np.ndarray:
    """The losses by their definition: one window alone, full logits, float64."""
    double = {name: x.double() for name, x in weights.items()}
    index, losses, begin = read_index(prefix), [], 0
    for length in index.lengths.tolist():
        document = [EOD, *index.ids()[begin : begin + length].tolist()]
        for first in range(0, length, T):
            tokens = torch.tensor(document[first : first + T + 1])
            losses += losses_and_entropies(tokens, double, CONFIG, 2)[0].tolist()
        begin += length
    return np.array(losses)


def run_tool(*argv: str | int | Path) -> int:
    return load_tool("score_reference").main(later_wins(map(str, argv)))


def arguments(checkpoint: Path, prefix: str, *more: str | int) -> list[str | int | Path]:
    start = ["--load", checkpoint, "--data-path", prefix, "--name", "self", "--seq-length", T]
    return [*start, "--batch-size", 3, *more]


def test_every_token_has_the_loss_of_its_window(
    checkpoint: Path, prefix: str, weights: dict, capsys: pytest.CaptureFixture
) -> None:
    assert run_tool(*arguments(checkpoint, prefix)) == 0
    losses, expected = np.load(losses_path(prefix, "self")), explicit(prefix, weights)
    assert losses.shape == expected.shape
    np.testing.assert_allclose(losses, expected, rtol=2**-11, atol=2e-5)  # float16's rounding
    said = capsys.readouterr().out
    assert f"{len(losses)} tokens scored now, mean loss {expected.mean():.4f} nats" in said
    assert "FLOPs, which no training run counts" in said


def test_a_hugging_face_folder_gives_the_same(
    checkpoint: Path, prefix: str, weights: dict, tmp_path: Path
) -> None:
    train_bpe(["the riskiest token is kept"] * 3, 257, tmp_path / "bpe.json")
    tokenizer = HuggingFaceTokenizer(tmp_path / "bpe.json")
    text = str(tmp_path / "bpe-text")
    preprocess(["text"], text, tokenizer, documents=["the riskiest token", "is kept " * 9])
    shape = dataclasses.replace(SHAPE, vocab_size=tokenizer.vocab_size)
    tokenizer.save(tmp_path / "bpe-tokenizer")
    write_weights(tmp_path / "ours", weights, shape, tmp_path / "bpe-tokenizer", "test")
    export(tmp_path / "theirs", weights, shape, tokenizer)
    for name in ("ours", "theirs"):
        words = ("--data-path", text, "--name", name, "--seq-length", T)
        assert run_tool("--load", tmp_path / name, *words) == 0
    a, b = (losses_path(text, name) for name in ("ours", "theirs"))
    assert a.read_bytes() == b.read_bytes()
    facts = [json.loads(path.with_suffix(".json").read_text()) for path in (a, b)]
    assert facts[0]["weights"] == facts[1]["weights"]


class Killed(BaseException):
    pass


def test_killed_in_the_middle_it_goes_on(
    checkpoint: Path, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "_BATCHES_A_CHUNK", 2)
    assert run_tool(*arguments(checkpoint, prefix)) == 0
    path, ordinary = losses_path(prefix, "self"), scoring._score
    whole = path.read_bytes()
    seen: list[list[Window]] = []  # in each forward pass
    kill_at = 0

    def score(model, ids, batch, eod):
        seen.append(batch)
        if len(seen) == kill_at:
            raise Killed
        return ordinary(model, ids, batch, eod)

    monkeypatch.setattr(scoring, "_score", score)
    for kill_at in (2, 3, 6):
        seen.clear()
        with pytest.raises(Killed):
            run_tool(*arguments(checkpoint, prefix), "--overwrite")
        facts = json.loads(path.with_suffix(".json").read_text())
        assert facts["scored"] < facts["tokens"]
        assert (facts["scored"] > 0) == (kill_at > 2)
        seen.clear()
        kill_at = 0
        # What is there is not taken for losses of another kind.
        assert run_tool(*arguments(checkpoint, prefix), "--dtype", "bfloat16") == 2
        assert run_tool(*arguments(checkpoint, prefix)) == 0
        assert min(window.begin for batch in seen for window in batch) == facts["scored"]
        assert path.read_bytes() == whole


def test_windows_cover_every_token_once(prefix: str) -> None:
    index = read_index(prefix)
    everything = list(windows(index, T))
    places = [i for w in everything for i in range(w.begin, w.end)]
    assert places == list(range(index.tokens))
    starts = np.cumsum(index.lengths) - index.lengths
    assert [w.begin for w in everything if w.starts_document] == starts.tolist()
    assert max(w.end - w.begin for w in everything) == T
    for i, window in enumerate(everything):
        assert list(windows(index, T, window.begin)) == everything[i:]
    assert list(windows(index, T, index.tokens)) == []


def opened(folder: Path) -> ReferenceModel:
    source, cpu = find_reference("--load", str(folder), ByteTokenizer()), torch.device("cpu")
    model = load_reference(source, build_mesh(), cpu, torch.float32)
    assert model is not None
    return model


def test_flops_are_those_of_the_products_that_run(checkpoint: Path) -> None:
    with single_process():
        model = opened(checkpoint)
        tokens, wanted = torch.zeros(3, T + 1, dtype=torch.int64), torch.ones(3, T).bool()
        wanted[:, 5:] = False
        # The fused kernel for CPUs is not among those that it counts.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model.losses(tokens, tokens[:, 1:], wanted)
    expected = forward_flops(SHAPE, positions=3 * T, length=T, scored=15)
    assert counter.get_total_flops() == expected


def test_the_fingerprint_is_of_the_weights(checkpoint: Path, weights: dict, tmp_path: Path) -> None:
    def fingerprint(name: str, shape: ModelShape, **changes: torch.Tensor) -> str:
        ours = {**weights, **changes}
        write_weights(tmp_path / name, ours, shape, tmp_path / "tokenizer", "test")
        with single_process():
            return opened(tmp_path / name).fingerprint()

    with single_process():
        expected = opened(checkpoint).fingerprint()
    padding = torch.zeros(128, 24)
    more = torch.cat([weights["embedding.word.weight"], padding])
    wide = dataclasses.replace(SHAPE, padded_vocab_size=512)
    assert fingerprint("wide", wide, **{"embedding.word.weight": more}) == expected
    moved = weights["blocks.1.mlp.up.bias"].clone()
    moved[3] += 1e-6
    assert fingerprint("moved", SHAPE, **{"blocks.1.mlp.up.bias": moved}) != expected


def test_what_cannot_be_scored_is_refused(
    checkpoint: Path, prefix: str, weights: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def refusal(*argv: str | int | Path) -> str:
        assert run_tool(*argv) == 2
        return capsys.readouterr().err

    assert "--name 'a/b' becomes a part" in refusal(*arguments(checkpoint, prefix, "--name", "a/b"))
    assert "--seq-length 17 is more than the 16 positions" in refusal(
        *arguments(checkpoint, prefix, "--seq-length", T + 1)
    )
    assert "must be 1 or more" in refusal(*arguments(checkpoint, prefix, "--batch-size", 0))
    assert "cannot be used as a reference model" in refusal(*arguments(tmp_path / "none", prefix))
    assert "there is no file" in refusal(*arguments(checkpoint, prefix + "x"))
    other = dataclasses.replace(SHAPE, vocab_size=300)
    write_weights(tmp_path / "other", weights, other, tmp_path / "tokenizer", "test")
    assert "has a vocabulary of 300, but the data has one of 257" in refusal(
        *arguments(tmp_path / "other", prefix)
    )
    write_weights(tmp_path / "bare", weights, SHAPE, None, "test")
    assert "holds no tokenizer" in refusal(*arguments(tmp_path / "bare", prefix))
    assert not losses_path(prefix, "self").exists()

    assert run_tool(*arguments(checkpoint, prefix)) == 0
    moved = {**weights, "final_norm.bias": weights["final_norm.bias"] + 1}
    write_weights(tmp_path / "moved", moved, SHAPE, tmp_path / "tokenizer", "test")
    message = refusal(*arguments(tmp_path / "moved", prefix))
    assert "holds losses from another source (weights: " in message and "--overwrite" in message
    assert run_tool(*arguments(tmp_path / "moved", prefix, "--overwrite")) == 0
    broken = {**weights, "final_norm.bias": weights["final_norm.bias"] + 3e38}
    write_weights(tmp_path / "broken", broken, SHAPE, tmp_path / "tokenizer", "test")
    assert "not finite, at token 0" in refusal(
        *arguments(tmp_path / "broken", prefix, "--overwrite")
    )
