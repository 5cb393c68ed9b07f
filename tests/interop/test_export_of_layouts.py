"""A checkpoint exports to the same Hugging Face model whatever layout it was saved in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_eslm.data.preprocess import preprocess
from megatron_eslm.data.tokenizers.build import ByteTokenizer
from megatron_eslm.interop.convert import checkpoint_to_folder, folder_to_checkpoint
from megatron_eslm.model.hf.folder import load_hf
from megatron_eslm.training.callbacks import Checkpointer
from tests.harness import run_ranks
from tests.training.runs import ROWS, build, train, words

TP2PP2 = (
    *("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"),
    *("--zero-stage", "1", "--sequence-parallel"),
)
STEPS = (
    *("--num-layers", "4", "--global-batch-size", 2 * ROWS),
    *("--eslm-alpha", "0.3", "--eslm-scope", "step"),
)


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """Two small domains."""
    prefixes = []
    for name in ("one", "two"):
        texts = [f"{name} {i} of {i * i} words, and {name} again. " * 4 for i in range(120)]
        prefixes.append(str(tmp_path / name))
        preprocess([name], prefixes[-1], ByteTokenizer(), documents=texts)
    return prefixes


BLOCKS = {
    "gpt2": (),
    "llama": (
        *("--architecture", "llama", "--num-attention-heads", "4", "--num-query-groups", "2"),
        "--untie-embeddings-and-output-weights",
    ),
}


@pytest.mark.parametrize("architecture", BLOCKS)
def test_tensor_and_pipeline_parallel_export_as_the_single_process(
    data: list[str], tmp_path: Path, architecture: str
) -> None:
    def on_rank(rank: int, name: str, flags: tuple[str, ...]) -> None:
        flags += BLOCKS[architecture]
        train(words(data, *STEPS, *flags, "--save", tmp_path / name))

    def passes_through(rank: int) -> None:
        flags = (*BLOCKS[architecture], "--load", tmp_path / "3d", "--save", tmp_path / "1d")
        trainer = build(words(data, *STEPS, *flags, "--train-iters", 9))
        Checkpointer().save(trainer)

    def reads_longer_sequences(rank: int) -> None:
        # Rotary positions have no weights; the imported model may read other lengths.
        flags = (*BLOCKS["llama"], "--seq-length", 64, "--rotary-scaling", "linear")
        longer = ("--rotary-scaling-factor", 2, "--load", tmp_path / "3d", "--finetune")
        build(words(data, *STEPS, *flags, *longer))

    run_ranks(4, on_rank, "3d", TP2PP2)
    run_ranks(1, on_rank, "single", ())
    run_ranks(1, passes_through)
    for name in ("3d", "single", "1d"):
        difference = checkpoint_to_folder(str(tmp_path / name), str(tmp_path / f"hf-{name}"))
        assert difference < 1e-4

    if architecture == "llama":
        run_ranks(1, reads_longer_sequences)

    def exported(name: str) -> bytes:
        return (tmp_path / f"hf-{name}" / "model.safetensors").read_bytes()

    assert exported("1d") == exported("3d")
    folder_to_checkpoint(str(tmp_path / "hf-3d"), str(tmp_path / "imported"))
    checkpoint_to_folder(str(tmp_path / "imported"), str(tmp_path / "hf-imported"))
    assert exported("imported") == exported("3d")
    config = "config.json"
    assert (tmp_path / "hf-3d" / config).read_text() == (
        tmp_path / "hf-single" / config
    ).read_text()
    # Logits, not weights: the gradient of a key's bias is nothing but rounding, and Adam takes full
    # steps along it.
    tokens = torch.randint(257, (4, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (
            load_hf(tmp_path / f"hf-{name}").eval()(tokens).logits for name in ("3d", "single")
        )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
