"""--last-mlp-backward: the same training, whatever the last MLP's backward pass runs over."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_eslm.config.run import parse_run
from megatron_eslm.cost.last_mlp import last_mlp_kept
from megatron_eslm.errors import ConfigError
from tests.harness import run_ranks

from .runs import ROWS, Outcome, assert_same_dumps, train, words

STEPS = ("--global-batch-size", 2 * ROWS, "--train-iters", 4, "--eslm-alpha", "0.3")
LAYOUTS = {
    "one": (1, ()),
    "checkpoints": (1, ("--activation-checkpoint-interval", "1")),
    "entropy": (1, ("--eslm-score", "entropy")),
    "tp2": (2, ("--tensor-model-parallel-size", "2")),
    "pp2": (2, ("--pipeline-model-parallel-size", "2")),
    "dp2 zero1": (2, ("--zero-stage", "1", "--micro-batch-size", str(ROWS // 2))),
    "dp2 zero2": (2, ("--zero-stage", "2", "--micro-batch-size", str(ROWS // 2))),
}


def test_kept_tokens_suffice_in_every_layout(data: list[str], tmp_path: Path) -> None:
    def run(name: str, over: str) -> Outcome:
        place = tmp_path / f"{name.replace(' ', '_')}-{over}"
        flags = (*LAYOUTS[name][1], "--last-mlp-backward", over, "--dump-selection", place)
        return train(words(data, *STEPS, *flags), place.with_suffix(".jsonl"))

    for ranks in (1, 2):
        names = [name for name, (size, _) in LAYOUTS.items() if size == ranks]

        def fn(rank: int, names: list[str] = names) -> dict[str, tuple[Outcome, Outcome]]:
            return {name: (run(name, "kept"), run(name, "all")) for name in names}

        for name, (kept, everything) in run_ranks(ranks, fn)[0].items():
            for column in ("loss", "grad_norm"):
                np.testing.assert_allclose(
                    kept.column(column), everything.column(column), rtol=1e-5, err_msg=name
                )
            place = tmp_path / name.replace(" ", "_")
            assert_same_dumps(Path(f"{place}-kept"), Path(f"{place}-all"))
            # It is counted, so it was on.
            assert kept.column("flops")[-1] < everything.column("flops")[-1], name


def resolved(*flags: str, device_type: str | None = "cpu") -> bool:
    run = parse_run(["--data-path", "x", "--model-size", "124M", *flags], 2)
    return last_mlp_kept(run, run.shape(50_257), device_type)


def test_auto_is_on_where_tokens_are_dropped_and_it_pays(monkeypatch) -> None:
    assert resolved("--eslm-alpha", "0.1")
    assert not resolved("--eslm-alpha", "0.01")
    assert not resolved("--eslm-alpha", "0.1", "--last-mlp-backward", "all")
    assert resolved("--eslm-alpha", "0.01", "--last-mlp-backward", "kept")
    for flags in (
        ("--selection", "clm"),
        ("--eslm-level", "instance"),
        ("--zero-stage", "3"),
        ("--lora-rank", "4", "--load", "w"),
        ("--selection", "greats"),
    ):
        assert not resolved(*flags), flags


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--selection", "clm"), " with --selection clm: all tokens"),
        (("--selection", "uncertainty", "--load", "w"), " with --selection uncertainty: all"),
        (("--zero-stage", "3"), ": --zero-stage 3 gathers"),
        (("--lora-rank", "4", "--load", "w"), ": --lora-rank trains adapters"),
        (("--tensor-model-parallel-size", "2", "--sequence-parallel"), ": --sequence-parallel"),
    ],
)
def test_kept_is_refused_where_it_cannot_be_had(flags, reason) -> None:
    with pytest.raises(ConfigError, match=f"--last-mlp-backward kept{reason}"):
        resolved(*flags, "--last-mlp-backward", "kept")


def test_auto_is_by_what_it_runs_on() -> None:
    assert resolved("--eslm-alpha", "0.2", device_type="cpu")
    assert not resolved("--eslm-alpha", "0.2", device_type="cuda")
    assert resolved("--eslm-alpha", "0.3", device_type="cuda")
