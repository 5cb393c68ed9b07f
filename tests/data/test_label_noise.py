"""Label noise: how much, of what, and that nothing but seed and sample number decides it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_eslm.config.run import parse_run
from megatron_eslm.data.data_options import DataOptions
from megatron_eslm.data.label_noise import LabelNoise
from megatron_eslm.data.loader import build_loader
from megatron_eslm.data.mixture import Datasets, build_datasets
from megatron_eslm.data.source import open_data
from megatron_eslm.errors import ConfigError

T = 64
LABELS = torch.arange(1000, 1000 + T)
ALL = torch.ones(T, dtype=torch.bool)


def build(domains: list[str], share: float, *, seed: int = 1) -> Datasets:
    words = ("3", domains[0], "1", domains[1])
    options = DataOptions(data_path=words, split="80,20", label_noise=share)
    return build_datasets(
        open_data(options), options, seq_length=T, train_samples=48, valid_samples=4, seed=seed
    )


@pytest.mark.parametrize("share", [0.05, 0.25, 0.5, 1.0])
def test_the_share_of_targets_takes_another_target(share: float) -> None:
    before = LABELS.clone()
    for sample in range(20):
        noisy = LabelNoise(share=share, seed=3)(LABELS, ALL, sample)
        # All labels differ, so every one that was drawn differs from what it was.
        assert int((noisy != LABELS).sum()) == round(share * T)
        assert torch.equal(noisy.sort().values, LABELS)
    assert torch.equal(LABELS, before)


def test_places_are_spread_over_the_sequence() -> None:
    noise = LabelNoise(share=0.25, seed=3)
    hits_T = sum((noise(LABELS, ALL, sample) != LABELS).int() for sample in range(400))
    assert int(hits_T.min()) > 60 and int(hits_T.max()) < 140  # 100 on average, deviation 8.7


def test_labels_that_do_not_count_are_left_alone() -> None:
    valid = torch.arange(T) % 3 != 0
    noisy = LabelNoise(share=1.0, seed=3)(LABELS, valid, 0)
    assert torch.equal(noisy[~valid], LABELS[~valid])
    assert (noisy[valid] != LABELS[valid]).all()
    assert torch.equal(noisy[valid].sort().values, LABELS[valid])
    nothing = torch.zeros(T, dtype=torch.bool)
    assert torch.equal(LabelNoise(share=1.0, seed=3)(LABELS, nothing, 0), LABELS)


def test_seed_and_sample_decide() -> None:
    noisy = [LabelNoise(share=0.5, seed=s)(LABELS, ALL, i) for s in (1, 2) for i in (0, 1)]
    again = [LabelNoise(share=0.5, seed=s)(LABELS, ALL, i) for s in (1, 2) for i in (0, 1)]
    for i, a in enumerate(noisy):
        assert torch.equal(a, again[i])
        assert not any(torch.equal(a, b) for b in noisy[i + 1 :])


def test_training_has_noise_and_validation_has_none(domains: list[str]) -> None:
    noisy, clean = build(domains, 0.25), build(domains, 0.0)
    assert noisy.valid is not None
    assert "labels" not in clean.train[0] and "labels" not in noisy.valid[0]
    changed = 0
    for i in range(len(noisy.train)):
        item, plain = noisy.train[i], clean.train[i]
        assert torch.equal(item["tokens"], plain["tokens"])
        assert torch.equal(item["valid"], plain["valid"])
        assert torch.equal(item["labels"].sort().values, plain["tokens"][1:].sort().values)
        changed += int((item["labels"] != plain["tokens"][1:]).sum())
    # Characters repeat, so some of the targets are permuted with their like.
    assert 0.15 * T * 48 < changed <= 0.25 * T * 48
    other = build(domains, 0.25, seed=2)
    assert not torch.equal(other.train[0]["labels"], noisy.train[0]["labels"])


@pytest.mark.parametrize("dp_size", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 16])
def test_no_split_and_no_resume_changes_it(domains: list[str], dp_size: int, start: int) -> None:
    data = build(domains, 0.25).train
    for dp_rank in range(dp_size):
        loader = build_loader(
            data,
            start_sample=start,
            num_samples=32,
            micro_batch_size=8 // dp_size,
            dp_rank=dp_rank,
            dp_size=dp_size,
            num_workers=2 if dp_size == 2 else 0,
        )
        seen = 0
        for batch in loader:
            assert batch["labels"].shape == batch["valid"].shape
            for labels, sample in zip(batch["labels"], batch["samples"].tolist(), strict=True):
                assert torch.equal(labels, data[sample]["labels"])
                seen += 1
        assert seen == 32 // dp_size


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--label-noise", "1.5"], r"--label-noise 1.5 is outside \[0, 1\]"),
        (["--label-noise", "-0.1"], r"--label-noise -0.1 is outside \[0, 1\]"),
        (
            ["--label-noise", "0.02", "--seq-length", "64"],
            "--label-noise 0.02 of --seq-length 64 is less than two .* Use at least 0.0312",
        ),
        (
            ["--label-noise", "0.05", "--selection", "rho1", "--reference-losses", "self"],
            "--label-noise 0.05 with --reference-losses self: .* Use --reference",
        ),
    ],
)
def test_refusals(flags: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_run(["--model-size", "124M", *flags], 1)
