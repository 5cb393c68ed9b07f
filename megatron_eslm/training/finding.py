"""Which checkpoint a run starts from, and what is known of it before any tensor is read."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_eslm.errors import ConfigError
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.training import manifest as manifests
from megatron_eslm.training.state import TrainState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """A complete checkpoint."""

    folder: Path
    kind: str
    """"training", or "weights" for one without optimizer and state."""
    run: dict[str, Any]
    """run.json: "options", "shape", "data" (fingerprint) and more."""

    @property
    def shape(self) -> ModelShape:
        """Shape of the model in it."""
        return ModelShape(**self.run["shape"])

    @property
    def tokenizer_dir(self) -> Path | None:
        """The tokenizer it carries."""
        folder = self.folder / "tokenizer"
        return folder if folder.is_dir() else None

    def state(self) -> TrainState:
        """The TrainState it holds."""
        return TrainState.from_dict(json.loads((self.folder / "state.json").read_text()))


def _open(folder: Path) -> Found:
    manifest = manifests.verify(folder)
    run = json.loads((folder / "run.json").read_text())
    return Found(folder, manifest["kind"], run)


def find_checkpoint(load: str | Path, tag: str | None = None) -> Found:
    """The newest complete checkpoint under a folder, or exactly the one that is named.

    Raises:
        ConfigError: nothing there, or nothing that is whole; every refused one with its reason.
    """
    path = Path(load)
    if tag is not None:
        path = path / tag
    if (path / manifests.MANIFEST).exists() or tag is not None:
        return _open(path)
    if not path.is_dir():
        raise ConfigError(f"--load {path}: there is no such folder.")
    candidates = manifests.list_checkpoints(path)
    if not candidates:
        raise ConfigError(
            f"--load {path} holds no checkpoint (folders iter_0000100 and the like). A folder "
            "written by another system comes in through tools/convert_from_hf.py."
        )
    reasons = []
    for folder in candidates:
        try:
            return _open(folder)
        except ConfigError as error:
            logger.warning("%s Trying the one before it.", error)
            reasons.append(str(error))
    raise ConfigError(f"--load {path} holds no complete checkpoint. " + " ".join(reasons))
