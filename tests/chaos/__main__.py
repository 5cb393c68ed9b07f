"""Fault injection: what becomes of runs that are killed and of files that are damaged.

    python -m tests.chaos [--kills 102] [--scale 1] [--seed 1] [--part kills preprocessing ...]

prints a table of verdicts (tests/chaos/table.py) and ends with exit code 1 if any fault was not
survived or refused by name. `make chaos` runs all of it, `make test` a short form.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos import damage, warm
from tests.chaos import mutations as m
from tests.chaos.disk import fill_disks
from tests.chaos.kills import LAYOUTS, kill_jobs
from tests.chaos.preprocessing import kill_parts, kill_preprocessing
from tests.chaos.saves import kill_saves
from tests.chaos.table import Table
from tests.training.conftest import DOMAINS, make_domain

PARTS = ("kills", "preprocessing", "saves", "files", "disk")


def inject(
    table: Table, root: Path, *, parts: tuple[str, ...], kills: int, scale: float, seed: int
) -> None:
    """Inject faults of all kinds.

    Args:
        table: to count in.
        root: an empty folder to work in.
        parts: of PARTS.
        kills: of training jobs, over all layouts.
        scale: share of the damaged files; 1 is all of them and every bit of a manifest.
        seed: of all choices.
    """
    (root / "data").mkdir(parents=True)
    data = [make_domain(root / "data" / name, name, 400) for name in DOMAINS]

    def count(times: int) -> int:
        return max(1, round(times * scale))

    if "kills" in parts:
        for layout in LAYOUTS:
            folder, rng = root / "kills" / layout.name.replace(" ", ""), random.Random(seed)
            kill_jobs(table, data, layout, folder, kills // len(LAYOUTS), rng)
    if "preprocessing" in parts:
        kill_preprocessing(table, root / "preprocessing", count(20), random.Random(seed))
        kill_parts(table, root / "parts", count(20), random.Random(seed))
    if not {"saves", "files", "disk"} & set(parts):
        return
    warm.warm_up()
    if "saves" in parts:
        kill_saves(table, data, root / "saves", count(20), random.Random(seed))
    if not {"files", "disk"} & set(parts):
        return
    original, folder = damage.Original.make(data, root), root / "damaged"
    rng = random.Random(seed)
    if "files" in parts:
        damage.flip_manifest(table, original, folder, every=round(1 / scale))
        for part, choose, kinds, times in (
            ("damaged checkpoint files", damage.newest, m.ALL, 60),
            ("damaged index caches", damage.cache, m.ALL, 50),
            ("damaged .idx and .meta.json", damage.indices, m.ALL, 50),
            # That contents of a .bin changed, only tools/verify_data.py can tell.
            ("damaged .bin", damage.token_files, m.SIZE, 15),
        ):
            damage.damage_files(table, original, folder, part, choose, kinds, count(times), rng)
        for name in ("manifest.json", "run.json", "state.json", "tensors.json"):
            damage.forge(table, original, folder, name, count(20), rng)
    if "disk" in parts:
        fill_disks(table, original.data, original.whole, root / "full", count(20), rng)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=102, help="of training jobs [102]")
    parser.add_argument("--scale", type=float, default=1.0, help="share of damaged files [1]")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    words = parser.parse_args()
    table, begin = Table(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        inject(
            table,
            Path(name),
            parts=tuple(words.part),
            kills=words.kills,
            scale=words.scale,
            seed=words.seed,
        )
    print(table.text())
    print(f"\n{time.monotonic() - begin:.0f} s, seed {words.seed}")
    sys.exit(0 if table.good else 1)


if __name__ == "__main__":
    main()
