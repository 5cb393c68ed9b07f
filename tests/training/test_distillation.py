"""Whole runs with a teacher: layouts, SALT's switch, continuing, ledgers, refusals."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_eslm.config.run import parse_run
from megatron_eslm.frozen.model import FrozenModel
from megatron_eslm.interop.convert import checkpoint_to_folder
from megatron_eslm.launch.bootstrap import init_distributed
from megatron_eslm.training.dry_run import dry_run
from megatron_eslm.training.loop import Trainer
from tests.harness import run_ranks

from .parity import Case
from .runs import (
    ROWS,
    SEQ_LENGTH,
    Outcome,
    assert_same_dumps,
    build,
    refusal,
    train,
    words,
)
from .test_estimate import number
from .test_flops import counted

TEACHER = (
    *("--num-layers", "2", "--hidden-size", "48", "--num-attention-heads", "4"),
    *("--seq-length", "40", "--selection", "clm", "--lr", "1e-2"),
    # Another architecture than the model that learns.
    *("--architecture", "llama", "--num-query-groups", "2"),
    "--untie-embeddings-and-output-weights",
)
FLOAT32 = ("--distill-teacher-dtype", "float32")
STEPS = ("--global-batch-size", 2 * ROWS, "--eslm-scope", "step")


@pytest.fixture(scope="module")
def teacher(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a model of another shape, and the same as a Hugging Face folder beside it."""
    folder = tmp_path_factory.mktemp("teacher")

    def fn(rank: int) -> None:
        train(words(data, *TEACHER, "--save", folder / "checkpoints", iters=6))

    run_ranks(1, fn)
    checkpoint_to_folder(str(folder / "checkpoints"), str(folder / "hf"))
    return folder


def methods(teacher: Path, start: Path) -> dict[str, tuple[str | Path, ...]]:
    taught = ("--distill-teacher", teacher / "checkpoints", *FLOAT32)
    return {
        "dense": ("--selection", "clm", "--distill", "dense", *taught),
        "eslm": ("--eslm-alpha", "0.3", "--distill", "eslm", "--distill-temperature", "2", *taught),
        "entropy": (
            *("--eslm-alpha", "0.3", "--eslm-score", "entropy", "--distill", "eslm", *taught),
            *("--distill-weight", "0.9", "--head-logits", "recompute"),
        ),
        "salt": ("--selection", "clm", "--distill", "salt", "--salt-iters", "2", *taught),
        "uncertainty": ("--selection", "uncertainty", "--load", start / "weights", *FLOAT32),
    }


def otherwise(teacher: Path, start: Path) -> dict[str, tuple[str | Path, ...]]:
    """The same without a teacher, or by another one."""
    another = ("--distill-teacher", teacher / "checkpoints", *FLOAT32)
    return {
        "dense": ("--selection", "clm"),
        "eslm": ("--eslm-alpha", "0.3"),
        "entropy": ("--eslm-alpha", "0.3", "--eslm-score", "entropy"),
        "salt": ("--selection", "clm"),
        "uncertainty": ("--selection", "uncertainty", "--load", start / "weights", *another),
    }


METHODS = ("dense", "eslm", "entropy", "salt", "uncertainty")
LAYOUTS = {
    2: [
        Case(tp=2, zero=1),
        Case(pp=2),
        Case(dp=2, zero=1),
        Case(tp=2, extra=("--sequence-parallel",)),
        Case(dp=2, zero=2),
        Case(dp=2, zero=3),
    ],
    4: [Case(tp=2, pp=2, zero=1), Case(pp=2, dp=2), Case(tp=2, dp=2, zero=3)],
}


def run_methods(
    data: list[str], folder: Path, case: Case, flags: dict[str, tuple[str | Path, ...]]
) -> dict[str, Outcome]:
    outcomes = {}
    for name, more in flags.items():
        place = folder / f"{case} {name}".replace(" ", "_")
        argv = words(
            data,
            *(*STEPS, *more, *case.flags, "--dump-selection", place),
            iters=3,
            micro_batch_size=ROWS // case.dp,
        )
        outcomes[name] = train(argv, place.with_suffix(".jsonl"))
    return outcomes


