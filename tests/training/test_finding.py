"""Checkpoints whose sums fit and whose contents do not: refused by name, the older one is taken."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_eslm.checkpoint.find import find_checkpoint, open_checkpoint
from megatron_eslm.checkpoint.tensor_files import TensorReader
from megatron_eslm.checkpoint.weights import read_weights
from megatron_eslm.errors import ConfigError

from .forging import OTHER_RUN, TENSORS_0, drop, edit, put, seal, tensors, tiny, write

NORM = "final_norm.bias"
MATRIX = "blocks.0.attention.out.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of iterations 3 and 5 of one run, and of 5 of another one beside it."""
    folder = tmp_path_factory.mktemp("saved")
    tiny(folder / "run", 3)
    tiny(folder / "run", 5)
    tiny(folder / "other", 5, run_id=OTHER_RUN)
    return folder


def take(file: str, source: str) -> Callable[[Path], None]:
    """Exchange a file for that of another checkpoint."""

    def forge(folder: Path) -> None:
        shutil.copy(folder.parent.parent / source / file, folder / file)
        seal(folder)

    return forge


def raw(file: str, text: str) -> Callable[[Path], None]:
    def forge(folder: Path) -> None:
        (folder / file).write_text(text)
        seal(folder)

    return forge


def manifest(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda folder: seal(folder, change)


def rename(folder: Path) -> None:
    folder.rename(folder.with_name("iter_0000009"))


def piece(**changes: Any) -> Callable[[Path], None]:
    return edit(
        "tensors.json", lambda v: v["tensors"][NORM]["pieces"][0].update(changes) if changes else v
    )


def stored_as(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return tensors(lambda t: t.update({f"weight/{name}": tensor}))


def state_and_its_tensors(folder: Path) -> None:
    """Everything of iteration 3 under the name of 5, but for the manifest's own number."""
    older = folder.with_name("iter_0000003")
    for file in ("run.json", "state.json", "tensors.json", TENSORS_0):
        shutil.copy(older / file, folder / file)
    seal(folder)


def pipe(folder: Path) -> None:
    (folder / "state.json").unlink()
    os.mkfifo(folder / "state.json")
    seal(folder, lambda m: m["files"].update({"state.json": {"bytes": 0, "crc32": 0}}))


DEEP = "[" * 100_000 + "]" * 100_000

FORGED: dict[str, tuple[Callable[[Path], object], str]] = {
    # The manifest about itself.
    "renamed": (rename, r"iter_0000009 is damaged: .*name must be iter_0000005"),
    "manifest of another iteration": (
        manifest(lambda m: m.update(iteration=7)),
        "named for iteration 5 but contains iteration 7",
    ),
    "manifest without iteration": (manifest(lambda m: m.pop("iteration")), "iteration: field req"),
    "iteration -5": (manifest(lambda m: m.update(iteration=-5)), "iteration: input should be gr"),
    "iteration 5.5": (manifest(lambda m: m.update(iteration=5.5)), "iteration: input should be"),
    "manifest of another run": (
        manifest(lambda m: m.update(run_id=OTHER_RUN)),
        r"run\.json belongs to another run",
    ),
    "run id no id": (manifest(lambda m: m.update(run_id="x")), "run_id: string should match"),
    "kind weights": (
        manifest(lambda m: m.update(kind="weights")),
        r"kind weights contradicts the presence or absence of state\.json",
    ),
    "kind unknown": (manifest(lambda m: m.update(kind="other")), "kind: input should be"),
    "kind weights without the state": (
        manifest(lambda m: (m.update(kind="weights"), m["files"].pop("state.json"))),
        r"exp_avg/.* is unknown in tensors_00000|counts 5 steps of Adam",
    ),
    "no files": (manifest(lambda m: m.update(files={})), r"files do not include run\.json"),
    "files a list": (manifest(lambda m: m.update(files=[])), "files: input should be an object"),
    "tensors unlisted": (
        manifest(lambda m: m["files"].pop(TENSORS_0)),
        rf"tensors\.json names {TENSORS_0}, which manifest\.json does not",
    ),
    "index unlisted": (
        manifest(lambda m: m["files"].pop("tensors.json")),
        r"files do not include tensors\.json",
    ),
    "tokenizer unlisted": (
        manifest(lambda m: m["files"].pop("tokenizer/tokenizer.json")),
        r"tokenizer/tokenizer\.json is not in manifest\.json",
    ),
    "entry a number": (
        manifest(lambda m: m["files"].update({"run.json": 5})),
        r"files\.run\.json: input should be an object",
    ),
    "entry without bytes": (
        manifest(lambda m: m["files"]["run.json"].pop("bytes")),
        r"files\.run\.json\.bytes: field required",
    ),
    "entry outside": (
        manifest(lambda m: m["files"].update({"../../etc/passwd": {"bytes": 1, "crc32": 1}})),
        "must be a plain relative path",
    ),
    "entry absolute": (
        manifest(lambda m: m["files"].update({"/dev/zero": {"bytes": 1, "crc32": 1}})),
        "must be a plain relative path",
    ),
    "entry with nul": (
        manifest(lambda m: m["files"].update({"a\0b": {"bytes": 1, "crc32": 1}})),
        "must be a plain relative path",
    ),
    "a folder in place of a file": (
        manifest(lambda m: m["files"].update({"tokenizer": {"bytes": 4096, "crc32": 1}})),
        "tokenizer has|tokenizer must be a regular file",
    ),
    "a pipe": (pipe, r"state\.json must be a regular file but is a named pipe"),
    # Files of other checkpoints.
    "state of another iteration": (
        take("state.json", "run/iter_0000003"),
        r"state\.json belongs to iteration 3, not to 5",
    ),
    "run of another iteration": (
        take("run.json", "run/iter_0000003"),
        r"run\.json belongs to iteration 3",
    ),
    "index of another iteration": (
        take("tensors.json", "run/iter_0000003"),
        r"tensors\.json belongs to iteration 3",
    ),
    "tensors of another iteration": (
        take(TENSORS_0, "run/iter_0000003"),
        rf"{TENSORS_0} belongs to iteration 3",
    ),
    "state of another run": (take("state.json", "other/iter_0000005"), "belongs to another run"),
    "run of another run": (take("run.json", "other/iter_0000005"), "belongs to another run"),
    "index of another run": (take("tensors.json", "other/iter_0000005"), "belongs to another run"),
    "tensors of another run": (take(TENSORS_0, "other/iter_0000005"), "belongs to another run"),
    "all of another iteration": (state_and_its_tensors, "belongs to iteration 3"),
    # state.json.
    "state a list": (edit("state.json", lambda v: [v]), r"state\.json .*should be an object"),
    "state a string": (edit("state.json", lambda v: "x"), r"state\.json .*should be an object"),
    "state nested": (raw("state.json", DEEP), r"state\.json is not readable JSON.*too deep"),
    "state torn": (raw("state.json", '{"iteration": 5'), r"state\.json is not JSON"),
    "state key unknown": (put("state.json", "other", to=1), "other: unexpected keyword"),
    "state key missing": (drop("state.json", "tokens"), "tokens is missing"),
    "state iteration text": (put("state.json", "iteration", to="5"), "iteration: input should be"),
    "state iteration negative": (put("state.json", "iteration", to=-5), "iteration: input should"),
    "state iteration broken": (put("state.json", "iteration", to=5.5), "iteration: input should"),
    "state iteration 4": (put("state.json", "iteration", to=4), "belongs to iteration 4"),
    "tokens null": (put("state.json", "tokens", to=None), "tokens: input should be"),
    "tokens 10^30": (put("state.json", "tokens", to=10**30), "tokens: "),
    "flops nan": (put("state.json", "flops", to=float("nan")), "flops: input should be a finite"),
    "selection null": (put("state.json", "selection", to=None), "selection: input should be"),
    "selection without alpha": (drop("state.json", "selection", "alpha"), "selection.alpha: field"),
    "selection without level": (drop("state.json", "selection", "level"), "selection.level is"),
    "alpha 7": (put("state.json", "selection", "alpha", to=7), "selection.alpha: input should be"),
    "history of text": (
        put("state.json", "selection", "cvar_history", to=["x"]),
        "selection.cvar_history.0: input should be",
    ),
    # run.json.
    "run a list": (edit("run.json", lambda v: []), r"run\.json .*should be an object"),
    "run nested": (raw("run.json", DEEP), r"run\.json is not readable JSON.*too deep"),
    "run without shape": (drop("run.json", "shape"), "shape: field required"),
    "run without options": (drop("run.json", "options"), "options: field required"),
    "run without data": (drop("run.json", "data"), "data: field required"),
    "options a list": (put("run.json", "options", to=[]), "options: input should be"),
    "options of text": (put("run.json", "options", "selection", to="x"), "options.selection: inp"),
    "train_iters text": (
        put("run.json", "options", "training", "train_iters", to="9"),
        "options.training.train_iters: input should be",
    ),
    "adapters of rank 3": (
        put("run.json", "options", "model", "lora_rank", to=3),
        "has another adapter scale",
    ),
    "no domains": (put("run.json", "domains", to=[]), "domains: list should have at least 1"),
    "no selection": (drop("run.json", "options", "selection", "selection"), "selection: field req"),
    "selection a list": (
        put("run.json", "options", "selection", "selection", to=["x"]),
        "options.selection.selection: ",
    ),
    "a reset in words": (
        put("run.json", "options", "checkpoint", to={"reset_optimizer": "x"}),
        "options.checkpoint.reset_optimizer: ",
    ),
    "empty range": (put("run.json", "skipped_samples", to=[[9, 9]]), "skipped_samples.0: a range "),
    "checkpoint a number": (
        put("run.json", "options", "checkpoint", to=3),
        "options.checkpoint: ",
    ),
    "epochs null": (put("run.json", "domains", 0, "epochs", to=None), "domains.0.epochs: input"),
    "0 heads": (put("run.json", "shape", "num_attention_heads", to=0), "num_attention_heads: inp"),
    "3 heads": (put("run.json", "shape", "num_attention_heads", to=3), "not a multiple of"),
    "layers text": (put("run.json", "shape", "num_layers", to="2"), "num_layers: input should be"),
    "10^7 layers": (
        put("run.json", "shape", "num_layers", to=10**7),
        "28 weights, but a model of 10000000 layers has 120000004",
    ),
    "1 layer": (put("run.json", "shape", "num_layers", to=1), "28 weights, but a model of 1 lay"),
    "vocabulary of 10^12": (put("run.json", "shape", "padded_vocab_size", to=10**12), "padded_vo"),
    "padding of 10^9": (
        put("run.json", "shape", "padded_vocab_size", to=10**9),
        "would be padded to 1000000000 rows",
    ),
    "another vocabulary": (
        put("run.json", "shape", "vocab_size", to=6),
        r"embedding\.word\.weight as \(5, 4\), but a model of its shape has it as \(6, 4\)",
    ),
    "positions": (
        put("run.json", "shape", "max_position_embeddings", to=2**30),
        r"embedding\.position\.weight as \(6, 4\)",
    ),
    # tensors.json.
    "index a list": (edit("tensors.json", lambda v: []), r"tensors\.json .*should be an object"),
    "index nested": (
        raw("tensors.json", DEEP),
        r"tensors\.json is not readable JSON.*too deep",
    ),
    "no tensors": (put("tensors.json", "tensors", to={}), "lists 0 weights"),
    "a parameter left out": (drop("tensors.json", "tensors", NORM), "lists 27 weights"),
    "a parameter of another name": (
        edit("tensors.json", lambda v: v["tensors"].update(x=v["tensors"].pop(NORM))),
        rf"{NORM} as None",
    ),
    "dim 5": (put("tensors.json", "tensors", NORM, "dim", to=5), f"tensors.{NORM}.dim: input"),
    "dim 1 of a vector": (put("tensors.json", "tensors", NORM, "dim", to=1), "dim does not fit"),
    "shape empty": (put("tensors.json", "tensors", NORM, "shape", to=[]), "shape: "),
    "shape of 2^44": (
        put("tensors.json", "tensors", NORM, "shape", to=[2**44]),
        f"tensors.{NORM}.shape.0: ",
    ),
    "shape of 2^30": (
        edit(
            "tensors.json",
            lambda v: v["tensors"][NORM].update(
                shape=[2**30], pieces=[{"file": TENSORS_0, "begin": 0, "end": 2**30}]
            ),
        ),
        rf"{NORM} as \(1073741824,\)",
    ),
    "pieces float": (piece(begin=0.5), "begin: input should be"),
    "pieces beyond": (piece(end=9), "pieces overlap or do not cover the parameter"),
    "no pieces": (put("tensors.json", "tensors", NORM, "pieces", to=[]), "dim does not fit"),
    "piece outside": (piece(file=f"../iter_0000003/{TENSORS_0}"), "file: string should match"),
    "piece absolute": (piece(file="/etc/passwd"), "file: string should match"),
    "piece elsewhere": (piece(file="other.safetensors"), "file: string should match"),
    "piece in a file that is not there": (
        piece(file="tensors_00007.safetensors"),
        r"names tensors_00007\.safetensors, which manifest\.json does not",
    ),
    "adam_step text": (put("tensors.json", "adam_step", to="x"), "adam_step: input should be"),
    "adam_step 10^18": (
        put("tensors.json", "adam_step", to=10**18),
        "counts 1000000000000000000 steps of Adam, more than",
    ),
    "loss_scale": (put("tensors.json", "loss_scale", to={"cur_scale": 2.0}), "loss_scale.cur_it"),
    # Tensors.
    "a bias of one number": (
        stored_as(NORM, torch.ones(1)),
        rf"weight/{NORM} in {TENSORS_0} is F32 \[1\] but should be F32 \[4\]",
    ),
    "one row of a matrix": (
        stored_as(MATRIX, torch.ones(1, 4)),
        r"is F32 \[1, 4\] but should be F32 \[4, 4\]",
    ),
    "more rows": (stored_as(MATRIX, torch.ones(8, 4)), r"is F32 \[8, 4\] but should be"),
    "three dimensions": (stored_as(MATRIX, torch.ones(4, 4, 1)), r"is F32 \[4, 4, 1\]"),
    "whole numbers": (stored_as(NORM, torch.ones(4, dtype=torch.int64)), r"is I64 \[4\]"),
    "half precision": (stored_as(NORM, torch.ones(4).bfloat16()), r"is BF16 \[4\]"),
    "a tensor left out": (
        tensors(lambda t: t.pop(f"exp_avg/{NORM}")),
        rf"exp_avg/{NORM} is missing in {TENSORS_0}",
    ),
    "a tensor too many": (tensors(lambda t: t.update(x=torch.ones(1))), "x is unknown in"),
    "nothing in it": (tensors(lambda t: t.clear()), "is missing in"),
    "no metadata": (tensors(lambda t: None, run_id=""), "belongs to another run"),
    "metadata of another iteration": (
        tensors(lambda t: None, iteration="4"),
        "belongs to iteration 4, not to 5",
    ),
    "metadata nonsense": (tensors(lambda t: None, iteration="²"), "belongs to iteration -1"),
    "no tensors file": (raw(TENSORS_0, "torn"), rf"{TENSORS_0} cannot be read"),
    "an empty header": (raw(TENSORS_0, "\2\0\0\0\0\0\0\0{}"), "another run|cannot be read"),
}


@pytest.fixture(scope="module")
def copies(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("copies")


@pytest.mark.parametrize("case", FORGED)
def test_what_is_forged_gives_way_to_the_one_before(saved: Path, tmp_path: Path, case: str) -> None:
    forge, reason = FORGED[case]
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    save = tmp_path / "run"
    forge(save / "iter_0000005")
    begin = time.process_time()
    with pytest.raises(ConfigError, match=reason) as caught:
        open_checkpoint(max(p for p in save.iterdir() if p.name.startswith("iter_")))
    assert " is damaged: " in str(caught.value) and "\n" not in str(caught.value)
    assert find_checkpoint(save).state().iteration == 3
    assert read_weights(save).iteration == 3
    assert time.process_time() - begin < 20  # nothing as large as it says is made


def test_what_is_not_forged_is_taken(saved: Path) -> None:
    found = find_checkpoint(saved / "run")
    assert found.folder.name == "iter_0000005" and found.kind == "training"
    assert found.tokenizer_dir == found.folder / "tokenizer"
    first, second = found.state(), found.state()
    assert first == second and first is not second


def test_files_that_nobody_reads_are_nobodys_business(saved: Path, tmp_path: Path) -> None:
    save = Path(shutil.copytree(saved / "run", tmp_path / "run"))
    newest = save / "iter_0000005"
    for name in ("notes.txt", ".nfs00001", "tokenizer/.DS_Store", "tensors_00001.safetensors"):
        (newest / name).write_text("x")
    (save / "iter_12").mkdir()
    (save / "iter_0000007").write_text("a file")
    assert find_checkpoint(save).folder == newest
    # A folder of another name claims no iteration.
    newest.rename(save / "best")
    assert find_checkpoint(save, "best").state().iteration == 5
    assert find_checkpoint(save).state().iteration == 3


def test_weights_that_are_not_finite_are_refused_where_they_are_read(
    saved: Path, tmp_path: Path
) -> None:
    save = Path(shutil.copytree(saved / "run", tmp_path / "run"))
    stored_as(NORM, torch.full((4,), torch.nan))(save / "iter_0000005")
    with pytest.raises(ConfigError, match=f"is damaged: weight/{NORM} has values that are not"):
        read_weights(save)


def test_every_rank_looks_at_what_it_reads(saved: Path, tmp_path: Path) -> None:
    """The first rank has checked the checkpoint; what another machine sees of it may differ."""
    save = Path(shutil.copytree(saved, tmp_path / "saved"))
    folder = save / "run" / "iter_0000005"
    reader = TensorReader(folder)
    take(TENSORS_0, "run/iter_0000003")(folder)
    with pytest.raises(ConfigError, match=f"{TENSORS_0} belongs to iteration 3, not to 5"):
        reader.read_whole("weight")
    stored_as(NORM, torch.ones(1))(folder)
    tensors(lambda t: t.update({f"weight/{NORM}": torch.ones(1)}))(folder)
    with pytest.raises(ConfigError, match=r"is F32 \[1\] but should be"):
        TensorReader(folder).read_whole("weight")


def test_nothing_is_whole(tmp_path: Path) -> None:
    tiny(tmp_path / "run", 1)
    values = json.loads((tmp_path / "run" / "iter_0000001" / "state.json").read_text())
    write(tmp_path / "run" / "iter_0000001" / "state.json", {**values, "tokens": 7})
    with pytest.raises(ConfigError, match=r"no complete checkpoint\. .*state\.json have chan"):
        find_checkpoint(tmp_path / "run")
