"""Publish a pair that is written in a staging folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megatron_eslm.errors import ConfigError
from megatron_eslm.files.durable import sync_file, sync_folder


def refuse_existing(prefix: Path, overwrite: bool) -> None:
    """Raise ConfigError if there is such a pair, unless it may be replaced."""
    existing = [f"{prefix}{s}" for s in (".bin", ".idx") if os.path.exists(f"{prefix}{s}")]
    if existing and not overwrite:
        raise ConfigError(
            f"--output-prefix {prefix}: {' and '.join(existing)} already exists. Choose another "
            "prefix or pass --overwrite."
        )


def publish_pair(folder: Path, prefix: Path) -> None:
    """Rename the finished files; the pair becomes readable with the last one, the `.idx`.

    At any time, even after a power failure, an existing `.idx` means that all other files are on
    disk. If old and new files mix all the same, the checksums in `.meta.json` reveal it.
    """
    for path in (*folder.glob("tokenizer/*"), *folder.iterdir()):
        (sync_folder if path.is_dir() else sync_file)(path)
    Path(f"{prefix}.idx").unlink(missing_ok=True)
    shutil.rmtree(f"{prefix}.tokenizer", ignore_errors=True)
    sync_folder(prefix.parent)
    Path(f"{prefix}.meta.json").unlink(missing_ok=True)
    for part in ("tokenizer", "meta.json", "bin"):
        if (folder / part).exists():  # pairs of Megatron-LM have neither tokenizer nor metadata
            os.replace(folder / part, f"{prefix}.{part}")
    sync_folder(prefix.parent)
    os.replace(folder / "idx", f"{prefix}.idx")
    sync_folder(prefix.parent)
