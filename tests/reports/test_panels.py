"""What the panels show."""

from __future__ import annotations

import pytest

from megatron_eslm.reports.groups import Group, Spread
from megatron_eslm.reports.panels import alpha_panel, more_panels
from megatron_eslm.reports.runs import read_run

from .conftest import line


@pytest.fixture
def run_of(metrics_file):
    """A run with these values of alpha, in lines with and without an evaluation."""

    def make(name, *alphas):
        lines = [line(10 * n, alpha=alpha) for n, alpha in enumerate(alphas, 1)]
        return read_run(metrics_file(f"{name}.jsonl", *lines))

    return make


def test_alpha_of_the_methods_that_change_it(run_of):
    constant = Group("constant", [run_of("c", 0.1, 0.1)])
    changing = Group("ada", [run_of("a", 0.1, 0.1, 0.05), run_of("b", 0.1, 0.3, 0.2)])
    panel = alpha_panel([constant, changing])
    iterations, spreads = panel.bands[1]
    assert panel.bands[0] is None
    assert iterations == [10, 20, 30]
    assert spreads[1:] == [Spread(0.2, 0.1, 0.3, 2), Spread(0.125, 0.05, 0.2, 2)]
    assert (panel.xlabel, panel.ylabel, panel.scale) == ("iterations", "α", 1.0)


def test_no_panel_without_a_change(run_of):
    assert more_panels([Group("x", [run_of("x", 0.1, 0.1)]), Group("y", [run_of("y", None)])]) == []
