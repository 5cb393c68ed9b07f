"""Publish a checkpoint draft of any kind."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from megatron_eslm.checkpoint import manifest as manifests
from megatron_eslm.checkpoint.find import read_contents
from megatron_eslm.checkpoint.manifest import Stamp
from megatron_eslm.checkpoint.save_folder import SaveFolder, disk_errors


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n")


def publish(
    saves: SaveFolder,
    draft: Path,
    kind: Literal["training", "weights"],
    stamp: Stamp,
    files: dict[str, manifests.Entry],
) -> Path:
    """Publish a draft after reading it back, so that no unreadable checkpoint is ever published."""
    files = dict(sorted(files.items()))
    manifest = manifests.Manifest(kind=kind, files=files, **asdict(stamp))
    read_contents(draft, manifest)
    with disk_errors(saves.path / manifests.checkpoint_name(stamp.iteration)):
        return saves.publish(draft, manifest)
