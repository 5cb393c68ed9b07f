"""Whole runs that train adapters beside a loaded model: layouts, checkpoints, export, ledgers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from megatron_eslm.checkpoint.find import find_checkpoint
from megatron_eslm.checkpoint.tensor_files import TensorReader
from megatron_eslm.checkpoint.weights import read_weights
from megatron_eslm.config.run import parse_run
from megatron_eslm.cost.memory import estimate_memory
from megatron_eslm.cost.of_run import step_work
from megatron_eslm.cost.stages import plan_stages
from megatron_eslm.data.batch import Batch
from megatron_eslm.interop.convert import checkpoint_to_folder, folder_to_checkpoint
from megatron_eslm.interop.generation import open_model
from megatron_eslm.launch.bootstrap import init_distributed
from megatron_eslm.model.hf.folder import load_hf
from megatron_eslm.model.lora import is_adapter
from megatron_eslm.training.dry_run import dry_run
from megatron_eslm.training.loop import Trainer
from tests.harness import run_ranks

from .parity import Case
from .runs import ROWS, SEQ_LENGTH, Outcome, build, read_metrics, refusal, train, words
from .test_estimate import number, saved_bytes
from .test_flops import counted

RANK = 4
LORA = (
    *("--lora-rank", RANK, "--lr", "2e-2"),
    *("--global-batch-size", 2 * ROWS, "--eslm-scope", "step"),
)
UNCERTAIN = ("--selection", "uncertainty", "--distill-teacher-dtype", "float32")
METHODS: dict[str, tuple[str, ...]] = {
    "uncertainty": UNCERTAIN,
    "eslm": ("--eslm-alpha", "0.3"),
}
ADAPTERS = RANK * 3 * (8 * 32 + 2 * 128)
"""Parameters of the adapters of a model of `runs.MODEL`."""


@pytest.fixture(scope="module")
def adapted(data: list[str], start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a run that trained adapters; the model that it left, on fixed tokens."""
    folder = tmp_path_factory.mktemp("adapted")

    def fn(rank: int) -> None:
        trainers: list[Trainer] = []
        flags = (*LORA, "--load", start / "weights", *METHODS["eslm"])
        argv = words(data, *flags, "--save", folder / "run", iters=6)
        train(argv, folder / "metrics.jsonl", trainers.append)
        model = trainers[0].engine.model.eval()
        batch = Batch.of(_tokens(), torch.ones(3, SEQ_LENGTH, dtype=torch.bool))
        with torch.no_grad():
            hidden_TMD, *_ = model.run(batch)
            logits = model.final_norm(hidden_TMD) @ model.embedding.word.weight.t()
        torch.save(logits.transpose(0, 1)[..., :257].contiguous(), folder / "logits.pt")

    run_ranks(1, fn)
    return folder


def _tokens() -> torch.Tensor:
    return torch.randint(257, (3, SEQ_LENGTH + 1), generator=torch.Generator().manual_seed(5))


def parts(folder: Path) -> dict[str, torch.Tensor]:
    """Weights and adapters as they were saved, one beside the other."""
    return TensorReader(find_checkpoint(folder).folder, merged=False).read_whole("weight")


def place_of(folder: Path, case: Case, name: str) -> Path:
    return folder / "_".join(Path(word).name for word in f"{case} {name}".split())


def run_methods(data: list[str], folder: Path, start: Path, case: Case) -> dict[str, Outcome]:
    outcomes = {}
    for name, flags in METHODS.items():
        place = place_of(folder, case, name)
        argv = words(
            data,
            *(*LORA, *flags, "--load", start / "weights", *case.flags, "--save", place),
            iters=3,
            micro_batch_size=ROWS // case.dp,
        )
        outcomes[name] = train(argv, folder / f"{place.name}.jsonl")
    return outcomes


