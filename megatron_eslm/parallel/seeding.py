"""Random streams that depend only on a seed and names, not on the layout or on earlier draws."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, *names: str | int) -> int:
    """Derive a 63-bit seed for the stream `names` of run `seed`, the same on every machine."""
    text = "\x1f".join(str(part) for part in (seed, *names))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, *names: str | int) -> torch.Generator:
    """Create a CPU generator at the start of the stream `names` of run `seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *names))
