"""The position is consumed samples: whatever changes at a resume, nothing is read twice."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_eslm.checkpoint.find import find_checkpoint
from megatron_eslm.checkpoint.optimizer_state import OptimizerState
from megatron_eslm.checkpoint.weights import read_weights
from megatron_eslm.config.run import parse_run
from megatron_eslm.errors import ConfigError
from megatron_eslm.launch.bootstrap import init_distributed
from megatron_eslm.training.dry_run import dry_run
from megatron_eslm.training.loop import Trainer
from tests.harness import run_ranks

from .conftest import make_domain
from .runs import build, read_dumps, refusal, train, words


def read_by(argv: list[str], metrics: Path | None = None) -> list[int]:
    """Train; the numbers of the samples that all ranks read, in order."""
    mine: list[torch.Tensor] = []

    trainers: list[Trainer] = []

    def prepare(trainer: Trainer) -> None:
        trainers.append(trainer)
        trainer.nonfinite.note = lambda record, samples_M: mine.append(torch.tensor(samples_M))

    train(argv, metrics, prepare)
    # DeepSpeed's own monitors count with it.
    assert trainers[0].engine.ds.global_samples == trainers[0].state.consumed_samples
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return [int(i) for micro_step in zip(*everyone, strict=True) for i in torch.cat(micro_step)]


def logged(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


def test_another_batch_size_goes_on_where_reading_stopped(data: list[str], tmp_path: Path) -> None:
    """Global, micro- and data-parallel batch size change with consent; 48 samples were read."""
    run = ("--save", tmp_path / "run")

    def one(rank: int) -> dict[str, list[int]]:
        read = {"first": read_by(words(data, *run, iters=6))}
        load = ("--load", tmp_path / "run", "--allow-data-change")
        for size in (4, 16):
            argv = words(data, *load, iters=8, micro_batch_size=size)
            read[f"{size}"] = read_by(argv)
        argv = words(data, *load, "--global-batch-size", 15, iters=8, micro_batch_size=5)
        return {**read, "micro": read_by(argv)}

    read = run_ranks(1, one)[0]
    assert read == {
        "first": list(range(48)),
        "4": list(range(48, 56)),
        "16": list(range(48, 80)),
        "micro": list(range(48, 78)),
    }

    def two(rank: int) -> list[int]:
        load = ("--load", tmp_path / "run", "--save", tmp_path / "two", "--allow-data-change")
        return read_by(words(data, *load, iters=7, micro_batch_size=3))

    assert run_ranks(2, two) == [list(range(48, 54))] * 2
    assert find_checkpoint(tmp_path / "two").state().consumed_samples == 54


def test_what_a_run_reads_is_what_was_read_and_what_is_left(
    data: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """For --max-epochs and --dry-run: 60 steps of 8 were read, 15 of 16 are left."""
    short = [make_domain(tmp_path / name, name, 100) for name in ("prose", "code")]
    load = ("--load", tmp_path / "run", "--save", tmp_path / "run", "--allow-data-change")

    def fn(rank: int) -> tuple[str, str, ConfigError | None, str, list[int]]:
        straight = words(short, "--selection", "clm", "--eval-iters", 0, "--save-interval", 60)
        train([*straight, "--save", str(tmp_path / "run"), "--train-iters", "60"])
        longer = words(short, *load, "--selection", "clm", iters=75, micro_batch_size=16)
        init_distributed()
        text, refused = dry_run(parse_run([*longer, "--dry-run"], 1))
        more = refusal([*longer, "--train-iters", "200"])
        with caplog.at_level(logging.INFO):
            other_order = read_by([*longer, "--seed", "7", "--train-iters", "61"])
        return text, more, refused, logged(caplog), other_order

    text, more, refused, log, other_order = run_ranks(1, fn)[0]
    samples = 60 * 8 + 15 * 16
    assert "steps                75 (60 of them done)" in text and refused is None
    assert f"tokens read          {samples * 32:,}\n" in text
    assert f"tokens trained on    {samples * 32:,} (100.0%)" in text
    assert "reading continues    with sample 480" in text
    # 60 x 8 + 140 x 16 are 2720 samples, of which the weights give code 1088.
    assert "--max-epochs 1 allows" in more and "(1088 sequences" in more
    (line,) = [line for line in log.splitlines() if "--allow-data-change: " in line]
    assert "seed: 1234 there, 7 here" in line and "global_batch_size: 8 there, 16 here" in line
    assert (
        "reading continues with sample 480 of the new order, whose samples may have been " in line
    )
    assert other_order == list(range(480, 496))


def test_skipped_samples(data: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Recorded, carried on, joined with more, and the resumed run is the straight one."""
    flags = ("--skip-samples", "10:13", "40:45")

    def fn(rank: int) -> dict[str, object]:
        def argv(name: str, *more: object, iters: int = 6) -> list[str]:
            folder = ("--save", tmp_path / name, "--load", tmp_path / name)
            return words(data, "--lr-decay-iters", 9, *folder, *more, iters=iters)

        found: dict[str, object] = {
            "straight": read_by(argv("straight", *flags), tmp_path / "straight.jsonl"),
            "first": read_by(argv("halves", *flags, "--exit-interval", 3)),
            # The next sample is 27: 40 to 44 are carried on without a flag.
            "second": read_by(argv("halves"), tmp_path / "halves.jsonl"),
            "more": read_by(argv("halves", *flags, "--skip-samples", "56:59", iters=7)),
            "again": read_by(argv("halves", "--skip-samples", "56:59", "10:13", iters=8)),
        }
        for word, name in (("60:90", "early"), ("99:110", "late"), ("75:9999", "beyond")):
            found[name] = refusal(argv("halves", "--skip-samples", word, iters=9))
        init_distributed()
        found["dry"] = dry_run(parse_run([*argv("halves", iters=9), "--dry-run"], 1))[0]
        return found

    found = run_ranks(1, fn)[0]
    read = [i for i in range(56) if not (10 <= i < 13 or 40 <= i < 45)]
    assert found["straight"] == read == [*found["first"], *found["second"]]
    assert found["more"] == list(range(59, 67)) and found["again"] == list(range(67, 75))
    ours, theirs = (read_weights(tmp_path / name).weights for name in ("straight", "halves"))
    assert ours.keys() == theirs.keys()
    metrics = [
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()[-3:]]
        for name in ("straight", "halves")
    ]
    for a, b in zip(*metrics, strict=True):
        assert all(a[key] == b[key] for key in ("loss", "grad_norm", "consumed_samples"))
    assert metrics[0][-1]["consumed_samples"] == 56 and metrics[0][-1]["tokens"] == 48 * 32
    checkpoint = find_checkpoint(tmp_path / "halves")
    assert checkpoint.run["skipped_samples"] == [[10, 13], [40, 45], [56, 59]]
    assert checkpoint.state().consumed_samples == 75
    assert "begins before sample 75" in found["early"] and "Skip 75:90" in found["early"]
    assert "99:110 begins after the end of the run" in found["late"]
    assert "reads samples 0 to 82" in found["late"]
    assert "--skip-samples 75:9999 reaches beyond the data" in found["beyond"]
    assert "skipped              11 samples (10:13 40:45 56:59)" in found["dry"]


