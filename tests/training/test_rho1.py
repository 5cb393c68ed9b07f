"""Rho-1 in training: with stored losses and online, in every layout, resumed, and refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_eslm.config.run import parse_run
from megatron_eslm.cost.of_run import step_work
from megatron_eslm.cost.stages import plan_stages
from megatron_eslm.data.batch import Batch
from megatron_eslm.data.index_file import read_index
from megatron_eslm.data.reference_losses import (
    ReferenceMeta,
    ReferenceWriter,
    data_fingerprint,
    losses_path,
    positions_of,
)
from megatron_eslm.data.tokenizers.build import ByteTokenizer
from megatron_eslm.frozen.reference import find_reference, load_reference
from megatron_eslm.launch.bootstrap import init_distributed, single_process
from megatron_eslm.parallel.mesh import build_mesh
from megatron_eslm.training.dry_run import dry_run
from megatron_eslm.training.loop import Trainer
from tests.harness import run_ranks

from ..interop.conftest import load_tool
from .conftest import make_domain
from .runs import (
    ROWS,
    SEQ_LENGTH,
    Outcome,
    assert_same_dumps,
    build,
    read_dumps,
    read_metrics,
    refusal,
    train,
    weights_of,
    words,
)
from .test_estimate import number
from .test_flops import counted, counter

ALPHA = 0.3
LEDGERS = ("flops_paper", "flops")
RHO1 = ("--selection", "rho1", "--eslm-alpha", ALPHA, "--global-batch-size", 2 * ROWS)
LAYOUTS = {
    2: {
        "tp2": ("--tensor-model-parallel-size", 2),
        "tp2-sp": ("--tensor-model-parallel-size", 2, "--sequence-parallel"),
        "pp2": ("--pipeline-model-parallel-size", 2),
        "dp2-zero0": ("--zero-stage", 0),
        "dp2-zero1": ("--zero-stage", 1),
        "dp2-zero2": ("--zero-stage", 2),
        "dp2-zero3": ("--zero-stage", 3),
    },
    4: {
        "tp2-pp2": ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2),
        "pp2-dp2": ("--pipeline-model-parallel-size", 2, "--zero-stage", 1),
    },
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two domains of this module's own, since losses come to lie beside them."""
    folder = tmp_path_factory.mktemp("text")
    return [make_domain(folder / name, name, 300) for name in ("prose", "code")]


