"""A run with files of their own for validation and test: losses, resumes, the dry run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_eslm.config.run import parse_run
from megatron_eslm.reports.runs import read_run
from megatron_eslm.training.dry_run import dry_run
from tests.harness import run_ranks

from .conftest import make_domain
from .runs import MODEL, refusal, train


def test_losses_of_the_files_and_resumes(data: list[str], tmp_path: Path) -> None:
    news, tales = (
        make_domain(tmp_path / n, "prose", 60, s) for s, n in enumerate(("news", "tales"))
    )
    twin = make_domain(tmp_path / "twin", "prose", 60)  # the text of news
    mixture = ("1", data[0], "2", data[1])
    start = (*MODEL, "--micro-batch-size", "8", "--selection", "clm", "--train-data-path", *mixture)
    both = ("--valid-data-path", "1", news, "1", tales)

    def argv(*flags: str | Path) -> list[str]:
        return [*start, *map(str, flags)]

    def fn(rank: int) -> dict[str, object]:
        save = ("--save", tmp_path / "run", "--train-iters", "2")
        first = train(argv(*both, *save, "--test-data-path", twin), tmp_path / "first.jsonl")
        again = (*save[:2], "--load", tmp_path / "run", "--train-iters", "3")
        other = refusal(argv("--valid-data-path", tales, *again))
        swapped = train(
            argv(
                "--valid-data-path", news, "--test-data-path", tales, *again, "--allow-data-change"
            ),
            tmp_path / "swapped.jsonl",
        )
        alone = argv("--valid-data-path", news, "--train-iters", "2")
        found = train(alone, tmp_path / "alone.jsonl")
        text, refused = dry_run(parse_run(argv(*both, "--train-iters", "2", "--dry-run"), 1))
        return {
            "first": first,
            "other": other,
            "swapped": swapped,
            "alone": found,
            "text": text,
            "refused": refused,
            "unread": refusal(argv(*both, "--eval-iters", "0", "--train-iters", "2")),
            "none": refusal(argv("--train-iters", "2")),
            "greats": refusal(
                argv("--selection", "greats", "--eval-iters", "0", "--train-iters", "2")
            ),
        }

    found = run_ranks(1, fn)[0]
    first, alone, swapped = found["first"], found["alone"], found["swapped"]
    assert {tuple(line["valid_loss_by_domain"]) for line in first.steps} == {("news", "tales")}
    # Validation data change nothing about training, and the test set is one of validation.
    assert first.column("loss") == alone.column("loss")
    assert [line.get("test_loss") for line in first.steps] == [
        None, None, pytest.approx(alone.steps[-1]["valid_loss"], abs=1e-5)
    ]  # fmt: skip
    assert list(first.steps[-1]["test_loss_by_domain"]) == ["twin"]
    assert "validation: {'fingerprint': " in found["other"]
    assert "--allow-data-change" in found["other"] and "epochs" not in found["other"]
    assert list(swapped.steps[-1]["valid_loss_by_domain"]) == ["news"]
    assert list(swapped.steps[-1]["test_loss_by_domain"]) == ["tales"]
    assert found["refused"] is None
    assert "16 sequences per evaluation of news, tales" in found["text"]
    assert "domain code " in found["text"] and "domain news" not in found["text"]
    assert "--valid-data-path is not read with --eval-iters 0" in found["unread"]
    assert "or set --eval-iters 0" in found["none"] and "selection needs" in found["greats"]
    assert read_run(tmp_path / "first.jsonl").last("test_loss") == first.steps[-1]["test_loss"]
    run = json.loads((tmp_path / "first.jsonl").read_text().splitlines()[0])["run"]
    assert run["train_data_path"] == f"1 {data[0]} 2 {data[1]}"
    assert run["test_data_path"] == twin and "data_path" not in run and "split" not in run