def methods_of(case: Case) -> list[str]:
    """All five under ZeRO 3 on two ranks, elsewhere three, in turn."""
    if case == Case(dp=2, zero=3):
        return list(METHODS)
    begin = 2 * [case for world in LAYOUTS.values() for case in world].index(case)
    return [METHODS[(begin + n) % len(METHODS)] for n in range(3)]


def test_each_method_meets_each_size() -> None:
    cases = [case for world in LAYOUTS.values() for case in world]
    for name in METHODS:
        met = [case for case in cases if name in methods_of(case)]
        for field in ("tp", "pp", "dp"):
            assert {getattr(case, field) for case in met} == {1, 2}, (name, field)
        assert {case.zero for case in met} >= {0, 1, 3}, name


@pytest.mark.parametrize(
    "each", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["in turn", "each"]
)
@pytest.mark.parametrize("world", LAYOUTS)
def test_a_teacher_teaches_the_same_in_every_layout(
    data: list[str], teacher: Path, start: Path, tmp_path: Path, world: int, each: bool
) -> None:
    """Three methods in each layout; by `make test-all` every method in each."""
    taught = methods(teacher, start)
    assert tuple(taught) == METHODS
    one = run_ranks(1, lambda rank: run_methods(data, tmp_path, Case(), taught))[0]
    others = otherwise(teacher, start)
    other = run_ranks(1, lambda rank: run_methods(data, tmp_path / "other", Case(), others))[0]
    cases = LAYOUTS[world]

    def fn(rank: int) -> list[dict[str, Outcome]]:
        names = {case: METHODS if each else methods_of(case) for case in cases}
        return [
            run_methods(data, tmp_path, case, {name: taught[name] for name in names[case]})
            for case in cases
        ]

    for case, outcomes in zip(cases, run_ranks(world, fn, timeout=300)[0], strict=True):
        for name, ours in outcomes.items():
            label = f"{case} {name}"
            # What the teacher says makes the loss.
            assert abs(ours.column("loss")[0] - other[name].column("loss")[0]) > 0.05, label
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
            assert_same_dumps(
                tmp_path / label.replace(" ", "_"),
                tmp_path / f"{Case()} {name}".replace(" ", "_"),
            )


def test_ranks_that_keep_no_sequence_take_part(
    data: list[str], teacher: Path, tmp_path: Path
) -> None:
    """One of eight rows is kept, on one of four ranks."""
    taught = ("--distill", "eslm", "--distill-teacher", teacher / "checkpoints", *FLOAT32)
    flags = {"one row": ("--eslm-alpha", "0.85", "--eslm-scope", "global", *taught)}
    case = Case(dp=4)
    one = run_ranks(1, lambda rank: run_methods(data, tmp_path, Case(), flags))[0]["one row"]
    four = run_ranks(4, lambda rank: run_methods(data, tmp_path, case, flags))[0]["one row"]
    assert four.column("kept_instances") == [1 / 8] * 3
    for column in ("loss", "grad_norm"):
        np.testing.assert_allclose(four.column(column), one.column(column), rtol=1e-4, atol=1e-5)


def test_a_hugging_face_folder_teaches_what_its_checkpoint_does(
    data: list[str], teacher: Path, tmp_path: Path
) -> None:
    def fn(rank: int) -> list[Outcome]:
        return [
            train(
                words(
                    data,
                    *("--selection", "clm", "--distill", "dense", *FLOAT32),
                    *("--distill-teacher", teacher / name),
                    *("--tensor-model-parallel-size", "2"),
                ),
                tmp_path / f"{name}.jsonl",
            )
            for name in ("checkpoints", "hf")
        ]

    ours, theirs = run_ranks(2, fn)[0]
    assert ours.column("loss") == theirs.column("loss")
    assert ours.column("grad_norm") == theirs.column("grad_norm")


