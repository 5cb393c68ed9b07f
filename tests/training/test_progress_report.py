"""The metrics file, the counts in it, and the monitors of DeepSpeed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megatron_eslm.config.run import parse_run
from megatron_eslm.errors import ConfigError
from megatron_eslm.ops.keep_rule import num_to_keep
from megatron_eslm.training.callbacks import Evaluator
from megatron_eslm.training.progress_report import MetricsFile, run_summary
from tests.harness import run_ranks

from .runs import Outcome, build, read_dumps, read_metrics, refusal, train, words

FIELDS = {
    "iteration", "loss", "valid_loss", "alpha", "kept_instances", "kept_tokens", "tau_instance",
    "tau_token", "cvar", "lr", "grad_norm", "tokens", "tokens_trained", "flops", "flops_paper",
    "flops_paper_micro_batch", "step_seconds", "mfu", "hfu", "nonfinite_steps",
    "valid_loss_by_domain", "batch_size", "consumed_samples",
}  # fmt: skip


def one(argv: list[str], metrics: Path) -> Outcome:
    return run_ranks(1, lambda rank: train(argv, metrics))[0]


def test_every_line_has_the_fields_of_the_design(data: list[str], tmp_path: Path) -> None:
    flags = ("--eval-interval", "2", "--dump-selection", tmp_path / "dump", "--peak-tflops", "1")
    outcome = one(words(data, *flags, iters=5), tmp_path / "a" / "m.jsonl")
    first, *lines = map(json.loads, (tmp_path / "a" / "m.jsonl").read_text().splitlines())
    assert first["run"]["selection"] == "eslm" and first["run"]["alpha"] == 0.1
    assert first["run"]["train_iters"] == 5 and first["run"]["data_parallel_size"] == 1
    assert all(line.keys() >= FIELDS for line in lines)
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3, 4, 5]
    start = lines[0]
    assert start["loss"] is None and start["tokens"] == 0 and start["flops"] == 0
    assert start["valid_loss"] == pytest.approx(math.log(257), abs=0.3)
    # At 0, every second step, and the last one always.
    assert [line["valid_loss"] is not None for line in lines] == [1, 0, 1, 0, 1, 1]
    for line in lines:
        if line["valid_loss"] is None:
            assert line["valid_loss_by_domain"] is None
        else:
            assert list(line["valid_loss_by_domain"]) == ["prose", "code"]
    for line, dump in zip(lines[1:], read_dumps(tmp_path / "dump").values(), strict=True):
        assert line["loss"] == pytest.approx(float(dump["loss"]))
        assert dump["tau_instance"] == pytest.approx(line["tau_instance"])
        kept = dump["instance_kept"]
        assert dump["tau_token"][kept] == pytest.approx(line["tau_token"])
        assert (line["batch_size"], line["batch_size_trained"]) == (8, 7) and kept.sum() == 7
        assert line["cvar"] > line["tau_token"]
        assert line["step_seconds"] > 0 and line["hfu"] > 0 and line["mfu"] > 0
    assert outcome.column("loss")[0] > outcome.column("loss")[-1]


def test_the_first_line_says_whatever_is_unlike_the_default(data: list[str]) -> None:
    def summary(*flags: str) -> dict:
        return run_summary(parse_run(words(data, *flags), 1))

    plain = summary()
    assert not {"eslm_adaptive", "label_noise", "eslm_scope"} & plain.keys()
    assert plain["lr"] == 5e-3 and plain["init_method_std"] == 0.1
    flags = ("--eslm-adaptive", "--label-noise", "0.05", "--eslm-scope", "local")
    other = summary(*flags, "--lr-warmup-iters", "2")
    assert other["eslm_adaptive"] is True and other["label_noise"] == 0.05
    assert "save" not in plain and summary("--save", "a")["save"] == "a"
    assert summary("--save", "a", "--load", "b")["load"] == "b"
    assert "load" not in summary("--save", "a", "--load", "a")
    assert "load" not in summary("--save", "a", "--load", "a/")
    assert other["eslm_scope"] == "local" and other["lr_warmup_iters"] == 2
    assert plain["lr_warmup_iters"] != 2
    assert json.loads(json.dumps(other)) == other
    ramp = summary("--rampup-batch-size", "8", "8", "64", "--global-batch-size", "16")
    assert ramp["rampup_batch_size"] == "8 8 64" and "rampup_batch_size" not in plain
    assert summary("--skip-samples", "1:2", "7:9")["skip_samples"] == "1:2 7:9"
    # Equal numbers make no other method of a run, however they are typed.
    equal = ("--data-path", "3", data[0], "2e0", data[1], "--split", "0.98,0.01,0.01")
    assert summary(*equal) == plain == {**plain, "data_path": f"3 {data[0]} 2 {data[1]}"}
    assert summary("--split", "0.8,.1,.1")["split"] == "8,1,1"


POLICIES = {
    # selection and what goes with it: alpha, score, level, proxy_layers
    ("--selection", "clm", "--eslm-alpha", "0.2"): (0.0, None, None, None),
    ("--selection", "eslm"): (0.1, "loss", "both", 1),
    ("--eslm-score", "entropy", "--eslm-proxy-layers", "2"): (0.1, "entropy", "both", 2),
    ("--eslm-level", "instance"): (0.1, "loss", "instance", 1),
    ("--eslm-level", "token"): (0.1, "loss", "token", None),
    ("--selection", "random"): (0.1, None, "both", None),
    ("--selection", "random", "--eslm-level", "token"): (0.1, None, "token", None),
    ("--selection", "rho1", "--reference-losses", "self"): (0.1, None, "token", None),
    ("--selection", "greats"): (0.1, None, "instance", None),
    ("--selection", "uncertainty", "--load", "a"): (0.75, None, "token", None),
}


@pytest.mark.parametrize("flags", POLICIES, ids=" ".join)
def test_the_first_line_says_what_a_policy_does(data: list[str], flags: tuple[str, ...]) -> None:
    def summary(*more: str) -> dict:
        return run_summary(parse_run(words(data, *flags, *more), 1))

    plain = summary()
    names = ("alpha", "score", "level", "proxy_layers")
    assert tuple(plain[name] for name in names) == POLICIES[flags]
    name = plain["selection"]
    # What has no effect makes no other method of a run; what has one does.
    for more, effective in (
        (("--eslm-gamma", "0.7", "--eslm-adapt-interval", "7"), False),
        (("--eslm-alpha-min", "0.02"), False),
        (("--greats-valid-share", "0.25"), name == "greats"),
        (("--uncertainty-quantile", "0.5"), name == "uncertainty"),
        (("--eslm-start-iter", "1"), name != "clm"),
        (("--eslm-scope", "local"), name not in ("clm", "greats")),
        (("--eslm-proxy-stride", "2"), plain["proxy_layers"] is not None),
        (("--max-nonfinite-steps", "3"), True),
    ):
        assert (summary(*more) != plain) == effective, more


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("level", "alpha", "rows", "tokens"),
    [
        ("both", 0.1, 7, num_to_keep(7 * 32, 0.1)),
        ("both", 0.5, 4, 64),
        ("instance", 0.25, 6, 6 * 32),
        ("token", 0.25, 8, 192),
    ],
)
def test_counts_are_what_the_keep_rule_says(
    data: list[str], tmp_path: Path, world: int, level: str, alpha: float, rows: int, tokens: int
) -> None:
    def fn(rank: int) -> Outcome:
        argv = words(
            data,
            *("--eslm-level", level, "--eslm-alpha", alpha, "--global-batch-size", 16),
            iters=2,
            micro_batch_size=8 // world,
        )
        return train(argv, tmp_path / "m.jsonl")

    outcome = run_ranks(world, fn)[0]
    # Two steps of two micro-steps, each a global micro-batch of 8 rows of 32 tokens.
    assert outcome.column("tokens") == [2 * 256, 4 * 256]
    assert outcome.column("tokens_trained") == [2 * tokens, 4 * tokens]
    assert outcome.column("kept_instances") == [rows / 8] * 2
    assert outcome.column("kept_tokens") == [tokens / (rows * 32)] * 2
    assert outcome.column("alpha") == [alpha] * 2


def test_masked_labels_count_as_not_read(data: list[str], tmp_path: Path) -> None:
    flags = ("--eod-mask-loss", "--dump-selection", tmp_path / "dump", "--selection", "clm")
    outcome = one(words(data, *flags), tmp_path / "m.jsonl")
    dumps = read_dumps(tmp_path / "dump").values()
    # The label after an end-of-document (id 256) is masked out.
    valid = [int((dump["tokens"][:, :-1] != 256).sum()) for dump in dumps]
    assert sum(valid) < 4 * 256
    assert outcome.column("tokens") == [sum(valid[: i + 1]) for i in range(4)]
    assert outcome.column("tokens_trained") == outcome.column("tokens")
    for dump in dumps:
        assert not dump["token_kept"][dump["tokens"][:, :-1] == 256].any()


def test_validation_loss_does_not_depend_on_the_split_of_its_batches(
    data: list[str], tmp_path: Path
) -> None:
    """The validation set need not divide into micro-batches; every token counts once."""
    losses = []
    for world, rows in ((1, 8), (1, 3), (2, 5)):

        def fn(rank: int, rows: int = rows) -> tuple[float, int]:
            flags = ("--split", "90,10,0", "--eval-iters", "1000")
            trainer = build(words(data, *flags, micro_batch_size=rows))
            assert trainer.datasets.valid is not None
            return Evaluator().evaluate(trainer).loss, len(trainer.datasets.valid)

        losses.append(run_ranks(world, fn)[0])
    assert len({samples for _, samples in losses}) == 1
    assert losses[0][1] % 3 and losses[0][1] % 10
    assert losses[1][0] == pytest.approx(losses[0][0], abs=1e-6)
    assert losses[2][0] == pytest.approx(losses[0][0], abs=1e-6)


def test_without_evaluation(data: list[str], tmp_path: Path) -> None:
    """What the error about a validation split too small offers: --eval-iters 0."""
    outcome = one(
        words(data, "--eval-iters", "0", "--split", "100,0,0", iters=2), tmp_path / "m.jsonl"
    )
    assert [line["iteration"] for line in outcome.steps] == [1, 2]
    assert outcome.valid_losses() == []


def test_log_interval(data: list[str], tmp_path: Path) -> None:
    flags = ("--log-interval", "3", "--eval-interval", "4")
    outcome = one(words(data, *flags, iters=7), tmp_path / "m.jsonl")
    assert [line["iteration"] for line in outcome.steps] == [0, 3, 4, 6, 7]


def test_an_existing_metrics_file_is_not_written_over(data: list[str], tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    file.write_text("{}\n")

    def fn(rank: int) -> list[str]:
        taken = refusal(words(data, "--metrics-file", file, micro_batch_size=4))
        (tmp_path / "plain").write_text("") if rank == 0 else None
        under = tmp_path / "plain" / "m.jsonl"
        return [taken, refusal(words(data, "--metrics-file", under, micro_batch_size=4))]

    texts = run_ranks(2, fn)
    assert texts[0] == texts[1]
    taken, under = texts[0]
    assert f"--metrics-file {file} exists, but this run does not continue another (--load)" in taken
    assert "Name another file or remove it" in taken
    assert "--metrics-file" in under and "plain/m.jsonl:" in under
    assert file.read_text() == "{}\n"


def test_metrics_of_a_start_that_saved_nothing_are_set_aside(
    data: list[str], tmp_path: Path
) -> None:
    """A requeued job that was killed before its first checkpoint begins again."""
    file = tmp_path / "m.jsonl"
    file.write_text('{"iteration": 3}\n')
    folder = ("--save", tmp_path / "run", "--load", tmp_path / "run")
    outcome = one(words(data, *folder, iters=3), file)
    assert [line["iteration"] for line in outcome.steps] == [0, 1, 2, 3]
    assert (tmp_path / "m.jsonl.abandoned").read_text() == '{"iteration": 3}\n'


def test_a_resumed_run_appends_also_after_a_torn_line(tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    MetricsFile(str(file), {"a": 1}, resumed=False).close()
    file.open("a").write('{"iteration": 3, "lo')
    again = MetricsFile(str(file), {"a": 2}, resumed=True)
    again.write({"iteration": 3, "loss": math.inf, "valid_loss": math.nan})
    again.close()
    first, torn, second, last = file.read_text().splitlines()
    assert (json.loads(first), json.loads(second)) == ({"run": {"a": 1}}, {"run": {"a": 2}})
    assert torn == '{"iteration": 3, "lo'
    line = json.loads(last)
    assert line["loss"] is None and math.isnan(line["valid_loss"])
    with pytest.raises(ConfigError, match="does not continue another"):
        MetricsFile(str(file), {}, resumed=False)


def test_deepspeeds_monitors_get_the_same_numbers(data: list[str], tmp_path: Path) -> None:
    config = tmp_path / "ds.json"
    monitor = {"enabled": True, "output_path": str(tmp_path / "csv"), "job_name": "job"}
    config.write_text(json.dumps({"csv_monitor": monitor}))
    argv = words(data, "--deepspeed_config", config)
    outcome = one(argv, tmp_path / "m.jsonl")
    rows = (tmp_path / "csv" / "job" / "Train_loss.csv").read_text().splitlines()
    losses = {int(step): float(value) for step, value in (r.split(",") for r in rows[1:])}
    assert losses == pytest.approx(dict(enumerate(outcome.column("loss"), start=1)))
    by_domain = tmp_path / "csv" / "job" / "Train_valid_loss_by_domain_code.csv"
    last = by_domain.read_text().splitlines()[-1].split(",")
    assert float(last[1]) == pytest.approx(outcome.steps[-1]["valid_loss_by_domain"]["code"])


def test_dumps_have_the_fields_of_the_design(data: list[str], tmp_path: Path) -> None:
    import numpy as np

    flags = ("--dump-selection", tmp_path / "dump", "--eslm-alpha", "0.3")
    steps = ("--global-batch-size", "16", "--skip-samples", "3:5")
    one(words(data, *flags, *steps, iters=2, micro_batch_size=4), tmp_path / "m.jsonl")
    dumps = read_dumps(tmp_path / "dump")
    assert list(dumps) == [f"iter{i:07d}.npz" for i in (1, 2)]
    for dump in dumps.values():
        shapes = {key: value.shape for key, value in dump.items()}
        assert shapes == {
            "samples": (16,),
            "tokens": (16, 33),
            "instance_scores": (16,),
            "instance_kept": (16,),
            "token_scores": (16, 32),
            "token_kept": (16, 32),
            "tau_instance": (16,),
            "tau_token": (16,),
            "loss": (),
        }
        kept, scores = dump["instance_kept"], dump["instance_scores"]
        assert kept.sum() == 12  # 3 of 4 micro-steps
        assert (dump["tau_instance"] == scores[kept].min()).all()
        assert scores[kept].min() >= scores[~kept].max()
        assert np.isnan(dump["token_scores"][~kept]).all()
        assert not dump["token_kept"][~kept].any()
        assert np.isnan(dump["tau_token"][~kept]).all()
        means = []
        for rows in kept.nonzero()[0].reshape(3, 4):  # each micro-step has a threshold of its own
            chosen = dump["token_scores"][rows][dump["token_kept"][rows]]
            assert len(chosen) == int(0.7 * 4 * 32)
            assert (dump["tau_token"][rows] == chosen.min()).all()
            means.append(chosen.mean())
        assert dump["loss"] == pytest.approx(np.mean(means), rel=1e-5)
    assert dumps["iter0000001.npz"]["samples"].tolist() == [0, 1, 2, *range(5, 18)]


def test_nowhere_to_dump(data: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    argv = words(data, "--dump-selection", tmp_path / "file" / "dump", micro_batch_size=4)
    for text in run_ranks(2, lambda rank: refusal(argv)):
        assert f"--dump-selection {tmp_path / 'file' / 'dump'} cannot be written" in text
        assert "Name another folder" in text


def test_only_rank_zero_writes(data: list[str], tmp_path: Path) -> None:
    def fn(rank: int) -> bool:
        argv = words(data, "--metrics-file", tmp_path / "m.jsonl", micro_batch_size=4, iters=2)
        return build(argv).outputs.metrics is not None

    assert run_ranks(2, fn) == [True, False]
    assert read_metrics(tmp_path / "m.jsonl") == []
