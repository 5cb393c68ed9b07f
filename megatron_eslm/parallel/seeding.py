"""Random streams that depend only on a seed and names, not on the layout or on earlier draws."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, *names: str | int) -> int:
    """Derive a 63-bit seed for the stream `names` of run `seed`, the same on every machine."""
    text = "\x1f".join(str(part) for part in (seed, *names))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


_INCREMENT, _FIRST, _SECOND = (
    value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def uniform(seed: int, first: int, count: int, device: torch.device) -> torch.Tensor:
    """Numbers `first` to `first + count` of a stream, float32 in [0, 1), the same on any device.

    SplitMix64 (Steele et al. 2014) of a counter, in 64-bit integers that wrap; its upper 24 bits.
    """

    def shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
        return (x >> bits) & ((1 << (64 - bits)) - 1)  # int64's own shift would copy the sign

    x = torch.arange(first + 1, first + count + 1, device=device) * _INCREMENT + seed
    x = (x ^ shifted(x, 30)) * _FIRST
    x = (x ^ shifted(x, 27)) * _SECOND
    x = x ^ shifted(x, 31)
    return shifted(x, 40).float() * 2.0**-24


def generator(seed: int, *names: str | int) -> torch.Generator:
    """Create a CPU generator at the start of the stream `names` of run `seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *names))
