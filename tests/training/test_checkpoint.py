"""Checkpoints: complete or absent, refused with the reason, and what a run may continue from."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from megatron_eslm.checkpoint import manifest as manifests
from megatron_eslm.checkpoint import save_folder, tensor_files
from megatron_eslm.checkpoint.find import find_checkpoint
from megatron_eslm.checkpoint.save_folder import SaveFolder
from megatron_eslm.checkpoint.weights import read_weights, write_weights
from megatron_eslm.data.preprocess import preprocess
from megatron_eslm.data.tokenizers.build import HuggingFaceTokenizer
from megatron_eslm.data.tokenizers.train_bpe import train_bpe
from megatron_eslm.errors import ConfigError
from megatron_eslm.training.loop import Trainer
from tests.harness import RankFailed, run_ranks

from .conftest import make_domain
from .runs import Outcome, refusal, train, weights_of, words


@pytest.fixture(scope="module")
def saved(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank with checkpoints of iterations 2 and 4. Not to be changed."""
    folder = tmp_path_factory.mktemp("saved") / "run"

    def fn(rank: int) -> None:
        train(words(data, "--save", folder, "--save-interval", "2"), folder.parent / "m.jsonl")

    run_ranks(1, fn)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """The same to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def names(folder: Path) -> list[str]:
    return [p.name for p in manifests.list_checkpoints(folder)]


def leftovers(folder: Path) -> list[Path]:
    """What a killed save leaves, the lock aside: nobody holds that any more."""
    return [path for path in folder.glob(".*") if path.name != ".lock"]


def test_what_a_checkpoint_holds(saved: Path) -> None:
    assert names(saved) == ["iter_0000004", "iter_0000002"]
    found = find_checkpoint(saved)
    assert (found.folder.name, found.kind) == ("iter_0000004", "training")
    assert found.shape.num_layers == 3 and found.shape.vocab_size == 257
    assert found.tokenizer_dir is not None and any(found.tokenizer_dir.iterdir())
    assert found.run["options"]["training"]["train_iters"] == 4
    assert [d["name"] for d in found.run["domains"]] == ["prose", "code"]
    state = found.state()
    assert (state.iteration, state.consumed_samples, state.tokens) == (4, 32, 4 * 8 * 32)
    index = json.loads((found.folder / "tensors.json").read_text())
    assert index["adam_step"] == 4 and index["loss_scale"] is None
    assert index["tensors"]["blocks.2.mlp.down.weight"] == {
        "shape": [32, 128],
        "dim": 1,
        "pieces": [{"file": "tensors_00000.safetensors", "begin": 0, "end": 128}],
    }
    with safetensors.safe_open(found.folder / "tensors_00000.safetensors", "pt") as file:
        kinds = ("weight", "exp_avg", "exp_avg_sq")
        assert set(file.keys()) == {f"{k}/{name}" for k in kinds for name in index["tensors"]}
        # The vocabulary without padding, which depends on the layout.
        assert file.get_tensor("exp_avg/embedding.word.weight").shape == (257, 32)
    manifest = json.loads((found.folder / "manifest.json").read_text())
    assert set(manifest["files"]) == set(manifests.files_of(found.folder))
    assert (saved / "latest").read_text() == "iter_0000004\n"
    assert not leftovers(saved)


def test_one_checkpoint_can_be_named(saved: Path) -> None:
    assert find_checkpoint(saved / "iter_0000002").state().iteration == 2
    assert find_checkpoint(saved, "iter_0000002").state().iteration == 2
    with pytest.raises(ConfigError, match="iter_0000003 is not a checkpoint"):
        find_checkpoint(saved, "iter_0000003")


def the_weights_file(folder: Path) -> Path:
    return folder / "tensors_00000.safetensors"


def truncate(folder: Path) -> None:
    file = the_weights_file(folder)
    os.truncate(file, file.stat().st_size - 100)


def flip(file: Path, at: int, bit: int = 1) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= bit
    file.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, r"tensors_00000\.safetensors has \d+ bytes instead of \d+"),
    "flipped byte": (
        lambda f: flip(the_weights_file(f), 5000),
        r"the contents of tensors_00000\.safetensors have changed",
    ),
    "missing file": (lambda f: (f / "state.json").unlink(), r"state\.json is missing"),
    "missing manifest": (lambda f: (f / "manifest.json").unlink(), r"it has no manifest\.json"),
    "torn manifest": (
        lambda f: os.truncate(f / "manifest.json", 60),
        r"manifest\.json has changed since it was written",
    ),
    "manifest no object": (
        lambda f: (f / "manifest.json").write_text("[]"),
        r"manifest\.json has changed since it was written",
    ),
    "an older format": (
        lambda f: (f / "manifest.json").write_text('{"format": "megatron_eslm/2"}'),
        r"was saved by an earlier version \(format 'megatron_eslm/2'.*tools/convert_to_hf\.py",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    copy: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    do, reason = DAMAGE[damage]
    do(copy / "iter_0000004")
    with pytest.raises(ConfigError, match=reason) as caught:
        manifests.verify(copy / "iter_0000004")
    assert "iter_0000004" in str(caught.value)
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(copy).folder.name == "iter_0000002"
    assert "iter_0000004" in caplog.text and "Trying the previous checkpoint" in caplog.text
    do(copy / "iter_0000002")
    with pytest.raises(ConfigError, match=reason) as caught:
        find_checkpoint(copy)
    for part in ("contains no complete checkpoint", "iter_0000002", "iter_0000004"):
        assert part in str(caught.value)


def test_folders_that_hold_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--load .*none: there is no such folder"):
        find_checkpoint(tmp_path / "none")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"contains no checkpoint .*tools/convert_from_hf\.py"):
        find_checkpoint(tmp_path / "hf")


def test_training_goes_on_from_the_newest_whole_one(
    data: list[str], saved: Path, copy: Path, tmp_path: Path
) -> None:
    truncate(copy / "iter_0000004")
    shutil.copytree(copy / "iter_0000002", copy / ".saving-iter_0000006")  # a killed save

    def fn(rank: int) -> Outcome:
        argv = words(data, "--save", copy, "--load", copy, "--keep-last", "1")
        return train(argv, tmp_path / "m.jsonl")

    outcome = run_ranks(1, fn)[0]
    assert outcome.column("iteration") == [3, 4]
    assert not leftovers(copy)
    # Iteration 4 has been saved anew, and is whole.
    assert find_checkpoint(copy).folder.name == "iter_0000004"
    for name, tensor in read_weights(saved).weights.items():
        assert torch.equal(tensor, read_weights(copy).weights[name])


def test_the_checkpoint_just_saved_stays_beside_newer_ones(
    data: list[str], copy: Path, tmp_path: Path
) -> None:
    """Back at iteration 2 for damage, saving 3 must not remove 3 because 4 is there."""
    truncate(copy / "iter_0000004")

    def fn(rank: int) -> None:
        argv = ("--save", copy, "--load", copy, "--keep-last", "1")
        train(words(data, *argv, "--exit-interval", "3"))

    run_ranks(1, fn)
    assert "iter_0000003" in names(copy)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def while_writing(trainer: Trainer) -> None:
    write_file = tensor_files.write_file

    def patched(path: Path, *args):
        write_file(path, *args)
        if path.parent.name.startswith(".saving-iter_0000004"):
            truncate(path.parent)
            kill()

    tensor_files.write_file = patched


def before_the_manifest(trainer: Trainer) -> None:
    publish = SaveFolder.publish

    def patched(saves: SaveFolder, draft: Path, manifest: manifests.Manifest):
        return kill() if manifest.iteration == 4 else publish(saves, draft, manifest)

    SaveFolder.publish = patched


def before_the_rename(trainer: Trainer) -> None:
    sync_file = save_folder.sync_file

    def patched(path: Path):
        kill() if path.parent.name.startswith(".saving-iter_0000004") else sync_file(path)

    save_folder.sync_file = patched


def while_pruning(trainer: Trainer) -> None:
    rmtree = shutil.rmtree

    def patched(path, **kwargs):
        if Path(path).name.startswith(".removing-"):
            (Path(path) / "run.json").unlink()
            kill()
        rmtree(path, **kwargs)

    shutil.rmtree = patched


@pytest.mark.parametrize(
    ("moment", "survivor"),
    [(while_writing, 2), (before_the_manifest, 2), (before_the_rename, 2), (while_pruning, 4)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_kill_9_during_a_save(
    data: list[str], saved: Path, tmp_path: Path, moment: Callable, survivor: int
) -> None:
    save = tmp_path / "run"

    def killed(rank: int) -> None:
        argv = ("--save", save, "--save-interval", "2", "--keep-last", "1")
        train(words(data, *argv, iters=6), prepare=moment)

    with pytest.raises(RankFailed, match=r"ended without a result.*exit code -9"):
        run_ranks(1, killed)
    assert names(save) == [f"iter_000000{survivor}"] and leftovers(save)
    assert find_checkpoint(save).state().iteration == survivor

    def again(rank: int) -> Outcome:
        argv = ("--save", save, "--load", save, "--save-interval", "2")
        return train(words(data, *argv, iters=6), tmp_path / "m.jsonl")

    outcome = run_ranks(1, again)[0]
    assert outcome.column("iteration") == list(range(survivor + 1, 7))
    assert not leftovers(save) and names(save)[0] == "iter_0000006"


def test_keep_last(data: list[str], tmp_path: Path) -> None:
    def fn(rank: int) -> None:
        for keep in (0, 1, 2):
            argv = ("--save", tmp_path / f"{keep}", "--save-interval", "1", "--keep-last", keep)
            train(words(data, *argv))

    run_ranks(1, fn)
    assert [len(names(tmp_path / f"{keep}")) for keep in (0, 1, 2)] == [4, 1, 2]
    assert names(tmp_path / "2") == ["iter_0000004", "iter_0000003"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left"), SafetensorError("I/O error: no space")]
)
def test_a_full_disk_on_one_rank_ends_all_with_the_earlier_checkpoint(
    data: list[str], tmp_path: Path, error: Exception
) -> None:
    save = tmp_path / "run"

    def fn(rank: int) -> str:
        save_file = safetensors.torch.save_file

        def patched(tensors: dict, path: Path, metadata: dict | None = None) -> None:
            save_file(tensors, path, metadata)
            if "iter_0000004" in str(path) and rank == 1:
                raise error

        safetensors.torch.save_file = patched
        argv = words(data, "--save", save, "--save-interval", "2", micro_batch_size=4)
        with pytest.raises(ConfigError) as caught:
            train(argv)
        return str(caught.value)

    texts = run_ranks(2, fn)
    assert texts[0] == texts[1]
    assert f"--save {save}" in texts[0] and "earlier ones are untouched" in texts[0]
    assert "(on rank 1)" in texts[0]
    assert names(save) == ["iter_0000002"] and find_checkpoint(save)
    assert not leftovers(save)  # which would keep the disk full


def test_what_a_checkpoint_does_not_fit_is_refused(
    data: list[str], saved: Path, tmp_path: Path
) -> None:
    other = [make_domain(tmp_path / "prose", "prose", 400, seed=1), data[1]]
    texts = [f"{n} def return import again and again {n * n}" for n in range(2000)]
    (tmp_path / "bpe").mkdir()
    train_bpe(texts, 300, tmp_path / "bpe" / "tokenizer.json")
    bpe = HuggingFaceTokenizer(tmp_path / "bpe" / "tokenizer.json")
    for name in ("a", "b"):
        preprocess([name], str(tmp_path / "bpe" / name), bpe, documents=texts)
    bpe_data = [str(tmp_path / "bpe" / name) for name in ("a", "b")]
    cases: dict[str, tuple[list[str], list[str]]] = {
        "shape": (
            words(data, "--hidden-size", "64"),
            ["another shape", "hidden_size: 32 there, 64 here"],
        ),
        "positions": (
            words(data, "--seq-length", "16"),
            ["another shape", "max_position_embeddings: 32 there, 16 here"],
        ),
        "data": (words(other), ["other data or in another order", "fingerprint"]),
        "weights": (
            ["--data-path", "0.5", data[0], "0.5", *words(data)[4:]],
            ["weights: [3, 2] there, [1, 1] here", "--allow-data-change"],
        ),
        "seed": (words(data, "--seed", "7"), ["seed: 1234 there, 7 here"]),
        "batch": (
            words(data, "--global-batch-size", "16"),
            ["global_batch_size: 8 there, 16 here", "--allow-data-change"],
        ),
        "split": (words(data, "--split", "90,5,5"), ["split: 98,1,1 there, 18,1,1 here"]),
        "eod": (words(data, "--eod-mask-loss"), ["eod_mask_loss: False there, True here"]),
        "tokenizer": (
            words(bpe_data, "--max-epochs", "9"),
            ["another shape", f"vocab_size: 257 there, {bpe.vocab_size} here"],
        ),
        "done": (words(data), ["is at iteration 4", "--train-iters is 4", "Raise --train-iters"]),
        "none": (
            words(data, "--load", tmp_path / "none"),
            [f"--load {tmp_path / 'none'}: there is no such folder"],
        ),
    }

    def fn(rank: int) -> dict[str, str]:
        load = ["--load", str(saved)]
        return {
            name: refusal([*argv] if "--load" in argv else [*argv, *load])
            for name, (argv, _) in cases.items()
        }

    for name, text in run_ranks(1, fn)[0].items():
        for part in cases[name][1]:
            assert part in text, (name, text)
        assert str(saved) in text or name == "none"

    def two(rank: int) -> str:
        # Another number of ranks is fine, another global micro-batch is not.
        return refusal(words(data, "--load", saved))

    for text in run_ranks(2, two):
        assert "micro_batch_rows: 8 there, 16 here" in text


def test_repeated_data_keeps_its_number_of_epochs(data: list[str], tmp_path: Path) -> None:
    """With more than one epoch the order depends on their number; megatron-core shuffles so."""
    short = [make_domain(tmp_path / name, name, 60) for name in ("prose", "code")]

    def fn(rank: int) -> list[str]:
        flags = ("--split", "50,50,0", "--max-epochs", "9")
        texts = []
        # Also where it is the longer run alone that reads something twice.
        for iters in (60, 5):
            save = tmp_path / f"{iters}"
            train(words(short, *flags, "--save", save, iters=iters))
            texts.append(refusal(words(short, *flags, "--load", save, iters=80)))
        return texts

    texts = run_ranks(1, fn)[0]
    assert re.search(r"\(epochs: \[\d+, \d+\] there, \[\d+, \d+\] here\)", texts[0])
    assert re.search(r"\(epochs: None there, \[\d+, \d+\] here\)", texts[1])
    for text in texts:
        assert "their order depends on the number of epochs (--train-iters" in text
        assert "--allow-data-change" in text


# ZeRO 3 last, which leaves DeepSpeed in another state.
LAYOUTS = {
    f"{kind}-zero{stage}": (*flags, "--zero-stage", str(stage))
    for stage in range(4)
    for kind, flags in {"float32": (), "bf16": ("--bf16",)}.items()
    if kind == "float32" or stage
}


def test_weights_are_read_from_every_layout(data: list[str], tmp_path: Path) -> None:
    """The same run in float32 gives the same weights; bf16 gives its float32 masters."""

    def fn(rank: int) -> dict[str, dict]:
        found = {}
        for name, flags in LAYOUTS.items():
            trainers: list[Trainer] = []
            argv = words(data, "--save", tmp_path / name, *flags, iters=3, micro_batch_size=4)
            train(argv, prepare=trainers.append)
            found[name] = weights_of(trainers[0])
        return found

    weights = {}
    for name, computed in run_ranks(2, fn)[0].items():
        read = read_weights(tmp_path / name)
        weights[name] = read.weights
        assert read.iteration == 3 and read.tokenizer_dir is not None
        assert read.weights.keys() == computed.keys()
        for key, tensor in computed.items():
            assert read.weights[key].dtype == torch.float32
            assert torch.equal(read.weights[key].to(tensor.dtype), tensor), (name, key)
        assert not read.weights["embedding.word.weight"][257:].any()
    for name in ("float32-zero1", "float32-zero2", "float32-zero3"):
        for key, tensor in weights["float32-zero0"].items():
            # The loss does not depend on the keys' biases: what moves them is rounding.
            atol = 5e-3 if key.endswith("qkv.bias") else 1e-6
            torch.testing.assert_close(weights[name][key], tensor, rtol=0, atol=atol)
    for stage in (1, 2, 3):  # not cut down to bf16
        word = weights[f"bf16-zero{stage}"]["embedding.word.weight"]
        assert not torch.equal(word, word.bfloat16().float())


def test_a_run_can_start_from_weights_alone(data: list[str], saved: Path, tmp_path: Path) -> None:
    source = read_weights(saved)
    start = tmp_path / "start"
    folder = write_weights(start, source.weights, source.shape, source.tokenizer_dir, "a test")
    assert folder.name == "iter_0000000" and find_checkpoint(start).kind == "weights"
    for name, tensor in read_weights(start).weights.items():
        assert torch.equal(tensor, source.weights[name])
    with pytest.raises(ConfigError, match=f"--save {start} already holds checkpoints"):
        write_weights(start, source.weights, source.shape, None, "again")

    def fn(rank: int) -> tuple[Outcome, str]:
        # Another layout than where the weights come from.
        flags = ("--load", start, "--zero-stage", "1")
        outcome = train(words(data, *flags, micro_batch_size=4), tmp_path / "m.jsonl")
        other = refusal(words(data, *flags, "--num-layers", "2", micro_batch_size=4))
        return outcome, other

    outcome, other = run_ranks(2, fn)[0]
    assert outcome.column("iteration") == [1, 2, 3, 4]
    assert "num_layers: 3 there, 2 here" in other
    lines = (saved.parent / "m.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])["valid_loss"]
    assert outcome.valid_losses()[0] == pytest.approx(last, abs=1e-5)


def test_weights_of_another_tokenizer_are_refused(
    data: list[str], saved: Path, tmp_path: Path
) -> None:
    """Same vocabulary size, other ids."""
    source = read_weights(saved)
    folder = tmp_path / "tokenizer"
    texts = ["other text, other merges " * 3, "0123456789 zyx"]
    train_bpe(texts, source.shape.vocab_size, tmp_path / "tokenizer.json")
    HuggingFaceTokenizer(tmp_path / "tokenizer.json").save(folder)
    start = tmp_path / "start"
    write_weights(start, source.weights, source.shape, folder, "a test")

    (message,) = run_ranks(1, lambda rank: refusal(words(data, "--load", start)))
    assert "trained with another tokenizer" in message and "Preprocess the text" in message


def test_a_finished_run_that_is_requeued_ends_well(data: list[str], copy: Path) -> None:
    def fn(rank: int) -> Outcome:
        return train(words(data, "--load", copy, "--save", copy), copy / "m.jsonl")

    assert run_ranks(1, fn)[0].column("iteration") == []


def test_going_back_in_the_same_folder_is_refused(data: list[str], copy: Path) -> None:
    older = manifests.list_checkpoints(copy)[-1]
    (message,) = run_ranks(1, lambda rank: refusal(words(data, "--load", older, "--save", copy)))
    assert "is older than" in message and "Save to another folder" in message
