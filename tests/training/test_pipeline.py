"""What a pipeline has to get right beside the parity matrix: ties, dropout, offload."""

from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_eslm.training.loop import Trainer
from tests.harness import run_ranks

from .runs import (
    ROWS,
    Outcome,
    assert_same_dumps,
    assert_unequal_ranks,
    build,
    refusal,
    train,
    words,
)

STEPS = (
    *("--num-layers", "4", "--global-batch-size", 3 * ROWS),
    *("--eslm-scope", "step", "--eslm-alpha", "0.3"),  # two of three micro-steps
)
PP2 = ("--pipeline-model-parallel-size", "2")


def course(
    data: list[str], folder: Path, runs: dict[str, tuple[int, int, tuple]], *flags: str
) -> dict[str, Outcome]:
    """Train the single process ("one") and each of {name: (ranks, DP, flags)}."""

    def one_run(name: str, dp: int, more: tuple) -> Outcome:
        argv = words(
            data,
            *(*STEPS, *flags, *more, "--dump-selection", folder / name),
            micro_batch_size=ROWS // dp,
        )
        return train(argv, folder / f"{name}.jsonl")

    return {
        name: run_ranks(ranks, lambda rank, n=name, d=dp, m=more: one_run(n, d, m))[0]
        for name, (ranks, dp, more) in {"one": (1, 1, ()), **runs}.items()
    }


def assert_same_course(folder: Path, outcomes: dict[str, Outcome]) -> None:
    one = outcomes["one"]
    for name, outcome in outcomes.items():
        for column in ("loss", "grad_norm"):
            np.testing.assert_allclose(
                outcome.column(column), one.column(column), rtol=1e-5, atol=1e-5, err_msg=name
            )
        np.testing.assert_allclose(outcome.valid_losses(), one.valid_losses(), atol=1e-5)
        assert_same_dumps(folder / name, folder / "one")


def test_dropout_masks_are_those_of_the_single_process(data: list[str], tmp_path: Path) -> None:
    sequence = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
    runs = {
        "dp4-zero2": (4, 4, ("--zero-stage", "2")),
        "pp2dp2": (4, 2, (*PP2, "--activation-checkpoint-interval", "1")),
        "tp2pp2": (4, 1, (*PP2, *sequence)),
        "tp2": (2, 1, ("--tensor-model-parallel-size", "2")),
    }
    dropout = ("--hidden-dropout", "0.1", "--attention-dropout", "0.1", "--eslm-alpha", "0.5")
    assert_same_course(tmp_path, course(data, tmp_path, runs, *dropout))
    assert_unequal_ranks(tmp_path / "one", 4)
    plain = course(data, tmp_path / "plain", {}, "--eslm-alpha", "0.5")["one"]
    dropped = course(data, tmp_path / "dropped", {}, *dropout)["one"]
    assert dropped.column("loss") != plain.column("loss")


def test_rows_are_dropped_where_there_are_too_few_micro_steps(
    data: list[str], tmp_path: Path
) -> None:
    """6 of 8 rows on one rank, 3 of 4 on each of two; evaluation sends whole micro-batches."""
    runs = {
        "pp2dp2": (4, 2, PP2),
        "pp2": (2, 1, PP2),
        "dp2-zero3": (2, 2, ("--zero-stage", "3")),
    }
    few = ("--eslm-alpha", "0.25", "--global-batch-size", str(ROWS), "--eval-interval", "2")
    outcomes = course(data, tmp_path, runs, *few)
    assert_same_course(tmp_path, outcomes)
    assert outcomes["one"].column("batch_size_trained") == [6] * 4


def test_activations_computed_again_are_the_same(data: list[str], tmp_path: Path) -> None:
    """And they are computed again: a block runs forward twice in a training step."""

    def fn(rank: int) -> list[tuple[Outcome, int]]:
        results = []
        for interval in ("0", "1", "3"):
            calls = [0]

            def prepare(trainer: Trainer, calls: list[int] = calls) -> None:
                def count(module, args):
                    calls[0] += module.training

                trainer.engine.model.blocks["2"].register_forward_pre_hook(count)

            argv = words(data, *STEPS, "--activation-checkpoint-interval", interval)
            outcome = train(argv, tmp_path / f"{interval}.jsonl", prepare)
            results.append((outcome, calls[0]))
        return results

    plain, *others = run_ranks(1, fn)[0]
    assert plain[1] == 4 * 2  # steps x micro-steps
    for outcome, calls in others:
        assert calls == 2 * plain[1]
        for column in ("loss", "grad_norm"):
            assert outcome.column(column) == plain[0].column(column)


