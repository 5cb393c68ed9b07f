"""Reaching a validation loss, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from megatron_eslm.errors import ConfigError
from megatron_eslm.reports.groups import Group
from megatron_eslm.reports.targets import Reach, default_target, first_reach

from .conftest import line


class TestFirstReach:
    @staticmethod
    def at(*pairs):
        return [line(i, loss, flops=10.0 * i) for i, loss in pairs]

    def test_between_two_evaluations(self):
        records = self.at((100, 6.0), (300, 5.0), (400, 3.0))
        assert first_reach(records, "iteration", 5.5) == pytest.approx(200.0)
        assert first_reach(records, "flops", 4.5) == pytest.approx(3250.0)

    def test_exactly_at_an_evaluation(self):
        records = self.at((100, 6.0), (300, 5.0))
        assert first_reach(records, "iteration", 5.0) == 300.0
        assert first_reach(records, "iteration", 6.0) == 100.0

    def test_at_the_first_evaluation_there_is_nothing_to_interpolate(self):
        assert first_reach(self.at((100, 2.0), (200, 1.0)), "iteration", 3.0) == 100.0

    def test_the_first_time_counts(self):
        records = self.at((100, 6.0), (200, 4.0), (300, 7.0), (400, 3.0))
        assert first_reach(records, "iteration", 5.0) == pytest.approx(150.0)

    def test_never(self):
        assert first_reach(self.at((100, 6.0)), "iteration", 5.0) is None
        assert first_reach([], "iteration", 5.0) is None

    def test_missing_quantity(self):
        assert first_reach(self.at((100, 6.0), (200, 4.0)), "mfu", 5.0) is None

    def test_not_a_number_is_no_end_of_a_line(self):
        records = self.at((100, math.nan), (200, 4.0))
        assert first_reach(records, "iteration", 5.0) == 200.0


def test_the_default_is_what_every_seed_of_the_baseline_reaches(make_run):
    group = Group("clm", [make_run("a", (6.0, 4.0)), make_run("b", (6.0, 4.5))])
    assert default_target([group], group) == 4.5
    assert Reach.of(group, "iteration", 4.5).reached == 2


def test_no_finite_loss(make_run):
    group = Group("clm", [make_run("a", (6.0, math.nan))])
    with pytest.raises(ConfigError, match=r"give --target"):
        default_target([group], group)


def test_reach_over_seeds(make_run):
    group = Group("eslm", [make_run("a", (6.0, 4.0)), make_run("b", (7.0, 5.0))])
    both = Reach.of(group, "iteration", 5.5)
    assert both.spread is not None
    assert (both.spread.low, both.spread.mean, both.spread.high) == (125.0, 150.0, 175.0)
    one = Reach.of(group, "iteration", 4.5)
    assert one.spread is None and one.why_not == "1 of 2 reached"
    assert Reach.of(group, "iteration", 3.0).why_not == "not reached"
    assert Reach.of(group, "mfu", 5.5).why_not == "n/a"


def test_saved(make_run):
    slow = Reach.of(Group("a", [make_run("a", (6.0, 4.0))]), "iteration", 4.0)
    fast = Reach.of(Group("b", [make_run("b", (6.0, 2.0))]), "iteration", 4.0)
    never = Reach.of(Group("c", [make_run("c", (6.0, 5.0))]), "iteration", 4.0)
    assert fast.saved_on(slow) == pytest.approx(0.25)
    assert slow.saved_on(fast) == pytest.approx(-1 / 3)
    assert fast.saved_on(never) is None and never.saved_on(fast) is None