@pytest.fixture(scope="module")
def reference(text: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The self-reference recipe: plain training on the same text, then its losses, `self`."""
    folder = tmp_path_factory.mktemp("reference") / "run"

    def fn(rank: int) -> Outcome:
        return train(words(text, "--selection", "clm", "--save", folder, "--seed", 9, iters=20))

    run_ranks(1, fn)
    argv = ["--load", folder, "--data-path", *text, "--name", "self", "--seq-length", SEQ_LENGTH]
    assert load_tool("score_reference").main([str(word) for word in argv]) == 0
    return folder


@pytest.fixture(scope="module")
def sources(reference: Path) -> dict[str, tuple[str, str]]:
    return {
        "stored": ("--reference-losses", "self"),
        "online": ("--reference", str(reference)),
    }


@pytest.fixture(scope="module")
def one(
    text: list[str], sources: dict[str, tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Outcome]]:
    """What a single process does, for each source; its dumps are in the folder."""
    folder = tmp_path_factory.mktemp("one")

    def fn(rank: int) -> dict[str, Outcome]:
        return {
            name: train(
                words(text, *RHO1, *flags, "--dump-selection", folder / name),
                folder / f"{name}.jsonl",
            )
            for name, flags in sources.items()
        }

    return folder, run_ranks(1, fn)[0]


def test_a_single_process_keeps_the_largest_excess(
    text: list[str], reference: Path, one: tuple[Path, dict[str, Outcome]]
) -> None:
    folder, outcomes = one
    dumps = {name: read_dumps(folder / name) for name in outcomes}
    with single_process():
        source, cpu = find_reference("--load", str(reference), ByteTokenizer()), torch.device("cpu")
        model = load_reference(source, build_mesh(), cpu, torch.float32)
        first = dumps["online"]["iter0000001.npz"]
        tokens = torch.from_numpy(first["tokens"])
        losses_MT = model(Batch.of(tokens, torch.ones(tokens[:, 1:].shape, dtype=torch.bool)))
    overlaps = []
    for name, dump in dumps["online"].items():
        stored = dumps["stored"][name]
        for each in (dump, stored):
            for scores, kept in zip(
                np.split(each["token_scores"], 2), np.split(each["token_kept"], 2), strict=True
            ):  # two micro-steps
                assert kept.sum() == int((1 - ALPHA) * kept.size)
                assert scores[kept].min() >= scores[~kept].max()
            assert each["instance_kept"].all()
        overlaps.append((dump["token_kept"] == stored["token_kept"]).mean())
    # Windows inside documents are not the packed sequences of training.
    assert 0.6 < np.mean(overlaps) < 1.0
    plain = first["token_scores"] + losses_MT.numpy()
    assert (plain > 0).all()  # the model's own losses
    assert np.ptp(losses_MT.numpy()) > 1.0
    for outcome in outcomes.values():
        assert outcome.column("kept_instances") == [1.0] * 4
        assert np.allclose(outcome.column("kept_tokens"), 1 - ALPHA, atol=0.01)


@pytest.mark.parametrize("world", LAYOUTS)
def test_layouts_keep_the_tokens_of_the_single_process(
    world: int,
    text: list[str],
    sources: dict[str, tuple[str, str]],
    one: tuple[Path, dict[str, Outcome]],
    tmp_path: Path,
) -> None:
    cases = {
        f"{name}-{source}": (layout, source)
        for name, layout in LAYOUTS[world].items()
        for source in sources
    }

    def fn(rank: int) -> dict[str, Outcome]:
        outcomes = {}
        for name, (layout, source) in cases.items():
            sizes = dict(zip(layout[::2], layout[1::2], strict=False))
            dp = world
            for flag in ("--tensor-model-parallel-size", "--pipeline-model-parallel-size"):
                dp //= int(sizes.get(flag, 1))
            argv = words(
                text,
                *(*RHO1, *sources[source], *layout, "--dump-selection", tmp_path / name),
                micro_batch_size=ROWS // dp,
            )
            outcomes[name] = train(argv, tmp_path / f"{name}.jsonl")
        return outcomes

    folder, expected = one
    outcomes = run_ranks(world, fn, timeout=300.0)[0]
    for name, (_, source) in cases.items():
        assert_same_dumps(tmp_path / name, folder / source)
        for column in ("loss", "grad_norm", "tau_token", "cvar"):
            a, b = outcomes[name].column(column), expected[source].column(column)
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=f"{name} {column}")


EXCESS = (
    *("--selection", "eslm", "--eslm-score", "excess", "--eslm-alpha", "0.25"),
    *("--eslm-scope", "step", "--global-batch-size", 4 * ROWS, "--eslm-overtaken", "keep"),
)


@pytest.mark.parametrize("kind", ["stored", "online"])
def test_excess_at_both_levels_is_the_same_in_every_layout(
    kind: str, text: list[str], sources: dict[str, tuple[str, str]], tmp_path: Path
) -> None:
    pp, tp = "--pipeline-model-parallel-size", "--tensor-model-parallel-size"
    layouts = {"one": (1, ()), "pp2": (2, (pp, 2)), "tp2": (2, (tp, 2)), "pp2dp2": (4, (pp, 2))}
    outcomes = {}
    for name, (world, flags) in layouts.items():
        dp = 2 if "dp2" in name else 1
        argv = words(
            text,
            *(*EXCESS, *sources[kind], "--eslm-proxy-stride", 2, *flags),
            *("--dump-selection", tmp_path / name),
            micro_batch_size=ROWS // dp,
        )
        metrics = tmp_path / f"{name}.jsonl"
        outcomes[name] = run_ranks(world, lambda rank, a=argv, m=metrics: train(a, m))[0]
    for name in layouts:
        assert_same_dumps(tmp_path / name, tmp_path / "one")
        for column in ("loss", "tau_instance", "tau_token"):
            a, b = outcomes[name].column(column), outcomes["one"].column(column)
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=f"{name} {column}")
    assert outcomes["one"].column("kept_instances") == [0.75] * 4
    first = read_dumps(tmp_path / "one")["iter0000001.npz"]
    kept = first["instance_kept"]
    assert first["instance_scores"][kept].min() >= first["instance_scores"][~kept].max()
    # By excess, not by loss: losses of an untrained model over 257 bytes are above 5.
    assert first["instance_scores"].max() < 5.0


def test_stored_losses_choose_as_the_model_does_but_for_rounding(
    text: list[str], sources: dict[str, tuple[str, str]], tmp_path: Path
) -> None:
    """Losses of the contexts of training, stored, give the scores of the live model."""

    def fn(rank: int) -> None:
        dump = ("--dump-selection", tmp_path / "online")
        trainer = build(words(text, *EXCESS, *sources["online"], *dump))
        model = trainer.engine.model.policy.reference
        assert model is not None
        mixture = trainer.datasets.train
        by_domain = [np.zeros(read_index(prefix).tokens, np.float32) for prefix in text]
        for sample in range(4 * 4 * ROWS):
            tokens = mixture[sample]["tokens"][None]
            losses_MT = model(Batch.of(tokens, torch.ones(tokens[:, 1:].shape, dtype=torch.bool)))
            domain, index = mixture.domain_of(sample), int(mixture._index_in_domain[sample])
            positions_T = positions_of(mixture._parts[domain], index)[1:]
            by_domain[domain][positions_T] = losses_MT[0].numpy()
        trainer.train()
        for prefix, losses in zip(text, by_domain, strict=True):
            index = read_index(prefix)
            meta = ReferenceMeta(
                data=data_fingerprint(index),
                weights="w" * 64,
                seq_length=SEQ_LENGTH,
                dtype="float32",
                tokens=index.tokens,
            )
            with ReferenceWriter(prefix, "in-context", meta) as writer:
                writer.append(losses)
        dump = ("--dump-selection", tmp_path / "stored")
        train(words(text, *EXCESS, "--reference-losses", "in-context", *dump))

    run_ranks(1, fn)
    online, stored = (read_dumps(tmp_path / name) for name in ("online", "stored"))
    a, b = online["iter0000001.npz"], stored["iter0000001.npz"]
    for scores in ("instance_scores", "token_scores"):
        # Half a unit of float16 below 8 nats.
        np.testing.assert_allclose(a[scores], b[scores], atol=2**-9 + 1e-5, err_msg=scores)
        assert not np.array_equal(a[scores], b[scores], equal_nan=True)
    same = [(a[key] == b[key]).mean() for key in ("instance_kept", "token_kept")]
    assert min(same) > 0.98


@pytest.mark.parametrize("head", ["keep", "recompute"])
def test_ledgers(
    text: list[str], sources: dict[str, tuple[str, str]], tmp_path: Path, head: str
) -> None:
    """The executed one is what torch counts, and a dry run promises both."""

    def fn(rank: int) -> dict[str, tuple[str, list[int], Outcome]]:
        results = {}
        init_distributed()
        for name, flags in sources.items():
            found: list[list[int]] = []
            argv = words(text, *RHO1, *flags, "--head-logits", head, iters=2)
            promised, refused = dry_run(parse_run([*argv, "--dry-run"], 1))
            assert refused is None
            metrics = tmp_path / f"{name}.jsonl"
            outcome = train(argv, metrics, lambda t, found=found: found.append(counted(t)))
            results[name] = promised, found[0], outcome
        return results

    results = run_ranks(1, fn)[0]
    for promised, found, outcome in results.values():
        ledger, paper = outcome.column("flops"), outcome.column("flops_paper")
        assert ledger[0] == pytest.approx(found[0], rel=0.01)
        assert ledger[1] == pytest.approx(sum(found), rel=0.01)
        assert number(promised, "FLOPs executed") == pytest.approx(ledger[-1], rel=1e-3)
        assert number(promised, "FLOPs by the paper") == pytest.approx(paper[-1], rel=1e-3)
        assert number(promised, "tokens trained on") == outcome.column("tokens_trained")[-1]
    (online, _, on), (stored, _, off) = results["online"], results["stored"]
    assert "+ reference 0.00" in online and "reference" not in stored
    # A token read: 2 N + 6 L H Q T of the reference model, which has the shape of the one that
    # trains (test_estimate); forward in three blocks 2 x 12 x 32^2 + 4 x 32 x 32 each, and 384
    # logits.
    tokens = 2 * 2 * ROWS * SEQ_LENGTH
    paper, executed = (on.column(name)[-1] - off.column(name)[-1] for name in LEDGERS)
    assert paper == pytest.approx(tokens * (2 * 51_488 + 6 * 3 * 32 * SEQ_LENGTH))
    assert executed == pytest.approx(tokens * (3 * (24 * 32**2 + 4 * 32**2) + 2 * 32 * 384))


@pytest.mark.parametrize("level", ["both", "instance"])
@pytest.mark.parametrize("scope", ["step", "global"])
def test_ledgers_of_a_reference_that_scores_sequences(
    text: list[str], reference: Path, tmp_path: Path, scope: str, level: str
) -> None:
    def count(trainer: Trainer, found: list[int]) -> None:
        """Whole steps: candidates are scored before the engine's step."""
        ordinary = trainer._step

        def step(*args):
            with counter() as mode:
                outcome = ordinary(*args)
            found.append(mode.get_total_flops())
            return outcome

        trainer._step = step  # type: ignore[method-assign]

    def fn(rank: int) -> tuple[str, list[int], Outcome]:
        init_distributed()
        found: list[int] = []
        flags = ("--reference", reference, "--eslm-scope", scope, "--eslm-level", level)
        argv = words(text, *EXCESS, *flags, iters=2)
        promised, refused = dry_run(parse_run([*argv, "--dry-run"], 1))
        assert refused is None
        outcome = train(argv, tmp_path / "m.jsonl", lambda t: count(t, found))
        return promised, found, outcome

    promised, found, outcome = run_ranks(1, fn)[0]
    assert outcome.column("flops")[1] == pytest.approx(sum(found), rel=0.01)
    for name, ledger in (("executed", "flops"), ("by the paper", "flops_paper")):
        expected = pytest.approx(outcome.column(ledger)[-1], rel=1e-3)
        assert number(promised, f"FLOPs {name}") == expected


def test_the_last_stage_has_the_reference_and_the_plan_knows(
    text: list[str], sources: dict[str, tuple[str, str]]
) -> None:
    def fn(rank: int) -> list[tuple[int, bool, int, float]]:
        results = []
        for flags in sources.values():
            layout = ("--num-layers", 6, "--pipeline-model-parallel-size", 2)
            argv = words(text, *RHO1, *flags, *layout, iters=2)
            found: list[tuple[list[int], Trainer]] = []
            train(argv, None, lambda t, found=found: found.append((counted(t), t)))
            ((products, trainer),) = found
            run = trainer.run
            plan = plan_stages(run, run.shape(257), trainer.flops, step_work(run))
            here = trainer.engine.model.policy.reference is not None
            told = plan.flops[trainer.mesh.pp_rank]
            results.append((len(trainer.engine.model.block_range), here, products[0], told))
        return results

    (stored_first, online_first), (stored_last, online_last) = run_ranks(2, fn)
    assert online_last[0] < stored_last[0]
    assert [stage[1] for stage in (stored_first, online_first, stored_last)] == [False] * 3
    assert online_last[1]
    for _, _, products, told in (stored_first, online_first, stored_last, online_last):
        assert products == pytest.approx(told, rel=0.01)


def test_local_thresholds_are_each_ranks_own(
    text: list[str], sources: dict[str, tuple[str, str]], tmp_path: Path
) -> None:
    def fn(rank: int) -> None:
        for name, flags in sources.items():
            train(
                words(
                    text,
                    *(*RHO1, *flags, "--eslm-scope", "local"),
                    *("--dump-selection", tmp_path / name),
                    iters=2,
                    micro_batch_size=ROWS // 2,
                )
            )

    run_ranks(2, fn)
    for name in sources:
        for dump in read_dumps(tmp_path / name).values():
            for scores, kept in zip(
                np.split(dump["token_scores"], 4), np.split(dump["token_kept"], 4), strict=True
            ):  # two micro-steps of two ranks
                assert kept.sum() == int((1 - ALPHA) * kept.size)
                assert scores[kept].min() >= scores[~kept].max()


def test_resume_is_exact_and_the_reference_stays_frozen(
    text: list[str], sources: dict[str, tuple[str, str]], tmp_path: Path
) -> None:
    def fn(rank: int) -> list[tuple[str, Outcome, Outcome]]:
        results = []
        for name, flags in {**sources, "noisy": sources["online"]}.items():
            noise = ("--label-noise", 0.2) if name == "noisy" else ()

            def argv(folder: Path, *more, flags=flags, noise=noise):
                start = (*RHO1, *flags, *noise, "--dump-selection", f"{folder}-dump")
                return words(text, *start, "--save", folder, *more, micro_batch_size=ROWS // 2)

            frozen = []

            def keep(trainer: Trainer, frozen=frozen) -> None:
                model = trainer.engine.model.policy.reference
                frozen.append(model)
                if model is not None:
                    frozen.append(model.fingerprint())
                names = weights_of(trainer)
                assert not any("reference" in name for name in names)

            straight = tmp_path / f"{name}-straight"
            whole = train(argv(straight), straight.with_suffix(".jsonl"), keep)
            if name != "stored":
                model, fingerprint = frozen
                assert model.fingerprint() == fingerprint
            halves = tmp_path / f"{name}-halves"
            train(argv(halves, "--exit-interval", 2), halves.with_suffix(".jsonl"))
            rest = train(argv(halves, "--load", halves), halves.with_suffix(".jsonl"))
            results.append((name, whole, rest))
        return results

    for name, whole, rest in run_ranks(2, fn)[0]:
        for column in ("loss", "grad_norm", "tau_token"):
            assert whole.column(column) == rest.column(column), (name, column)
        ours, theirs = (tmp_path / f"{name}-{run}-dump" for run in ("halves", "straight"))
        assert_same_dumps(ours, theirs, exact=True)
    run = json.loads(next(iter((tmp_path / "noisy-halves").glob("*/run.json"))).read_text())
    assert run["data"]["label_noise"] == 0.2
    run = json.loads(next(iter((tmp_path / "stored-halves").glob("*/run.json"))).read_text())
    facts = json.loads(losses_path(text[0], "self").with_suffix(".json").read_text())
    assert run["data"]["reference_losses"] == facts["weights"]
    assert run["data"]["label_noise"] is None


def test_label_noise_changes_training_and_not_validation(text: list[str], tmp_path: Path) -> None:
    def argv(*more: str | float) -> list[str]:
        return words(text, "--global-batch-size", 2 * ROWS, "--selection", "clm", *more)

    def fn(rank: int) -> list[str]:
        noise = ("--label-noise", 0.3)
        train(argv(), tmp_path / "plain.jsonl")
        train(argv("--label-noise", 0.0), tmp_path / "none.jsonl")
        train(argv(*noise), tmp_path / "noisy.jsonl")
        train(argv("--selection", "eslm", *noise), tmp_path / "eslm.jsonl")
        train(argv("--save", tmp_path / "run", *noise, "--exit-interval", 2))
        more = ("--save", tmp_path / "other", "--load", tmp_path / "run")
        return [refusal(argv(*more)), refusal(argv(*more, "--label-noise", 0.2))]

    def split(rank: int) -> None:
        for stage in (0, 3):
            more = ("--label-noise", 0.3, "--zero-stage", stage)
            half = ("--micro-batch-size", ROWS // 2)
            train(argv(*more, *half), tmp_path / f"dp2-{stage}.jsonl")
        more = ("--label-noise", 0.3, "--pipeline-model-parallel-size", 2)
        train(argv(*more), tmp_path / "pp2.jsonl")

    messages = run_ranks(1, fn)[0]
    run_ranks(2, split)
    steps = {path.stem: read_metrics(path) for path in tmp_path.glob("*.jsonl")}

    def column(run: str, name: str) -> list:
        return [line[name] for line in steps[run] if line["iteration"] > 0]

    # Not to the bit: nothing of the noise is in a run without it.
    for name in ("loss", "grad_norm", "valid_loss"):
        assert column("plain", name) == column("none", name)
    assert steps["plain"][0]["valid_loss"] == steps["noisy"][0]["valid_loss"]
    assert column("plain", "loss")[0] != column("noisy", "loss")[0]
    assert column("eslm", "loss")[0] != column("noisy", "loss")[0]
    for run in ("dp2-0", "dp2-3", "pp2"):
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(
                column(run, name), column("noisy", name), rtol=1e-4, atol=1e-5
            )
    assert "label_noise: 0.3 there, None here" in messages[0]
    assert "label_noise: 0.3 there, 0.2 here" in messages[1]


def test_refusals(text: list[str], reference: Path, tmp_path: Path) -> None:
    other = make_domain(tmp_path / "other", "code", 300, seed=1)

    def fn(rank: int) -> dict[str, str]:
        def refused(*flags: str | int | Path, data: list[str] = text) -> str:
            return refusal(words(data, *flags))

        rho1 = ("--selection", "rho1")
        online, stored = ("--reference", reference), ("--reference-losses", "self")
        build(words(text, *rho1, *online))
        return {
            "nothing": refused(*rho1),
            "both": refused(*rho1, *online, *stored),
            "path": refused(*rho1, "--reference-losses", "runs/self"),
            "eslm": refused(*online),
            "clm": refused("--selection", "clm", *stored),
            "excess": refused("--eslm-score", "excess"),
            "no losses": refused(*rho1, "--reference-losses", "none"),
            "other text": refused(*rho1, *stored, data=[text[0], other]),
            "no folder": refused(*rho1, "--reference", tmp_path / "none"),
            "too long": refused(*rho1, *online, "--seq-length", 64),
        }

    messages = run_ranks(1, fn)[0]
    for case, part in {
        "nothing": "--selection rho1 needs the losses of a reference model. Score the text once",
        "both": f"--reference {reference} and --reference-losses self are two sources",
        "path": "--reference-losses 'runs/self' is not a name",
        "eslm": "--reference has no meaning with --selection eslm",
        "clm": "--reference-losses has no meaning with --selection clm",
        "excess": "--eslm-score excess needs the losses of a reference model. Score the text once",
        "no losses": f"--reference-losses none: {losses_path(text[0], 'none')}",
        "other text": f"--reference-losses self: {losses_path(other, 'self')}",
        "no folder": f"--reference {tmp_path / 'none'} cannot be used as a reference model: there",
        "too long": "has 32 positions, fewer than --seq-length 64",
    }.items():
        assert part in messages[case], (case, messages[case])

    # Losses that were made of other text under the same name.
    for suffix in (".npy", ".json"):
        mine = losses_path(text[1], "self").with_suffix(suffix)
        losses_path(other, "self").with_suffix(suffix).write_bytes(mine.read_bytes())

    def again(rank: int) -> list[str]:
        stored = ("--selection", "rho1", "--reference-losses", "self")
        layout = ("--tensor-model-parallel-size", 4, "--hidden-size", 32)
        wide = ("--num-attention-heads", 4, "--selection", "rho1", "--reference", reference)
        return [refusal(words([text[0], other], *stored)), refusal(words(text, *layout, *wide))]

    message, narrow = run_ranks(4, again)[0]
    assert f"was made from other text than {other}.bin" in message
    assert "has 2 attention heads, which --tensor-model-parallel-size 4 does not divide" in narrow
    assert "or score the text once with tools/score_reference.py" in narrow