@pytest.mark.parametrize("flags", [("--zero-stage", "1"), ("--bf16",)], ids=["float32", "bf16"])
def test_what_several_stages_hold_stays_the_same(
    data: list[str], tmp_path: Path, flags: tuple[str, ...]
) -> None:
    """The tied word embedding of both ends, and every stage's copies of the early exit."""

    def fn(rank: int) -> tuple[torch.Tensor | None, list[torch.Tensor], list[str]]:
        built: list[Trainer] = []
        pp3 = ("--pipeline-model-parallel-size", "3", "--num-layers", "6")
        train(words(data, *STEPS, *pp3, *flags), tmp_path / "m.jsonl", built.append)
        model = built[0].engine.model
        built[0].engine.prepare_scores()
        layers = model.early_exit.layers
        assert layers is not None
        held = [
            tensor.detach().float()
            for module in (layers.embedding, *layers.blocks, layers.final_norm)
            for tensor in [*module.parameters(), *module.buffers()]
        ]
        word = None if rank == 1 else model.embedding.word.weight.detach()
        return word, held, [name for name, _ in model.named_parameters()]

    (first, scores_first, _), (_, scores_middle, names), (last, scores_last, _) = run_ranks(3, fn)
    assert first is not None and last is not None and torch.equal(first, last)
    assert len(scores_first) == 2 + 12 + 2
    for one, middle, other in zip(scores_first, scores_middle, scores_last, strict=True):
        assert torch.equal(one, middle) and torch.equal(one, other)
    assert not torch.equal(scores_first[-2], torch.ones_like(scores_first[-2]))  # it was trained
    assert names and all(name.startswith("blocks.") for name in names)  # copies are no parameters


def test_bf16_in_three_dimensions_follows_the_single_process(
    data: list[str], tmp_path: Path
) -> None:
    """Plain training, where no kept token can flip: the curve differs by rounding alone."""
    tp2pp2 = (*PP2, "--tensor-model-parallel-size", "2", "--sequence-parallel")
    runs = {"tp2pp2": (4, 1, tp2pp2), "pp2dp2": (4, 2, PP2)}
    outcomes = course(data, tmp_path, runs, "--bf16", "--selection", "clm")
    for name in runs:
        for column, tolerance in (("loss", 3e-3), ("grad_norm", 1e-2)):
            np.testing.assert_allclose(
                outcomes[name].column(column), outcomes["one"].column(column), rtol=tolerance
            )


@pytest.mark.slow  # the first use compiles for about a minute
@pytest.mark.skipif(shutil.which("g++") is None, reason="offload compiles DeepSpeed's CPU Adam")
@pytest.mark.parametrize("flags", [(), ("--bf16",)], ids=["float32", "bf16"])
def test_cpu_offload_in_a_pipeline(data: list[str], tmp_path: Path, flags: tuple[str, ...]) -> None:
    """Gradients of the tied embedding are then added up elsewhere."""
    offload = ("--zero-stage", "1", "--cpu-offload")
    runs = {"pp2": (2, 1, (*PP2, *offload)), "pp2dp2": (4, 2, (*PP2, *offload))}
    outcomes = course(data, tmp_path, runs, "--selection", "clm", *flags)
    for name in runs:
        for column, tolerance in (("loss", 3e-3), ("grad_norm", 1e-2)):
            np.testing.assert_allclose(
                outcomes[name].column(column),
                outcomes["one"].column(column),
                rtol=tolerance if flags else 1e-5,
            )


