"""Comparison tables, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
from rich.console import Console

from megatron_eslm.errors import ConfigError
from megatron_eslm.reports.baselines import best_baseline, control_of
from megatron_eslm.reports.compare import NO_CONTROL, compare, markdown
from megatron_eslm.reports.groups import Group
from megatron_eslm.reports.runs import read_run
from megatron_eslm.reports.tables import Table, to_console, to_markdown

from .conftest import line


@pytest.fixture
def groups(make_run):
    """Plain training to 4.0 and 4.2 over two seeds; a method to 3.0; its control to 3.5."""
    by = {"book": 5.0, "code": 1.0}
    return [
        Group("random", [make_run("r", (6.0, 3.5), 0.8, 0.4, by, selection="random")]),
        Group(
            "clm",
            [
                make_run("c1", (6.0, 4.2), by=by, selection="clm", seed=1),
                make_run("c2", (6.0, 4.0), by={"book": 6.0, "code": 2.0}, selection="clm", seed=2),
            ],
        ),
        Group("eslm", [make_run("e", (5.0, 3.0), 0.8, 0.4, by, selection="eslm")]),
    ]


def row(comparison, title, name):
    table = next(table for table in comparison.tables if table.title.startswith(title))
    found = next(row for row in table.rows if row[0] == name)
    return dict(zip(table.header[1:], found[1:], strict=True))


def test_the_baseline_is_plain_training_wherever_it_stands(groups):
    comparison = compare(groups)
    assert comparison.baseline.label == "clm"
    assert comparison.target == 4.2
    assert compare(groups, baseline="eslm").target == 3.0
    assert compare([groups[0], groups[2]]).baseline.label == "random"
    with pytest.raises(ConfigError, match="--baseline gpt: no such method; there are random, clm"):
        compare(groups, baseline="gpt")


def test_final_loss_with_mean_spread_and_differences(groups):
    comparison = compare(groups)
    assert row(comparison, "Validation loss at the end", "clm (2 seeds)") == {
        "final": "4.1000 [4.0000, 4.2000]",
        "against clm": "–",
        "against random": "+0.7000",  # of seed 1, which both have
        "best": "4.1000 [4.0000, 4.2000]",
        "perplexity": "60.64 [54.60, 66.69]",
    }
    assert row(comparison, "Validation loss at the end", "eslm (1 seed)") == {
        "final": "3.0000",
        "against clm": "-1.2000",
        "against random": "-0.5000",
        "best": "3.0000",
        "perplexity": "20.09",
    }


def test_costs(groups):
    assert row(compare(groups), "What the runs cost", "eslm") == {
        "iterations": "200",
        "tokens read": "200,000",
        "tokens trained on": "160,000",
        "FLOPs executed": "3.200e+11",
        "FLOPs, paper's count": "4.800e+11",
        "seconds": "80.0",
        "seconds per step": "0.4",
        "sequences kept": "0.8000",
        "tokens kept": "0.8000",
        "skipped steps": "0",
    }


def test_to_target_and_saved(groups):
    comparison = compare(groups)
    # clm: at 200 and at 190; eslm: 140; random: 172.
    assert row(comparison, "To a validation loss of 4.2000", "clm (2 seeds)") == {
        "iterations": "195 [190, 200]",
        "tokens trained on": "195,000 [190,000, 200,000]",
        "FLOPs executed": "3.900e+11 [3.800e+11, 4.000e+11]",
        "FLOPs, paper's count": "5.850e+11 [5.700e+11, 6.000e+11]",
        "seconds": "97.5 [95.0, 100.0]",
    }
    assert row(comparison, "Saved against clm to 4.2000", "eslm") == {
        "iterations": "+30.0%",  # 140 of the 200 of seed 1
        "tokens trained on": "+44.0%",  # 112,000 of 200,000
        "FLOPs executed": "+44.0%",
        "FLOPs, paper's count": "+44.0%",
        "seconds": "+44.0%",  # 56 of 100
    }
    assert row(comparison, "Saved against random", "eslm")["iterations"] == "+18.6%"  # 140 of 172
    # Against the control's 275.2 GFLOP, clm's seed 1 needs 400.
    assert row(comparison, "Saved against random", "clm")["FLOPs executed"] == "-45.3%"


def test_saved_against_the_best_baseline(groups, make_run):
    rho1 = Group("rho", [make_run("h", (4.0, 3.4), selection="rho1")])
    lucky = Group("mixed", [make_run("m", (4.0, 2.0), selection="uncertainty")])
    every = [*groups, rho1, lucky]
    assert best_baseline(every) is rho1
    title = "Saved against the best baseline, rho, to 3.8000"
    comparison = compare(every, target=3.8)
    # rho1 is there at 133 1/3, eslm at 160, for 0.8 of the FLOPs of a step.
    assert row(comparison, title, "eslm")["iterations"] == "-20.0%"
    assert row(comparison, title, "eslm")["FLOPs executed"] == "+4.0%"
    assert row(comparison, title, "clm")["iterations"] == "not reached"
    names = [r[0] for table in comparison.tables if table.title == title for r in table.rows]
    assert names == ["random", "clm", "eslm", "mixed"]
    # It is named once: not where it is what everything is compared with anyway.
    for few, base in ((every, "rho"), (groups[1:], None), ([groups[2], lucky], None)):
        titles = [table.title for table in compare(few, baseline=base).tables]
        assert not any("best baseline" in each for each in titles)


def test_losses_at_a_budget(groups):
    title = "Validation loss by the time a budget"
    assert not any(table.title.startswith(title) for table in compare(groups).tables)
    comparison = compare(groups, budgets=(3e11, 4.8e11))
    # 2e11 FLOPs at the first evaluation of clm, 4e11 at its last; 3 to 2 by the paper's count.
    assert row(comparison, title, "clm (2 seeds)") == {
        "3e+11 executed": "5.0500 [5.0000, 5.1000]",
        "3e+11 paper's count": "6.0000",
        "4.8e+11 executed": "n/a",
        "4.8e+11 paper's count": "4.8600 [4.8000, 4.9200]",
    }
    assert row(comparison, title, "eslm (1 seed)")["4.8e+11 paper's count"] == "3.0000"


def test_a_baseline_that_diverged_is_not_the_best(groups, make_run):
    broken = Group("broken", [make_run("n", (4.0, math.nan), selection="greats")])
    assert best_baseline([broken, *groups]) is groups[0]
    assert best_baseline([broken]) is None


def test_a_target_that_is_not_reached_is_said(groups):
    comparison = compare(groups, target=3.5)
    assert set(row(comparison, "To a validation loss", "clm (2 seeds)").values()) == {"not reached"}
    assert row(comparison, "Saved against clm", "eslm")["seconds"] == "clm: not reached"
    assert row(comparison, "Saved against random", "clm")["seconds"] == "not reached"
    comparison = compare(groups, target=4.1)
    cells = row(comparison, "To a validation loss", "clm (2 seeds)")
    assert set(cells.values()) == {"1 of 2 reached"}


def test_domains(groups):
    cells = row(compare(groups), "Validation loss by domain", "clm (2 seeds)")
    assert cells == {"book": "5.5000 [5.0000, 6.0000]", "code": "1.5000 [1.0000, 2.0000]"}
    for run in groups[1].runs:
        del run.records[-1]["valid_loss_by_domain"]
    assert row(compare(groups), "Validation loss by domain", "clm (2 seeds)") == {
        "book": "n/a",
        "code": "n/a",
    }


def test_missing_quantities_are_not_available_rather_than_zero(metrics_file):
    files = [metrics_file(n, line(10, 4.0)) for n in ("a.jsonl", "b.jsonl")]
    groups = [Group(path.stem, [read_run(path)]) for path in files]
    comparison = compare(groups)
    costs = row(comparison, "What the runs cost", "b")
    assert costs["tokens read"] == costs["seconds per step"] == "n/a"
    reach = row(comparison, "To a validation loss", "b (1 seed)")
    assert (reach["iterations"], reach["FLOPs executed"]) == ("10", "n/a")
    assert not any(
        table.title.startswith("Validation loss by domain") for table in comparison.tables
    )


def test_best_is_not_final(make_run):
    groups = [
        Group("a", [make_run("a", (2.0, 3.0))]),
        Group("b", [make_run("b", (4.0, math.nan))]),
    ]
    comparison = compare(groups)
    assert row(comparison, "Validation loss at the end", "a (1 seed)")["best"] == "2.0000"
    cells = row(comparison, "Validation loss at the end", "b (1 seed)")
    assert cells == {
        "final": "nan",
        "against a": "+nan",
        "best": "4.0000",
        "perplexity": "nan",
    }


def test_a_running_mean_reaches_a_target_later(make_run):
    groups = [Group(name, [make_run(name, (6.0, 4.0), seed=1)]) for name in ("a", "b")]
    title = "To a validation loss of"
    assert row(compare(groups, target=5.0), title, "b (1 seed)")["iterations"] == "150"
    comparison = compare(groups, target=5.0, window=2)
    assert row(comparison, title, "b (1 seed)")["iterations"] == "200"
    assert compare(groups, window=2).target == 5.0
    assert row(comparison, "Validation loss at the end", "b (1 seed)")["final"] == "4.0000"


def test_tasks_by_their_best_over_a_run(metrics_file):
    def run(name, seed, first, last):
        lines = [
            line(10, 4.0, **{"tasks/piqa/acc": first, "tasks/piqa/bits_per_byte": 1.0}),
            line(20, 3.9, **{"tasks/piqa/acc": last, "tasks/arc/x/acc_norm": 0.3}),
        ]
        return read_run(metrics_file(f"{name}{seed}.jsonl", {"run": {"seed": seed}}, *lines))

    groups = [
        Group("a", [run("a", 1, 0.6, 0.5), run("a", 2, 0.4, 0.5)]),
        Group("b", [run("b", 1, 0.5, 0.7)]),
    ]
    cells = row(compare(groups), "Tasks", "a (2 seeds)")
    # 0.6 and 0.5; their standard error is half of their difference.
    assert cells["piqa acc"] == "0.5500 ± 0.0500"
    assert cells["arc x acc_norm"] == "0.3000 ± 0.0000"
    assert cells["mean"] == "0.4250 ± 0.0250"
    assert row(compare(groups), "Tasks", "b (1 seed)")["mean"] == "0.5000"


def test_too_few_methods_and_no_evaluation(groups, metrics_file):
    with pytest.raises(ConfigError, match=r"1 method given \(clm\)"):
        compare(groups[1:2])
    blind = read_run(metrics_file("blind.jsonl", line(10), line(20)))
    with pytest.raises(ConfigError, match=r"blind\.jsonl has no valid_loss"):
        compare([groups[0], Group("blind", [blind])])


class TestNotes:
    def test_the_control_is_asked_for(self, groups):
        assert NO_CONTROL in compare(groups[1:]).notes
        assert NO_CONTROL not in compare(groups).notes
        titles = [table.title for table in compare(groups[1:]).tables]
        assert not any("random" in title for title in titles)

    def test_single_seeds_are_named(self, groups):
        assert any(
            note.startswith("One seed only: random, eslm.") for note in compare(groups).notes
        )

    def test_methods_of_other_seeds_are_told(self, groups, make_run):
        note = "The methods were not run with the same seeds."
        assert any(text.startswith(note) for text in compare(groups).notes)
        same = [Group(group.label, group.runs[:1]) for group in groups]
        assert not any(text.startswith(note) for text in compare(same).notes)

    def test_a_control_of_another_share_is_named(self, groups, make_run):
        near = Group("random 2", [make_run("n", (6.0, 3.7), 0.7, selection="random")])
        eslm = Group("eslm 2", [make_run("f", (5.0, 3.2), 0.71, selection="eslm")])
        both = [*groups, near, eslm]
        assert control_of(eslm, both) is near and control_of(groups[2], both) is groups[0]
        assert not any("No random control has" in note for note in compare(both).notes)
        text = "eslm 2 trains on 71.0% of the tokens; its control random on 80.0%"
        assert any(note.startswith(text) for note in compare([*groups, eslm]).notes)

    def test_runs_that_ended_early(self, groups):
        groups[2].runs[0].settings["train_iters"] = 300
        assert "e.jsonl (eslm) ended early, at 200 of 300 iterations." in compare(groups).notes

    def test_a_label_over_different_settings(self, groups):
        groups[1].runs[1].settings["lr"] = 2.0
        assert "The runs under clm differ in more: lr." in compare(groups).notes


def test_settings_that_differ_have_a_table(groups):
    assert row(compare(groups), "Settings that differ", "eslm") == {"selection": "eslm"}


def test_markdown(groups):
    groups[2] = Group("a|b <i>", groups[2].runs)
    comparison = compare(groups)
    text = markdown(comparison, "my report.png")
    assert "![Validation loss against what it cost](<my report.png>)" in text
    assert "\n| a\\|b \\<i\\> (1 seed) | 3.0000 |" in text
    for note in comparison.notes:
        assert f"\n{note}\n" in text
    small = Table("T", ["", "x"], [["a", "1"]], "How.")
    assert to_markdown(small) == "## T\n\n|  | x |\n|---|---:|\n| a | 1 |\n\nHow.\n"


def test_console_table():
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(to_console(Table("T", ["", "x"], [["[red]", "1"]])))
    text = console.export_text()
    assert "[red]" in text and text.startswith("T ")