def test_the_teacher_stays_as_it_is_and_in_nobodys_parameters(
    data: list[str], teacher: Path, tmp_path: Path
) -> None:
    """In bf16, its default, beside a bf16 student."""

    def fn(rank: int) -> tuple[Outcome, bool]:
        seen: list[tuple[Trainer, dict[str, torch.Tensor]]] = []

        def frozen(trainer: Trainer) -> FrozenModel:
            return trainer.engine.model.head.objective.teacher

        def prepare(trainer: Trainer) -> None:
            seen.append((trainer, {n: p.clone() for n, p in frozen(trainer).named_parameters()}))

        outcome = train(
            words(
                data,
                *("--eslm-alpha", "0.3", "--distill", "eslm", "--bf16", "--zero-stage", "2"),
                *("--distill-teacher", teacher / "checkpoints", "--save", tmp_path / "run"),
                iters=8,
                micro_batch_size=ROWS // 2,
            ),
            tmp_path / "bf16.jsonl",
            prepare,
        )
        trainer, before = seen[0]
        after = dict(frozen(trainer).named_parameters())
        same = all(
            torch.equal(after[n], p) and p.dtype == torch.bfloat16 for n, p in before.items()
        )
        ids = {id(p) for p in trainer.engine.ds.module.parameters()}
        assert len(ids) == len(dict(trainer.engine.model.named_parameters()))
        assert not any(id(p) in ids for p in after.values())
        return outcome, same

    outcome, same = run_ranks(2, fn)[0]
    assert same
    assert outcome.valid_losses()[-1] < outcome.valid_losses()[0] - 0.5
    assert outcome.column("nonfinite_steps")[-1] == 0


def calls_of_the_teacher(trainer: Trainer) -> list[int]:
    """The steps in which it reads something, filled as training goes on."""
    calls: list[int] = []
    frozen = trainer.engine.model.head.objective.teacher
    ordinary = frozen.hidden

    def hidden(tokens_MU: torch.Tensor) -> torch.Tensor:
        calls.append(trainer.state.iteration)
        return ordinary(tokens_MU)

    frozen.hidden = hidden
    return calls


def test_salt_switches_exactly_at_its_step(data: list[str], teacher: Path, tmp_path: Path) -> None:
    taught = ("--distill-teacher", teacher / "checkpoints", *FLOAT32)

    def fn(rank: int) -> tuple[Outcome, ...]:
        calls: list[list[int]] = []
        common = ("--selection", "clm", *STEPS)
        salt = (*common, "--distill", "salt", "--salt-iters", "2", *taught)
        straight = train(
            words(data, *salt),
            tmp_path / "salt.jsonl",
            lambda t: calls.append(calls_of_the_teacher(t)),
        )
        assert calls[0] == [0, 0, 1, 1]  # two micro-steps each
        dense = train(
            words(
                data,
                *(*common, "--distill", "dense", *taught),
                *("--save", tmp_path / "dense", "--exit-interval", "2"),
            ),
            tmp_path / "dense.jsonl",
        )
        # What follows is plain training from there, by another run that knows no teacher.
        after = ("--load", tmp_path / "dense", "--allow-method-change")
        plain = train(words(data, *common, *after), tmp_path / "plain.jsonl")
        # And SALT continues where it stands, behind the switch and at it.
        again = train(words(data, *salt, *after), tmp_path / "again.jsonl")
        return straight, dense, plain, again

    straight, dense, plain, again = run_ranks(1, fn)[0]
    for column in ("loss", "grad_norm"):
        values = straight.column(column)
        assert values[:2] == dense.column(column)
        assert values[2:] == plain.column(column) == again.column(column)
    steps = np.diff([0.0, *straight.column("flops")])
    assert steps[0] == steps[1] > steps[2] == steps[3]
    assert steps[2] == pytest.approx(plain.column("flops")[-1] - plain.column("flops")[-2])
    paper = np.diff([0.0, *straight.column("flops_paper")])
    # 2 N_teacher + 6 L H Q T a token; 2 N =
    # 2 x 384 x 48 + 2 (96 x 48 + 48^2 + 3 x 256 x 48 + 96) + 48 parameters
    per_token = 2 * 124_656 + 6 * 2 * 48 * SEQ_LENGTH
    assert paper[1] - paper[2] == per_token * 2 * ROWS * SEQ_LENGTH