def test_the_early_exit_must_fit_into_the_first_stage(data: list[str]) -> None:
    def fn(rank: int) -> str:
        return refusal(
            words(data, *STEPS, *PP2, "--pipeline-split", "1,3", "--eslm-proxy-layers", "2")
        )

    for message in run_ranks(2, fn):
        assert "--eslm-proxy-layers 2" in message and "--pipeline-split" in message


def test_middle_stages_hold_blocks_only_and_read_only_to_score(
    data: list[str], tmp_path: Path
) -> None:
    def fn(rank: int) -> tuple[list[str], list[bool]]:
        built: list[Trainer] = []
        flags = ("--pipeline-model-parallel-size", "3", "--pipeline-split", "1,2,1")
        for selection in ("clm", "eslm"):
            argv = words(data, *STEPS, *flags, "--selection", selection)
            train(argv, tmp_path / f"{selection}.jsonl", built.append)
        names = [name for name, _ in built[0].engine.model.named_parameters()]
        return names, [trainer._batches().loader is not None for trainer in built]

    (first, _), (middle, reads), (last, _) = run_ranks(3, fn)
    assert {name.split(".")[1] for name in middle} == {"1", "2"} and reads == [False, True]
    assert all(name.startswith("blocks.") for name in middle)
    assert "embedding.position.weight" in first and not any("norm" in n[:10] for n in first)
    assert [n for n in last if not n.startswith("blocks")] == [
        "embedding.word.weight",
        "final_norm.weight",
        "final_norm.bias",
    ]


def test_stages_exchange_shapes_only_where_the_number_of_rows_changes(data: list[str]) -> None:
    """On CUDA the host would wait for the device each time."""

    def fn(rank: int, *flags: str | int) -> list[str]:
        seen: list[str] = []

        def prepare(trainer: Trainer) -> None:
            for name in ("_send_tensor_meta", "_recv_tensor_meta"):
                call = getattr(trainer.engine.ds, name)

                def counted(*args, name: str = name, call=call):
                    seen.append(name)
                    return call(*args)

                setattr(trainer.engine.ds, name, counted)

        train(words(data, *STEPS, *PP2, *flags), prepare=prepare)
        return seen

    def both(rank: int) -> tuple[list[str], list[str]]:
        # Six of eight rows in training, eight in evaluation, before it and after.
        few = ("--eslm-alpha", "0.25", "--global-batch-size", ROWS)
        return fn(rank, "--eval-interval", 1), fn(rank, *few, "--eval-interval", 4)

    first, last = run_ranks(2, both)
    assert first == (["_send_tensor_meta"], ["_send_tensor_meta"] * 3)
    assert last == (["_recv_tensor_meta"], ["_recv_tensor_meta"] * 3)


def test_every_group_waits_as_long_as_the_world(data: list[str], tmp_path: Path) -> None:
    """Also those that DeepSpeed makes for a pipeline: NCCL's own 10 minutes would come first."""
    argv = words(data, *PP2, "--distributed-timeout-minutes", "7")

    def on_rank(rank: int) -> list[timedelta]:
        run = build(argv).run
        device = torch.device("cpu")
        groups = list(dist.distributed_c10d._world.pg_map)
        wanted = timedelta(seconds=run.engine.collective_timeout_seconds)
        return [wanted, *(group._get_backend(device).options._timeout for group in groups)]

    for wanted, *found in run_ranks(4, on_rank):
        assert len(found) > 4 and set(found) == {wanted}


def test_middle_stages_score_what_the_others_read_after_steps_that_drop_nothing(
    data: list[str], tmp_path: Path
) -> None:
    runs = {"pp3": (3, 1, ("--pipeline-model-parallel-size", "3", "--num-layers", "6"))}
    outcomes = course(data, tmp_path, runs, "--num-layers", "6", "--eslm-start-iter", "2")
    assert outcomes["pp3"].column("kept_instances")[:2] == [1.0, 1.0]
    for column in ("loss", "tau_instance", "tau_token"):
        for ours, theirs in zip(
            outcomes["pp3"].column(column), outcomes["one"].column(column), strict=True
        ):
            assert (ours is None) == (theirs is None), column
            assert ours is None or ours == pytest.approx(theirs, rel=1e-5), column
