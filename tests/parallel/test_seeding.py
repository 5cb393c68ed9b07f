from __future__ import annotations

import itertools

import torch

from megatron_eslm.parallel.seeding import derive_seed, generator


def test_known_values() -> None:
    """Stored numbers: a run resumed on another machine or version draws the same."""
    assert derive_seed(1234, "init", "final_norm.weight") == 5471831747150725626
    assert derive_seed(0, "random", "token", 3, 1) == 7996223932734078991


def test_streams_differ_by_every_part() -> None:
    parts = [(0,), (1,), (0, "a"), (0, "b"), (0, "a", 1), (0, "a", 2), (0, 1, "a"), (0, "a1")]
    seeds = [derive_seed(*p) for p in parts]
    assert all(a != b for a, b in itertools.combinations(seeds, 2))
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_generator_starts_afresh_and_leaves_the_global_one_alone() -> None:
    before = torch.random.get_rng_state()
    first = torch.rand(5, generator=generator(3, "x"))
    assert torch.equal(first, torch.rand(5, generator=generator(3, "x")))
    assert torch.equal(before, torch.random.get_rng_state())
