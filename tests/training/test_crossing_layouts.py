"""Checkpoints cross layouts: saved in one, loaded in another, the run goes on as if never cut."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_eslm.checkpoint.find import find_checkpoint
from megatron_eslm.checkpoint.shards import shards_of
from megatron_eslm.checkpoint.tensor_files import TensorReader
from megatron_eslm.checkpoint.tensor_index import KINDS, Scalars
from megatron_eslm.checkpoint.weights import read_weights, write_weights
from megatron_eslm.training.callbacks import Checkpointer
from megatron_eslm.training.loop import Trainer
from tests.harness import run_ranks

from .runs import ROWS, Outcome, build, train, words

SAVED, LAST = 3, 6


@dataclass(frozen=True)
class Layout:
    """A layout of the same global micro-batch."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    zero: int = 0
    extra: tuple[str, ...] = ()

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        sizes = f"tp{self.tp}pp{self.pp}dp{self.dp}zero{self.zero}"
        return "-".join((sizes, *self.extra)).replace("/", "_")

    def words(self, data: list[str], *flags: str | int | Path) -> list[str]:
        sizes = ("--tensor-model-parallel-size", self.tp, "--pipeline-model-parallel-size", self.pp)
        return words(
            data,
            *("--global-batch-size", 2 * ROWS, "--eslm-alpha", "0.3", "--eslm-scope", "step"),
            *(*sizes, "--num-attention-heads", 4),
            *("--zero-stage", self.zero, *self.extra, *flags),
            iters=LAST,
            micro_batch_size=ROWS // self.dp,
        )


def save(data: list[str], folder: Path, layouts: Iterable[Layout]) -> None:
    """Train in each layout up to iteration SAVED; a checkpoint is left in folder / layout."""
    for world in sorted({layout.world for layout in layouts}):

        def fn(rank: int, world: int = world) -> None:
            for layout in layouts:
                if layout.world == world:
                    flags = ("--save", folder / str(layout), "--exit-interval", SAVED)
                    train(layout.words(data, *flags))

        run_ranks(world, fn, timeout=300)


def go_on(
    data: list[str], folder: Path, pairs: Iterable[tuple[Layout, Layout]]
) -> dict[tuple[Layout, Layout], Outcome]:
    """Load what the first of each pair saved into the second, and train on to iteration LAST."""
    outcomes = {}
    for world in sorted({there.world for _, there in pairs}):

        def fn(rank: int, world: int = world) -> dict[tuple[Layout, Layout], Outcome]:
            return {
                (here, there): train(
                    there.words(data, "--load", folder / str(here)),
                    folder / f"{here}-{there}.jsonl",
                )
                for here, there in pairs
                if there.world == world
            }

        outcomes.update(run_ranks(world, fn, timeout=300)[0])
    return outcomes


def straight(data: list[str], folder: Path, layout: Layout) -> Outcome:
    """The run that is never cut."""

    def fn(rank: int) -> Outcome:
        return train(layout.words(data), folder / f"straight-{layout}.jsonl")

    return run_ranks(layout.world, fn)[0]


SINGLE = Layout()
CENTRE = Layout(tp=2, pp=2, zero=1)
AROUND = (
    SINGLE,
    Layout(pp=2, dp=2, zero=1),
    Layout(tp=2, dp=2, zero=2),
    Layout(dp=2, zero=3),
)


def test_the_next_losses_are_those_of_the_uninterrupted_run(
    data: list[str], tmp_path: Path
) -> None:
    expected = straight(data, tmp_path, SINGLE)
    save(data, tmp_path, (CENTRE, *AROUND))
    pairs = [(CENTRE, other) for other in AROUND] + [(other, CENTRE) for other in AROUND]
    for pair, outcome in go_on(data, tmp_path, pairs).items():
        message = " loaded at ".join(map(str, pair))
        assert outcome.column("iteration") == [4, 5, 6], message
        for column in ("loss", "tau_instance", "tau_token"):
            np.testing.assert_allclose(
                outcome.column(column), expected.column(column)[SAVED:], atol=1e-5, err_msg=message
            )
        for column in ("kept_instances", "tokens", "tokens_trained", "alpha", "lr"):
            assert outcome.column(column) == expected.column(column)[SAVED:], (message, column)
        assert outcome.valid_losses()[-1] == pytest.approx(expected.valid_losses()[-1], abs=1e-5)


Tensors = dict[tuple[str, str], torch.Tensor]


