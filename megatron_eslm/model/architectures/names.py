"""Names of the architectures, as `--architecture` and checkpoints have them."""

from __future__ import annotations

from typing import Literal

ArchitectureName = Literal["gpt2", "llama"]