def test_repeated_data_keep_their_order_whatever_is_skipped(tmp_path: Path) -> None:
    """Within the same number of epochs; none is trained on under another number."""
    short = make_domain(tmp_path / "short", "prose", 3)

    def argv(name: str, *more: object) -> list[str]:
        flags = ("--data-path", short, "--split", "100,0,0", "--eval-iters", 0, "--max-epochs", 4)
        dump = ("--selection", "clm", "--dump-selection", tmp_path / f"{name}-dump")
        folder = ("--save", tmp_path / name, "--load", tmp_path / name, "--lr-decay-iters", 20)
        given = (*flags, *dump, *folder, *more)
        return words([short, short], *given, iters=12, micro_batch_size=2)

    def fn(rank: int) -> None:
        train(argv("straight"))
        train(argv("skips", "--exit-interval", 3))
        train(argv("skips", "--skip-samples", "10:12"))

    run_ranks(1, fn)
    straight, skips = (
        {
            int(sample): tokens.tolist()
            for dump in read_dumps(tmp_path / f"{name}-dump").values()
            for sample, tokens in zip(dump["samples"], dump["tokens"], strict=True)
        }
        for name in ("straight", "skips")
    )
    run = find_checkpoint(tmp_path / "skips").run["data"]
    assert run["epochs"] and run["epochs"][0] > 1
    assert not {10, 11} & skips.keys() and len(straight.keys() & skips.keys()) > 10
    assert all(straight[i] == skips[i] for i in straight.keys() & skips.keys())


def test_ranges_of_another_order_are_forgotten(data: list[str], tmp_path: Path) -> None:
    def argv(*more: object) -> list[str]:
        folder = ("--save", tmp_path / "run", "--load", tmp_path / "run", "--lr-decay-iters", 9)
        return words(data, *folder, *more, iters=6)

    def fn(rank: int) -> list[int]:
        train(argv("--skip-samples", "3:5", "40:48", "--exit-interval", 3))
        return read_by(argv("--seed", 7, "--allow-data-change"))

    assert run_ranks(1, fn)[0] == list(range(26, 50))
    assert find_checkpoint(tmp_path / "run").run["skipped_samples"] == [[3, 5]]