def content(folder: Path) -> tuple[Tensors, Scalars]:
    """All that a checkpoint holds of the optimizer: tensors by (kind, name), and the rest."""
    reader = TensorReader(find_checkpoint(folder).folder)
    tensors = {
        (kind, name): tensor for kind in KINDS for name, tensor in reader.read_whole(kind).items()
    }
    return tensors, reader.scalars


def assert_same_content(ours: Path, theirs: Path) -> None:
    (tensors, scalars), (other_tensors, other_scalars) = content(ours), content(theirs)
    assert scalars == other_scalars and tensors.keys() == other_tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(tensor, other_tensors[key]), (ours, theirs, key)


def assert_computes_with(trainer: Trainer, folder: Path) -> None:
    """The model's weights are this rank's part of the saved ones, cast; padding rows are zero."""
    from deepspeed.runtime.zero import GatheredParameters

    engine, found = trainer.engine, find_checkpoint(folder)
    reader = TensorReader(found.folder)
    shards = shards_of(engine.model, engine.mesh, found.shape.vocab_size)
    parameters = dict(engine.model.named_parameters())
    with GatheredParameters(list(parameters.values())):
        for name, parameter in parameters.items():
            saved = reader.read("weight", name, shards[name]).view(parameter.shape)
            assert torch.equal(parameter, saved.to(parameter.dtype)), name


def pass_through(
    data: list[str], folder: Path, savers: Iterable[Layout], loaders: Iterable[Layout]
) -> set[str]:
    """Load what each of `savers` saved into each of `loaders` and save it again, untouched.

    Returns:
        The classes of DeepSpeed's optimizers that took part.
    """
    classes = set()
    for world in sorted({loader.world for loader in loaders}):

        def fn(rank: int, world: int = world) -> set[str]:
            seen = set()
            for loader in loaders:
                for saver in savers if loader.world == world else ():
                    source, target = folder / str(saver), folder / f"{saver}-{loader}"
                    trainer = build(loader.words(data, "--load", source, "--save", target))
                    Checkpointer().save(trainer)
                    assert_computes_with(trainer, source)
                    if rank == 0:
                        assert_same_content(target, source)
                    dist.barrier()
                    seen.add(type(trainer.engine.ds.optimizer).__name__)
            return seen

        classes |= run_ranks(world, fn, timeout=300)[0]
    return classes


BF16 = ("--bf16",)
SAVERS = (Layout(tp=2, pp=2, zero=1, extra=BF16), Layout(dp=2, zero=3))
LOADERS = (
    SINGLE,
    *(Layout(dp=2, zero=zero) for zero in (2, 3)),
    *(Layout(dp=2, zero=zero, extra=BF16) for zero in (1, 2, 3)),
    Layout(dp=4, zero=1),
    Layout(tp=2, dp=2, zero=3, extra=BF16),
    Layout(tp=4, zero=2, extra=BF16),  # the last rank's part of the vocabulary is all padding
    Layout(pp=2, dp=2, zero=1, extra=BF16),
    Layout(tp=2, pp=2),
)


def test_every_optimizer_holds_what_any_other_saved(data: list[str], tmp_path: Path) -> None:
    """Master weights, both moments and Adam's step count, bit for bit."""
    save(data, tmp_path, SAVERS)
    for saver in SAVERS:
        tensors, scalars = content(tmp_path / str(saver))
        assert scalars == Scalars(adam_step=SAVED)
        for key, tensor in tensors.items():
            assert tensor.count_nonzero(), (saver, key)
        word = tensors["weight", "embedding.word.weight"]
        assert not torch.equal(word, word.bfloat16().float())  # masters, not what computes
    assert pass_through(data, tmp_path, SAVERS, LOADERS) == {
        "AdamW",
        "BF16_Optimizer",
        "DeepSpeedZeroOptimizer",
        "DeepSpeedZeroOptimizer_Stage3",
    }


def test_deepspeed_may_order_parameters_as_it_likes(data: list[str], tmp_path: Path) -> None:
    config = tmp_path / "round_robin.json"
    config.write_text(json.dumps({"zero_optimization": {"round_robin_gradients": True}}))
    mixed = Layout(dp=2, zero=2, extra=("--deepspeed_config", str(config)))
    save(data, tmp_path, (SINGLE, mixed))
    pass_through(data, tmp_path, (SINGLE,), (mixed,))
    pass_through(data, tmp_path, (mixed,), (SINGLE,))