@pytest.fixture(scope="module")
def zero3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSpeed file with which the smallest weights, too, are gathered before each use."""
    file = tmp_path_factory.mktemp("json") / "zero3.json"
    settings = {"stage": 3, "stage3_param_persistence_threshold": 0}
    file.write_text(json.dumps({"zero_optimization": settings}))
    return file


LAYOUTS = {
    1: [Case(zero=2)],
    2: [
        *(Case(dp=2, zero=stage) for stage in (0, 1, 2, 3)),
        Case(dp=2, zero=3, extra=("nothing persists",)),
        Case(dp=2, zero=3, extra=("--activation-checkpoint-interval", "1")),
        *(Case(tp=2, zero=stage) for stage in (0, 1, 3)),
        Case(tp=2, extra=("--sequence-parallel",)),
        *(Case(pp=2, zero=stage) for stage in (0, 1)),
    ],
    4: [
        Case(tp=2, pp=2, zero=1, extra=("--sequence-parallel",)),
        Case(pp=2, dp=2),
        Case(tp=2, dp=2, zero=3),
    ],
}


@pytest.mark.parametrize("world", LAYOUTS)
def test_every_layout_trains_the_same_adapters(
    data: list[str], start: Path, zero3: Path, tmp_path: Path, world: int
) -> None:
    """And leaves the weights that it started from as they are, bit for bit."""
    one = run_ranks(1, lambda rank: run_methods(data, tmp_path, start, Case()))[0]
    weights = read_weights(start / "weights").weights
    cases = [
        Case(c.tp, c.pp, c.dp, c.zero, ("--deepspeed_config", str(zero3)))
        if c.extra == ("nothing persists",)
        else c
        for c in LAYOUTS[world]
    ]

    def fn(rank: int) -> list[dict[str, Outcome]]:
        return [run_methods(data, tmp_path, start, case) for case in cases]

    for case, outcomes in zip(cases, run_ranks(world, fn, timeout=400)[0], strict=True):
        for name, ours in outcomes.items():
            label = f"{case} {name}"
            for column in ("loss", "grad_norm"):
                np.testing.assert_allclose(
                    ours.column(column),
                    one[name].column(column),
                    rtol=1e-5 if column == "loss" else 1e-4,
                    atol=1e-5,
                    err_msg=label,
                )
            np.testing.assert_allclose(
                ours.valid_losses(), one[name].valid_losses(), atol=1e-5, err_msg=label
            )
            assert ours.column("tokens_trained") == one[name].column("tokens_trained"), label
            there, wanted = (parts(place_of(tmp_path, each, name)) for each in (case, Case()))
            assert there.keys() == wanted.keys()
            for key, tensor in there.items():
                if is_adapter(key):
                    torch.testing.assert_close(tensor, wanted[key], rtol=1e-3, atol=1e-4)
                    if key.endswith("lora_b"):
                        assert tensor.any(), key
                else:
                    assert torch.equal(tensor, weights[key][: len(tensor)]), (label, key)


def test_the_start_is_the_loaded_model_and_training_improves_it(
    data: list[str], start: Path, tmp_path: Path
) -> None:
    """In bf16 with its defaults, over two ranks."""

    def fn(rank: int) -> tuple[Outcome, Outcome]:
        load = ("--load", start / "weights", "--bf16", "--eval-interval", "20")
        flags = (*LORA, *load, "--selection", "clm", "--save", tmp_path / "run")
        argv = words(data, *flags, iters=20, micro_batch_size=ROWS // 2)
        adapted = train(argv, tmp_path / "adapted.jsonl")
        argv = words(data, *load, "--selection", "clm", iters=2, micro_batch_size=ROWS // 2)
        return adapted, train(argv, tmp_path / "plain.jsonl")

    ours, plain = run_ranks(2, fn)[0]
    assert ours.valid_losses()[0] == plain.valid_losses()[0]
    assert ours.valid_losses()[-1] < ours.valid_losses()[0] - 0.1
    assert ours.column("nonfinite_steps")[-1] == 0
    weights = read_weights(start / "weights").weights
    for name, tensor in parts(tmp_path / "run").items():
        if not is_adapter(name):
            # As it computed with them.
            assert torch.equal(tensor, weights[name][: len(tensor)].bfloat16().float()), name


def test_only_adapters_are_in_the_optimizer_and_have_moments(
    data: list[str], start: Path, adapted: Path
) -> None:
    def fn(rank: int) -> tuple[list[int], int]:
        argv = words(data, *LORA, "--load", start / "weights", "--weight-decay", "0.3")
        trainer = build(argv)
        groups = trainer.engine.ds.optimizer.param_groups
        sizes = [sum(p.numel() for p in group["params"]) for group in groups]
        assert [group["weight_decay"] for group in groups] == [0.3]
        return sizes, sum(p.numel() for p in trainer.engine.model.parameters() if p.requires_grad)

    assert run_ranks(1, fn)[0] == ([ADAPTERS], ADAPTERS)
    (file,) = (find_checkpoint(adapted / "run").folder).glob("*.safetensors")
    with safe_open(file, framework="pt") as tensors:
        kinds = {kind: set() for kind in ("weight", "exp_avg", "exp_avg_sq")}
        for name in tensors.keys():  # noqa: SIM118 (it is no dictionary)
            kind, _, parameter = name.partition("/")
            kinds[kind].add(parameter)
    assert kinds["exp_avg"] == kinds["exp_avg_sq"] == set(filter(is_adapter, kinds["weight"]))
    assert kinds["weight"] > kinds["exp_avg"]


RESUMED = {
    "zero0": ("--zero-stage", "0"),
    "zero1": ("--zero-stage", "1"),
    "zero2": ("--zero-stage", "2"),
    "zero3": ("--zero-stage", "3"),
    "bf16": ("--bf16", "--distill-teacher-dtype", "bf16"),
    "pipeline": ("--pipeline-model-parallel-size", "2", "--micro-batch-size", str(ROWS)),
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_run_that_continues_is_the_run(
    data: list[str], start: Path, tmp_path: Path, case: str
) -> None:
    """Its checkpoints hold what it started from, so that nothing else names the teacher."""

    def fn(rank: int) -> tuple[Outcome, Outcome]:
        def part(name: str, load: Path, *more: str | Path) -> Outcome:
            flags = (*LORA, *UNCERTAIN, "--load", load, *more)
            argv = words(data, *flags, micro_batch_size=ROWS // 2)
            return train([*argv, *RESUMED[case]], tmp_path / f"{name}.jsonl")

        weights, half = start / "weights", tmp_path / "half"
        whole = part("whole", weights, "--save", tmp_path / "whole")
        part("half", weights, "--save", half, "--exit-interval", "2")
        return whole, part("rest", half, "--save", half)

    whole, rest = run_ranks(2, fn, timeout=240)[0]
    for column in ("loss", "grad_norm", "flops", "tokens_trained"):
        assert rest.column(column) == whole.column(column)[2:], column
    assert rest.valid_losses()[-1] == whole.valid_losses()[-1]
    ours, theirs = parts(tmp_path / "half"), parts(tmp_path / "whole")
    assert ours.keys() == theirs.keys() and any(map(is_adapter, ours))
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_any_layout_continues_what_any_other_saved(
    data: list[str], start: Path, tmp_path: Path
) -> None:
    def fn(rank: int) -> list[Outcome]:
        common = (*LORA, *METHODS["eslm"])
        outcomes, load = [], start / "weights"
        for name, case, more in (
            ("half", Case(tp=2, zero=1), ("--exit-interval", "2")),
            ("rest", Case(dp=2, zero=3), ()),
        ):
            flags = (*common, *case.flags, *more, "--load", load, "--save", tmp_path / name)
            argv = words(data, *flags, micro_batch_size=ROWS // case.dp)
            outcomes.append(train(argv, tmp_path / f"{name}.jsonl"))
            load = tmp_path / name
        argv = words(data, *common, "--load", start / "weights", micro_batch_size=ROWS // 2)
        return [*outcomes, train(argv, tmp_path / "whole.jsonl")]

    half, rest, whole = run_ranks(2, fn)[0]
    np.testing.assert_allclose(
        half.column("loss") + rest.column("loss"), whole.column("loss"), atol=1e-5
    )


def test_exported_is_the_model_that_was_trained(adapted: Path, start: Path, tmp_path: Path) -> None:
    assert checkpoint_to_folder(str(adapted / "run"), str(tmp_path / "hf")) < 1e-5
    inputs_BT, trained = _tokens()[:, :-1], torch.load(adapted / "logits.pt")
    with torch.no_grad():
        exported = load_hf(tmp_path / "hf")(inputs_BT).logits
        generating = open_model(str(adapted / "run"))[0](inputs_BT).logits
        before = load_hf(start / "hf")(inputs_BT).logits
    for logits in (exported, generating):
        torch.testing.assert_close(logits, trained, atol=1e-5, rtol=1e-5)
    assert (before - trained).abs().max() > 0.1


def test_parts_of_merged_weights_are_parts_of_the_whole(adapted: Path) -> None:
    """Whichever rows or columns of a layer a rank reads, its adapter is in them."""
    from megatron_eslm.checkpoint.shards import Shard

    reader = TensorReader(find_checkpoint(adapted / "run").folder)
    whole, separate = reader.read_whole("weight"), parts(adapted / "run")
    assert not any(map(is_adapter, whole))
    for dim, name in ((0, "blocks.1.attention.qkv.weight"), (1, "blocks.2.mlp.down.weight")):
        layer = name.removesuffix(".weight")
        a, b = (separate[f"{layer}.lora_{factor}"] for factor in "ab")
        torch.testing.assert_close(whole[name], separate[name] + 2.0 * b @ a)
        shape = list(whole[name].shape)
        size = shape[dim] = shape[dim] // 2
        for begin in (0, size):
            shard = Shard(
                full_shape=tuple(whole[name].shape), shape=tuple(shape), dim=dim, begin=begin
            )
            wanted = whole[name].narrow(dim, begin, size).flatten()
            torch.testing.assert_close(reader.read("weight", name, shard), wanted)
            torch.testing.assert_close(reader.read("weight", name, shard, 5, 77), wanted[5:77])


def test_a_frozen_model_has_its_adapters(
    data: list[str], start: Path, adapted: Path, tmp_path: Path
) -> None:
    """As teacher, as reference and as weights that a run starts from, exported or not."""
    checkpoint_to_folder(str(adapted / "run"), str(tmp_path / "hf"))
    folder_to_checkpoint(str(tmp_path / "hf"), str(tmp_path / "merged"))
    folders = {"checkpoint": adapted / "run", "exported": tmp_path / "hf", "before": start / "hf"}

    def fn(rank: int) -> dict[str, Outcome]:
        outcomes = {}
        for name, folder in folders.items():
            for role, flags in (
                (
                    "teacher",
                    (
                        *("--selection", "clm", "--distill", "dense", "--distill-teacher", folder),
                        *("--distill-teacher-dtype", "float32"),
                    ),
                ),
                (
                    "reference",
                    ("--selection", "rho1", "--eslm-alpha", "0.3", "--reference", folder),
                ),
            ):
                file = tmp_path / f"{role}-{name}.jsonl"
                tensor = ("--tensor-model-parallel-size", "2")
                outcomes[f"{role} {name}"] = train(words(data, *flags, *tensor, iters=2), file)
        argv = words(
            data, *("--selection", "clm", "--load", tmp_path / "merged"), micro_batch_size=ROWS // 2
        )
        outcomes["merged"] = train(argv, tmp_path / "merged.jsonl")
        return outcomes

    ours = run_ranks(2, fn)[0]
    for role in ("teacher", "reference"):
        checkpoint, exported, before = (ours[f"{role} {name}"].column("loss") for name in folders)
        np.testing.assert_allclose(checkpoint, exported, atol=1e-5)
        assert abs(checkpoint[-1] - before[-1]) > 1e-3, role
    (trained,) = (
        line["valid_loss"]
        for line in read_metrics(adapted / "metrics.jsonl")
        if line["iteration"] == 6
    )
    assert ours["merged"].valid_losses()[0] == pytest.approx(trained, abs=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        ("--selection", "uncertainty"),
        ("--eslm-alpha", "0.3", "--eslm-proxy-layers", "2"),
        ("--selection", "random", "--eslm-alpha", "0.3", "--head-logits", "recompute"),
        ("--selection", "clm", "--activation-checkpoint-interval", "1"),
    ],
    ids=["uncertainty", "eslm", "recompute", "checkpoints"],
)
def test_ledgers(data: list[str], start: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    """The executed one is what torch counts; the paper's does not know of adapters."""

    def fn(rank: int) -> tuple[str, str, list[int], Outcome]:
        found: list[list[int]] = []
        load = ("--load", start / "weights", *flags)
        argv = words(data, *load, *LORA[:2], iters=2)
        init_distributed()
        text, plain = (
            dry_run(parse_run([*line, "--dry-run"], 1))[0]
            for line in (argv, words(data, *load, iters=2))
        )
        outcome = train(argv, tmp_path / "m.jsonl", lambda t: found.append(counted(t)))
        return text, plain, found[0], outcome

    text, plain, found, outcome = run_ranks(1, fn)[0]
    ledger = outcome.column("flops")
    assert ledger[0] == pytest.approx(found[0], rel=0.005)
    assert ledger[1] == pytest.approx(sum(found), rel=0.005)
    assert number(text, "FLOPs executed") == pytest.approx(ledger[-1], rel=1e-3)
    assert number(text, "FLOPs executed") < number(plain, "FLOPs executed")
    assert number(text, "FLOPs by the paper") == number(plain, "FLOPs by the paper")
    assert number(text, "trained") == ADAPTERS
    assert "adapters" not in plain


