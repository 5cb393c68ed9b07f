"""Ways in which a file comes to be other than it was written."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Mutation = Callable[[Path, random.Random], str]
"""Changes a file and says how."""


def flip_bit(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    if not data:
        return write_zeros(path, rng)
    at, bit = rng.randrange(len(data)), rng.randrange(8)
    data[at] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {at} flipped"


def truncate(path: Path, rng: random.Random) -> str:
    size = path.stat().st_size
    left = rng.randrange(size) if size else 0
    with path.open("r+b") as file:
        file.truncate(left)
    return f"cut to {left} of {size} bytes"


def empty(path: Path, rng: random.Random) -> str:
    path.write_bytes(b"")
    return "emptied"


def write_zeros(path: Path, rng: random.Random) -> str:
    """What a file system may show of a file whose data never reached the disk."""
    path.write_bytes(b"\0" * max(1, path.stat().st_size))
    return "all zeros"


def tear(path: Path, rng: random.Random) -> str:
    """The first pages arrived, the rest is zeros."""
    data = path.read_bytes()
    kept = rng.randrange(1, len(data)) if len(data) > 1 else 0
    path.write_bytes(data[:kept] + b"\0" * (len(data) - kept))
    return f"zeros from byte {kept} of {len(data)} on"


def lengthen(path: Path, rng: random.Random) -> str:
    with path.open("ab") as file:
        file.write(rng.randbytes(17))
    return "17 bytes longer"


def delete(path: Path, rng: random.Random) -> str:
    path.unlink()
    return "deleted"


def replace_by_folder(path: Path, rng: random.Random) -> str:
    path.unlink()
    path.mkdir()
    return "a folder"


CONTENT: tuple[Mutation, ...] = (flip_bit, tear)
"""Damage that leaves the size as it was."""
SIZE: tuple[Mutation, ...] = (truncate, empty, lengthen, delete, replace_by_folder)
ALL: tuple[Mutation, ...] = (*CONTENT, write_zeros, *SIZE)

ODD_VALUES: tuple[Any, ...] = (None, "5", -5, 5.5, 10**12, 2**70, True, [], {}, [[1]], "../x")


def odd_documents(value: Any, most: int, rng: random.Random) -> Iterator[tuple[str, Any]]:
    """JSON values like `value` of which one entry is missing, unknown or of another kind."""
    places = list(_places(value))
    for _ in range(most):
        place = rng.choice(places)
        how = rng.choice(("odd", "odd", "missing", "unknown"))
        copy = json.loads(json.dumps(value))
        parent = copy
        for key in place[:-1]:
            parent = parent[key]
        name = ".".join(map(str, place))
        if how == "odd":
            odd = rng.choice([v for v in ODD_VALUES if _kind(v) != _kind(parent[place[-1]])])
            parent[place[-1]] = odd
            yield f"{name} is {odd!r}", copy
        elif how == "missing" or isinstance(parent, list):
            del parent[place[-1]]
            yield f"{name} is missing", copy
        else:
            parent["unheard_of"] = 1
            yield f"unknown key beside {name}", copy
    for odd in (None, "text", [], 5, {}):
        yield f"the whole is {odd!r}", odd


def _kind(value: Any) -> str:
    """Numbers are of one kind, and so is null, which may stand for one: these may be right."""
    numbers = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    return "number" if numbers else type(value).__name__


def _places(value: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*prefix, key)
        if isinstance(inner, dict | list):
            yield from _places(inner, (*prefix, key))