def test_the_compute_type_may_change(data: list[str], tmp_path: Path) -> None:
    """Plain training, where no kept token can flip: the losses differ by rounding alone."""
    clm = ("--selection", "clm")
    single, half = Layout(extra=clm), Layout(dp=2, zero=1, extra=(*clm, *BF16))
    expected = straight(data, tmp_path, single).column("loss")[SAVED:]
    save(data, tmp_path, (single, half))
    for pair, outcome in go_on(data, tmp_path, [(single, half), (half, single)]).items():
        np.testing.assert_allclose(outcome.column("loss"), expected, atol=0.02, err_msg=str(pair))


def test_weights_alone_start_any_layout(data: list[str], tmp_path: Path) -> None:
    save(data, tmp_path, (SINGLE,))
    source = read_weights(tmp_path / str(SINGLE))
    start = tmp_path / "start"
    write_weights(start, source.weights, source.shape, source.tokenizer_dir, "a test")
    layouts = (CENTRE, Layout(tp=2, dp=2, zero=3, extra=BF16))

    def fn(rank: int) -> None:
        for layout in layouts:
            trainer = build(layout.words(data, "--load", start))
            assert trainer.state.iteration == 0
            assert_computes_with(trainer, start)

    run_ranks(4, fn)


def fp16_is_there() -> None:
    """Let DeepSpeed train in fp16 on a processor that it thinks too slow for it."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True


def test_the_loss_scale_survives(data: list[str], tmp_path: Path) -> None:
    config = tmp_path / "fp16.json"
    scaler = {"enabled": True, "loss_scale_window": 2, "initial_scale_power": 6}
    config.write_text(json.dumps({"fp16": scaler}))
    fp16 = ("--deepspeed_config", str(config))
    zero2, zero3 = (Layout(dp=2, zero=zero, extra=fp16) for zero in (2, 3))

    def train_on(layout: Layout, name: str, *flags: str | int | Path) -> list[float]:
        argv = layout.words(data, "--save", tmp_path / name, *flags)
        return train(argv, tmp_path / f"{name}.jsonl").column("loss")

    def fn(rank: int) -> list[list[float]]:
        fp16_is_there()
        before = ("--load", tmp_path / "cut" / f"iter_{SAVED:07d}")
        train_on(zero2, "cut", "--exit-interval", SAVED)
        return [
            train_on(zero2, "straight"),
            train_on(zero2, "same", *before),
            train_on(zero3, "zero3", *before),
        ]

    losses, same, crossed = run_ranks(2, fn)[0]
    saved = content(tmp_path / "cut")[1].loss_scale
    assert saved is not None and saved.cur_scale > 2**6 and saved.cur_iter == SAVED
    assert same == losses[SAVED:]
    assert_same_content(tmp_path / "same", tmp_path / "straight")
    np.testing.assert_allclose(crossed, losses[SAVED:], atol=1e-3)
    # The scaler goes on counting from where it was.
    ours, theirs = (content(tmp_path / name)[1].loss_scale for name in ("zero3", "straight"))
    assert ours == theirs != saved


@pytest.mark.slow  # the first use compiles for about a minute
@pytest.mark.skipif(shutil.which("g++") is None, reason="offload compiles DeepSpeed's CPU Adam")
def test_offloaded_state_crosses_and_resumes_exactly(data: list[str], tmp_path: Path) -> None:
    offload = [Layout(dp=2, zero=zero, extra=("--cpu-offload",)) for zero in (1, 2, 3)]
    offload[2] = Layout(dp=2, zero=3, extra=("--cpu-offload", *BF16))
    others = (SINGLE, Layout(dp=2, zero=1, extra=BF16))
    save(data, tmp_path, (*offload, *others))
    pass_through(data, tmp_path, offload, others)
    pipeline = Layout(pp=2, zero=1, extra=("--cpu-offload",))
    pass_through(data, tmp_path, others, (*offload, pipeline))

    def fn(rank: int) -> None:
        for layout in offload:
            for name, flags in {
                "straight": (),
                "cut": ("--exit-interval", 11),
                # By then powers of beta by multiplication are others than by pow().
                "again": ("--load", tmp_path / f"{layout}-cut"),
            }.items():
                target = tmp_path / f"{layout}-{name}"
                train(layout.words(data, "--save", target, "--train-iters", 25, *flags))
            if rank == 0:
                assert_same_content(tmp_path / f"{layout}-again", tmp_path / f"{layout}-straight")
            dist.barrier()

    run_ranks(2, fn, timeout=300)