@pytest.mark.parametrize("tp", [1, 2])
def test_memory_is_what_ranks_hold(data: list[str], start: Path, tp: int) -> None:
    """Of gradients and moments the adapters' only; between their factors, a little more."""
    layout = ("--tensor-model-parallel-size", str(tp))

    def fn(rank: int) -> tuple[tuple[float, ...], tuple[float, ...], list[tuple[int, float]]]:
        trainer = build(words(data, *LORA, *layout, "--load", start / "weights"))
        run, shape = trainer.run, trainer.run.shape(257)
        plan = plan_stages(run, shape, trainer.flops, step_work(run))
        told = estimate_memory(run, shape, plan, trainer.flops)
        parameters = list(trainer.engine.model.parameters())
        held = sum(p.numel() for p in parameters)
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        blocks = []
        for more in ([], ["--sequence-parallel"])[:tp]:
            flags = ["--lora-rank", "24", "--load", "x", *more]
            (small, block), (large, _) = saved_bytes(2, tp, flags), saved_bytes(3, tp, flags)
            blocks.append((large - small, block))
        return (told.weights, told.gradients, told.optimizer), (held, trained, trained), blocks

    told, counts, blocks = run_ranks(tp, fn)[0]
    assert told == tuple(n * size for n, size in zip(counts, (4, 4, 8), strict=True))
    for kept, block in blocks:
        assert block == pytest.approx(kept, rel=0.02)


