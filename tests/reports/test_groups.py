"""Which runs are seeds of one method, and what is said of them together."""

from __future__ import annotations

import math

import pytest

from megatron_eslm.errors import ConfigError
from megatron_eslm.reports.groups import (
    Group,
    Spread,
    default_labels,
    differing_settings,
    group_runs,
    mixed_settings,
    on_common_seeds,
)


def names(groups):
    return {group.label: [run.path.stem for run in group.runs] for group in groups}


def test_runs_that_differ_by_the_seed_alone_are_grouped(make_run):
    losses = (6.0, 4.0)
    runs = [
        make_run("clm_s1", losses, selection="clm", seed=1, save="a"),
        make_run("eslm_s1", losses, selection="eslm", seed=1),
        make_run("clm_s2", losses, selection="clm", seed=2, save="b"),
        make_run("clm_long", losses, selection="clm", seed=3, train_iters=400),
    ]
    groups = group_runs(runs)
    assert names(groups) == {
        "clm": ["clm_s1", "clm_s2"],
        "eslm_s1": ["eslm_s1"],
        "clm_long": ["clm_long"],
    }
    assert [group.selection for group in groups] == ["clm", "eslm", "clm"]


def test_the_same_seed_twice_is_no_second_draw(make_run):
    runs = [make_run(name, (6.0, 4.0), selection="clm") for name in ("a", "b")]
    assert names(group_runs(runs)) == {"a": ["a"], "b": ["b"]}


def test_runs_that_say_nothing_of_themselves_stay_alone(make_run):
    runs = [make_run(name, (6.0, 4.0), seed=None) for name in ("a", "b")]
    assert len(group_runs(runs)) == 2


def test_labels_group(make_run):
    runs = [make_run(f"r{i}", (6.0, 4.0), seed=i, lr=i) for i in range(3)]
    groups = group_runs(runs, ["x", "y", "x"])
    assert names(groups) == {"x": ["r0", "r2"], "y": ["r1"]}
    assert mixed_settings(groups[0]) == ["lr"] and mixed_settings(groups[1]) == []
    with pytest.raises(ConfigError, match="--labels names 1 runs, but there are 3"):
        group_runs(runs, ["x"])


@pytest.mark.parametrize(
    ("files", "label"),
    [
        (("clm_s1", "clm_s2"), "clm"),
        (("clm_s10", "clm_s11"), "clm"),
        (("clm/seed1", "clm/seed2"), "clm"),
        (("eslm-a0.1-1", "eslm-a0.1-2"), "eslm-a0.1"),
        (("pass1", "pass2"), "pass"),
        (("one", "two"), "one + two"),
    ],
)
def test_name_of_a_group(make_run, files, label):
    runs = [make_run(name, (6.0, 4.0), seed=i) for i, name in enumerate(files)]
    assert [group.label for group in group_runs(runs)] == [label]


def test_groups_of_one_name_are_told_apart(make_run):
    runs = [
        make_run(f"x_s{seed}", (6.0, 4.0), seed=seed, lr=lr)
        for seed, lr in ((1, 1), (2, 1), (3, 2), (4, 2))
    ]
    labels = [group.label for group in group_runs(runs)]
    assert labels == ["x_s1 + x_s2", "x_s3 + x_s4"]


def test_default_labels_tell_runs_apart():
    assert default_labels(["x/a.jsonl", "x/b.jsonl"]) == ["a", "b"]
    assert default_labels(["x/a.jsonl", "y/a.jsonl"]) == ["x", "y"]
    assert default_labels(["p/x/a.jsonl", "q/x/a.jsonl"]) == ["p/x", "q/x"]
    assert default_labels(["x/a.jsonl", "y/a.jsonl", "y/b.jsonl"]) == ["x/a", "y/a", "y/b"]
    assert default_labels(["a.jsonl", "x/a.jsonl"]) == ["a", "x/a"]
    assert default_labels(["a.jsonl", "a.jsonl"]) == ["a #1", "a #2"]


def test_common_seeds(make_run):
    def group(label, *seeds):
        return Group(label, [make_run(f"{label}{s}", (6.0, 4.0), seed=s) for s in seeds])

    a, b = on_common_seeds(group("a", 1, 2, 3), group("b", 3, 4, 1))
    assert names([a, b]) == {"a": ["a1", "a3"], "b": ["b3", "b1"]}
    for c, d in ((group("c", 1), group("d", 2)), (group("c", None), group("d", None))):
        assert on_common_seeds(c, d) == (c, d)


def test_settings_that_differ(make_run):
    groups = [
        Group("a", [make_run("a", (6.0, 4.0), lr=1.0, seed=1, save="here")]),
        Group("b", [make_run("b", (6.0, 4.0), lr=2.0, seed=2, save="there", score="loss")]),
    ]
    assert differing_settings(groups) == {"lr": [1.0, 2.0], "score": [None, "loss"]}


def test_spread():
    assert Spread.of([1.0, 4.0]) == Spread(2.5, 1.0, 4.0, 2)
    assert Spread.of([1.0, 4.0]).text("{:.1f}".format) == "2.5 [1.0, 4.0]"
    assert Spread.of([3.0]).text("{:.1f}".format) == "3.0"
    assert math.isnan(Spread.of([1.0, math.nan]).mean)


def test_a_quantity_that_one_run_lacks(make_run):
    group = Group("a", [make_run("a", (6.0, 4.0)), make_run("b", (6.0, 4.0))])
    assert group.spread(lambda run: run.last("tokens")) == Spread(2e5, 2e5, 2e5, 2)
    group.runs[1].records[1]["mfu"] = 0.5
    assert group.spread(lambda run: run.last("mfu")) is None
