"""A tiny training checkpoint without a run, and ways to change it so that its sums still fit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megatron_eslm.checkpoint import manifest as manifests
from megatron_eslm.checkpoint.manifest import Manifest, Stamp
from megatron_eslm.checkpoint.save_folder import SaveFolder
from megatron_eslm.checkpoint.shards import whole
from megatron_eslm.checkpoint.tensor_files import file_name, metadata_of, write_file
from megatron_eslm.checkpoint.tensor_index import KINDS, Scalars, index_of, write_index
from megatron_eslm.checkpoint.train_state import TrainState
from megatron_eslm.model.hf.state import weight_sizes
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.selection.state import SelectionState

SHAPE = ModelShape(
    num_layers=2,
    hidden_size=4,
    num_attention_heads=2,
    ffn_hidden_size=8,
    max_position_embeddings=6,
    vocab_size=5,
    padded_vocab_size=8,
)
RUN = {
    "version": "0",
    "shape": SHAPE.to_dict(),
    "options": {
        "model": {"lora_rank": 0, "lora_alpha": None, "num_layers": 2},
        "training": {"train_iters": 9},
        "selection": {"selection": "eslm"},
        "demo": True,
    },
    "data": {"fingerprint": "f"},
    "domains": [{"name": "prose", "epochs": 0.5}],
}
RUN_ID, OTHER_RUN = "0" * 32, "1" * 32
TENSORS_0 = file_name(0)


def tiny(save: Path, iteration: int, *, run_id: str = RUN_ID, value: float = 0.5) -> Path:
    """Publish the checkpoint of an iteration."""
    stamp = Stamp(run_id=run_id, iteration=iteration)
    sizes = weight_sizes(dataclasses.replace(SHAPE, padded_vocab_size=SHAPE.vocab_size))
    saves = SaveFolder(save)
    save.mkdir(exist_ok=True)
    draft = saves.begin(iteration)
    tensors = {f"{kind}/{n}": torch.full(s, value) for kind in KINDS for n, s in sizes.items()}
    write_file(draft / TENSORS_0, tensors, metadata_of(stamp))
    shards = {name: whole(size) for name, size in sizes.items()}
    write_index(draft, index_of(stamp, [(TENSORS_0, shards)], Scalars(iteration)))
    state = TrainState(SelectionState(alpha=0.1), run_id=run_id, iteration=iteration)
    write(draft / "run.json", {**asdict(stamp), **RUN})
    write(draft / "state.json", state.to_dict())
    (draft / "tokenizer").mkdir()
    write(draft / "tokenizer" / "tokenizer.json", {})
    files = {name: manifests.describe(draft / name) for name in manifests.files_of(draft)}
    try:
        return saves.publish(draft, Manifest(kind="training", files=files, **asdict(stamp)))
    finally:
        saves.release()


def write(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n")


def seal(folder: Path, change: Callable[[dict], object] = lambda values: None) -> None:
    """Write the manifest anew: sums of the files as they are now, and what `change` does to it."""
    values = json.loads((folder / "manifest.json").read_text())
    del values["crc32"]
    values["files"] = {
        name: asdict(manifests.describe(folder / name)) for name in manifests.files_of(folder)
    }
    change(values)
    body = json.dumps(values, indent=1).removesuffix("\n}").encode()
    (folder / "manifest.json").write_bytes(manifests._with_sum(body))


def edit(file: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Change the values in a JSON file, in place or by returning others."""

    def forge(folder: Path) -> None:
        values = json.loads((folder / file).read_text())
        changed = change(values)
        write(folder / file, values if changed is None else changed)
        seal(folder)

    return forge


def put(file: str, *path: str | int, to: Any) -> Callable[[Path], None]:
    """Set one value in a JSON file."""

    def change(values: Any) -> None:
        for key in path[:-1]:
            values = values[key]
        values[path[-1]] = to

    return edit(file, change)


def drop(file: str, *path: str) -> Callable[[Path], None]:
    """Leave one key of a JSON file out."""

    def change(values: Any) -> None:
        for key in path[:-1]:
            values = values[key]
        del values[path[-1]]

    return edit(file, change)


def tensors(change: Callable[[dict[str, torch.Tensor]], object], **stamp: Any) -> Callable:
    """Change the tensors of the file, and what it says of its checkpoint."""

    def forge(folder: Path) -> None:
        content = load_file(folder / TENSORS_0)
        change(content)
        manifest = json.loads((folder / "manifest.json").read_text())
        mine = {"run_id": manifest["run_id"], "iteration": str(manifest["iteration"]), **stamp}
        save_file(content, folder / TENSORS_0, mine)
        seal(folder)

    return forge