def test_refusals(data: list[str], start: Path, adapted: Path, tmp_path: Path) -> None:
    flags = {
        "nothing there": (*LORA, "--load", tmp_path / "new", "--save", tmp_path / "new"),
        "no adapters": ("--load", adapted / "run"),
        "other rank": (*LORA, "--lora-rank", 8, "--load", adapted / "run"),
        "other alpha": (*LORA, "--lora-alpha", 3, "--load", adapted / "run"),
        "all weights": (*LORA, "--load", start / "trained", "--seed", "7", "--selection", "clm"),
    }

    def fn(rank: int) -> dict[str, str]:
        return {name: refusal(words(data, *more)) for name, more in flags.items()}

    messages = run_ranks(1, fn)[0]
    for name, wanted in {
        "nothing there": "--lora-rank 4 --lora-alpha 8 trains adapters .* contains no checkpoint",
        "no adapters": "iter_0000006 has adapters of --lora-rank 4 --lora-alpha 8 and cannot be "
        "continued without --lora-rank. Give --lora-rank 4 --lora-alpha 8; or, .* --finetune",
        "other rank": "cannot be continued with --lora-rank 8 --lora-alpha 16. Give --lora-rank 4",
        "other alpha": "cannot be continued with --lora-rank 4 --lora-alpha 3. Give --lora-rank 4",
        "all weights": "iter_0000004 was trained without adapters, which --lora-rank 4 "
        "--lora-alpha 8 cannot continue. Leave --lora-rank out, or start a new run .* --finetune",
    }.items():
        assert re.search(wanted, messages[name]), (name, messages[name])