def test_ranges_are_forgotten_where_the_epochs_are_others(tmp_path: Path) -> None:
    """A second epoch is another order, though data, seed and weights are the same."""
    short = make_domain(tmp_path / "short", "prose", 12)

    def argv(iters: int, *more: object) -> list[str]:
        flags = ("--data-path", short, "--split", "100,0,0", "--eval-iters", 0, "--max-epochs", 2)
        folder = ("--save", tmp_path / "run", "--load", tmp_path / "run", "--lr-decay-iters", 40)
        return words([short, short], *flags, *folder, *more, iters=iters, micro_batch_size=4)

    def fn(rank: int) -> list[int]:
        train(argv(6, "--skip-samples", "20:26", "--exit-interval", 3))
        return read_by(argv(18, "--allow-data-change"))

    assert run_ranks(1, fn)[0] == list(range(12, 72))
    run = find_checkpoint(tmp_path / "run").run
    assert run["skipped_samples"] == [] and run["data"]["epochs"] == [2]


def test_a_fresh_optimizer_once(data: list[str], tmp_path: Path) -> None:
    """Weights, position and learning rate go on; a requeued job does not begin anew each time."""

    def adam_step(folder: Path) -> int:
        return json.loads((find_checkpoint(folder).folder / "tensors.json").read_text())[
            "adam_step"
        ]

    def fn(rank: int) -> dict[str, tuple]:
        def go(name: str, *more: object, iters: int = 6) -> tuple:
            save = tmp_path / name
            argv = words(data, "--lr-decay-iters", 9, "--save", save, *more, iters=iters)
            outcome = train(argv, tmp_path / f"{name}.jsonl")
            run = find_checkpoint(save).run
            return outcome, adam_step(save), run["optimizer_resets"]

        reset = ("--load", tmp_path / "run", "--reset-optimizer")
        return {
            "straight": go("straight"),
            "before": go("run", iters=3),
            "reset": go("run", *reset, "--exit-interval", 4),
            "requeued": go("run", *reset),
            "without": go("run", *reset[:2], iters=7),
            "again": go("run", *reset, iters=8),
            # Another folder is another decision, whatever flags the loaded run had.
            "elsewhere": go("other", *reset, iters=9),
            # Nothing is loaded yet, so nothing is reset when the job comes back.
            "new": go("new", "--load", tmp_path / "new", *reset[2:], iters=2),
            "new again": go("new", "--load", tmp_path / "new", *reset[2:], iters=3),
        }

    done = run_ranks(1, fn)[0]
    steps = {name: (step, resets) for name, (_, step, resets) in done.items()}
    assert steps == {
        "straight": (6, []),
        "before": (3, []),
        "reset": (1, [3]),
        "requeued": (3, [3]),
        "without": (4, [3]),
        "again": (1, [3, 7]),
        "elsewhere": (1, [3, 7, 8]),
        "new": (2, []),
        "new again": (3, []),
    }
    straight, requeued = done["straight"][0], done["requeued"][0]
    assert requeued.column("lr") == straight.column("lr")
    assert requeued.column("consumed_samples") == straight.column("consumed_samples")
    # Step 4 has the weights and samples of the straight run; from then on its way is another.
    assert requeued.column("loss")[:4] == straight.column("loss")[:4]
    assert requeued.column("loss")[4:] != straight.column("loss")[4:]


def test_a_fresh_optimizer_wherever_the_engine_keeps_it(data: list[str], tmp_path: Path) -> None:
    layouts = (("--zero-stage", "0"), ("--zero-stage", "2", "--bf16"), ("--zero-stage", "3"))

    def fn(rank: int) -> list[tuple[int, float, float]]:
        found = []
        for number, flags in enumerate(layouts):
            folder = tmp_path / f"{number}"
            train(words(data, *flags, "--save", folder, iters=2, micro_batch_size=4))
            weights = read_weights(folder).weights
            reset = ("--load", folder, "--reset-optimizer")
            engine = build(words(data, *flags, *reset, iters=3, micro_batch_size=4)).engine
            state = OptimizerState(engine)
            off, moments = 0.0, 0.0
            for name, parameter in engine.model.named_parameters():
                begin, end, master = state.part(parameter, "weight")
                if begin < end:
                    saved = weights[name].flatten()[begin:end]
                    off = max(off, float((master - saved).abs().max()))
                    for kind in ("exp_avg", "exp_avg_sq"):
                        moments = max(moments, float(state.part(parameter, kind)[2].abs().max()))
            found.append((state.scalars().adam_step, off, moments))
        return found

    assert run_ranks(2, fn) == [[(0, 0.0, 0.0)] * 3] * 2