@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_that_continues_is_the_run(
    data: list[str], teacher: Path, start: Path, tmp_path: Path, stage: int
) -> None:
    def fn(rank: int) -> list[tuple[Outcome, ...]]:
        pairs = []
        for name in ("eslm", "uncertainty"):
            flags = (*methods(teacher, start)[name], "--zero-stage", stage, *STEPS)

            def after(
                label: str, *more: str | Path, name: str = name, flags: tuple = flags
            ) -> Outcome:
                return train(
                    words(data, *flags, *more, micro_batch_size=ROWS // 2),
                    tmp_path / f"{name}-{label}.jsonl",
                )

            half = tmp_path / name
            whole = after("whole")
            after("half", "--save", half, "--exit-interval", "2")
            first = ("--distill-teacher", start / "weights") if name == "uncertainty" else ()
            pairs.append((whole, after("rest", "--load", half, *first)))
        return pairs

    for whole, rest in run_ranks(2, fn, timeout=240)[0]:
        for column in ("loss", "grad_norm", "flops", "flops_paper", "tokens_trained"):
            assert rest.column(column) == whole.column(column)[2:], column


FLOPS_CASES = {
    "dense": ("--selection", "clm", "--distill", "dense"),
    "eslm": ("--eslm-alpha", "0.3", "--distill", "eslm"),
    "recompute": ("--eslm-alpha", "0.3", "--distill", "eslm", "--head-logits", "recompute"),
    "salt": ("--selection", "clm", "--distill", "salt", "--salt-iters", "2"),
}


@pytest.mark.parametrize("name", [*FLOPS_CASES, "uncertainty"])
def test_ledgers(data: list[str], teacher: Path, start: Path, tmp_path: Path, name: str) -> None:
    """The executed one is what torch counts, and a dry run promises both."""
    flags: tuple[str | Path, ...] = ("--selection", "uncertainty", "--load", start / "weights")
    if name in FLOPS_CASES:
        flags = (*FLOPS_CASES[name], "--distill-teacher", teacher / "checkpoints")

    def fn(rank: int) -> tuple[str, list[int], Outcome]:
        found: list[list[int]] = []
        argv = words(data, *flags, iters=3)
        init_distributed()
        text, refused = dry_run(parse_run([*argv, "--dry-run"], 1))
        assert refused is None
        outcome = train(argv, tmp_path / "m.jsonl", lambda t: found.append(counted(t)))
        return text, found[0], outcome

    text, found, outcome = run_ranks(1, fn)[0]
    ledger = outcome.column("flops")
    for step in range(3):
        assert ledger[step] == pytest.approx(sum(found[: step + 1]), rel=0.01)
    assert number(text, "FLOPs executed") == pytest.approx(ledger[-1], rel=1e-3)
    assert number(text, "FLOPs by the paper") == pytest.approx(
        outcome.column("flops_paper")[-1], rel=1e-3
    )
    assert number(text, "tokens trained on") == outcome.column("tokens_trained")[-1]
    assert "+ teacher 0.00" in text


def test_the_last_stage_has_the_teacher_and_the_plan_knows(data: list[str], teacher: Path) -> None:
    flags = ("--num-layers", "6", "--selection", "clm", "--pipeline-model-parallel-size", "2")
    taught = ("--distill", "dense", "--distill-teacher", teacher / "checkpoints")

    def fn(rank: int) -> list[tuple[str, int]]:
        found = []
        for more in ((), taught):
            trainer = build(words(data, *flags, *more, *STEPS))
            objective = (
                type(trainer.engine.model.head.objective).__name__
                if trainer.mesh.is_last_stage
                else "none"
            )
            found.append((objective, len(trainer.engine.model.block_range)))
        return found

    (plain_first, taught_first), (plain_last, taught_last) = run_ranks(2, fn)
    assert (plain_first[0], taught_first[0]) == ("none", "none")
    assert (plain_last[0], taught_last[0]) == ("CausalLM", "Distillation")
    assert taught_last[1] < plain_last[1]


def unusable_teachers(teacher: Path, folder: Path) -> dict[str, Path]:
    """Folders that no run of these tests can learn from, by what is wrong with them."""
    for name in ("vocabulary", "ids", "no tokenizer"):
        shutil.copytree(teacher / "hf", folder / name)
    config = json.loads((teacher / "hf" / "config.json").read_text())
    (folder / "vocabulary" / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    spelling = json.loads((teacher / "hf" / "tokenizer.json").read_text())
    more = {**spelling["added_tokens"][0], "id": 257, "content": "<|sep|>"}
    (folder / "vocabulary" / "tokenizer.json").write_text(
        json.dumps({**spelling, "added_tokens": [*spelling["added_tokens"], more]})
    )
    vocab = spelling["model"]["vocab"]
    vocab["e"], vocab["t"] = vocab["t"], vocab["e"]
    (folder / "ids" / "tokenizer.json").write_text(json.dumps(spelling))
    (folder / "no tokenizer" / "tokenizer.json").unlink()
    (folder / "empty").mkdir()
    shutil.copytree(teacher / "checkpoints", folder / "damaged")
    for file in (folder / "damaged").glob("*/tensors_*.safetensors"):
        file.write_bytes(file.read_bytes()[:-8])
    names = ("vocabulary", "ids", "no tokenizer", "empty", "damaged", "nowhere")
    return {name: folder / name for name in names}


def test_teachers_that_are_refused(data: list[str], teacher: Path, tmp_path: Path) -> None:
    folders = unusable_teachers(teacher, tmp_path)

    def fn(rank: int) -> dict[str, str]:
        messages = {}
        for name, more in (("positions", ("--seq-length", "16")), ("heads", ())):
            folders[name] = tmp_path / name
            heads = ("--num-attention-heads", "3", "--num-query-groups", "3")
            odd = (*heads, *more, "--save", folders[name])
            train(words(data, *TEACHER, *odd, iters=2, micro_batch_size=ROWS // 2))
        dense = ("--selection", "clm", "--distill", "dense", "--distill-teacher")
        for name, folder in folders.items():
            tensor = ("--tensor-model-parallel-size", "2" if name == "heads" else "1")
            messages[name] = refusal(words(data, *dense, folder, *tensor))
        return messages

    messages = run_ranks(2, fn)[0]
    folders |= {name: tmp_path / name for name in ("positions", "heads")}
    for name, wanted in {
        "vocabulary": "has a vocabulary of 258, but the data has one of 257",
        "ids": "was trained with another tokenizer .*: the same text has other ids",
        "no tokenizer": "holds no tokenizer",
        "empty": "contains neither checkpoints .* nor a Hugging Face model",
        "damaged": "contains no complete checkpoint",
        "nowhere": "there is no such folder",
        "positions": "has 16 positions, fewer than --seq-length 32",
        "heads": "has 3 attention heads, which --tensor-model-parallel-size 2 does not divide",
    }.items():
        assert re.search(wanted, messages[name]), (name, messages[name])
        assert messages[name].startswith(f"--distill-teacher {folders[name]}"), messages[name]


def test_post_training_needs_what_it_starts_from(
    data: list[str], start: Path, tmp_path: Path
) -> None:
    def fn(rank: int) -> tuple[str, str]:
        uncertain = ("--selection", "uncertainty", "--load")
        changed = ("--seed", "7", "--allow-method-change")
        trained = refusal(words(data, *uncertain, start / "trained", *changed, iters=5))
        new = refusal(words(data, *uncertain, tmp_path / "new", "--save", tmp_path / "new"))
        return trained, new

    trained, new = run_ranks(1, fn)[0]
    assert "iter_0000004 does not contain. Name them with --distill-teacher" in trained
    assert "contains no checkpoint. Put the weights there" in new
