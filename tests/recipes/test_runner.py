"""The runner: every run once, in an order that can be, across interruptions."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import yaml

from megatron_eslm.errors import ConfigError
from megatron_eslm.recipes.recipe import read_recipe
from megatron_eslm.recipes.runner import Runner
from megatron_eslm.watchdog.parent import end_with_parent

from ..training.conftest import make_domain
from ..training.runs import words

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "pretrain_gpt.py"

FAKE = """
import os, pathlib, signal, sys, time
flags = dict(zip(sys.argv[2::2], sys.argv[3::2]))
folder = pathlib.Path(flags["--save"])
folder.mkdir(parents=True, exist_ok=True)
with open("calls.txt", "a") as calls:
    calls.write(folder.parent.name + " " + flags.get("--load", "-") + chr(10))
if "--dry-run" in sys.argv:
    flops = 2e6 if flags["--selection"] == "clm" else 1e6
    total = flops * int(flags["--train-iters"])
    print(f"FLOPs executed       {total:.3e} ({flops:.3e} per step)")
    sys.exit()
(folder / "iter_0000001").mkdir(exist_ok=True)
if os.path.exists("fail"):
    sys.exit(3)
if os.path.exists("hang"):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    pathlib.Path("hangs").touch()
    try:
        time.sleep(60)
    finally:
        while os.path.exists("hang"):  # It saves a checkpoint.
            time.sleep(0.02)
        pathlib.Path("saved").touch()
pathlib.Path(folder.parent, "iters").write_text(flags["--train-iters"])
"""

METHODS = {
    "rho1": {"selection": "rho1", "needs": "clm", "load": "weights"},
    "clm": {"selection": "clm"},
    "random": {"selection": "random"},
    "short": {"selection": "clm", "flops-of": "random"},
}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A function that reads the recipe; its trainings are done by a script."""
    monkeypatch.chdir(tmp_path)
    Path("fake.py").write_text(FAKE)

    def make(**changes):
        content = {
            "output": "out",
            "launch": f"{sys.executable} fake.py",
            "seeds": [7],
            "prepare": [{"creates": "data/x", "run": "touch data/x"}],
            "flags": {"train-iters": 100},
            "methods": METHODS,
        } | changes
        Path("r.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return read_recipe("r.yaml")

    return make


def calls() -> list[str]:
    path = Path("calls.txt")
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def test_each_once_in_an_order_that_can_be(recipe):
    made = recipe()
    outcomes = Runner(made, SCRIPT).train(made.runs)
    assert set(outcomes.values()) == {"finished"}
    trained = [name for name in calls() if name != "random-seed7"]
    assert trained.index("clm-seed7") < trained.index("rho1-seed7")
    assert Path("data/x").exists()
    # random's steps cost half of clm's.
    assert Path("out/short-seed7/iters").read_text() == "50"
    assert Path("out/clm-seed7/iters").read_text() == "100"
    command = json.loads(Path("out/clm-seed7/command.json").read_text())
    assert command[2] == "pretrain_gpt.py"  # without the place of the package
    Path("calls.txt").unlink()
    assert set(Runner(made, SCRIPT).train(made.runs).values()) == {"finished"}
    assert "clm-seed7" not in calls()


def test_flops_are_counted_once_and_when_what_they_need_is_there(recipe):
    methods = {
        "short": {"selection": "clm", "flops-of": "rho1"},
        "rho1": {"selection": "rho1", "needs": "clm", "reference": "${run:clm}"},
        "clm": {"selection": "clm"},
    }
    made = recipe(methods=methods, seeds=[7, 8])
    assert set(Runner(made, SCRIPT).train(made.runs).values()) == {"finished"}
    assert Path("out/short-seed8/iters").read_text() == "50"
    names = calls()
    # rho1's step is asked for once, after the run that it needs, and trained once with each seed.
    assert [name for name in names if name.startswith("rho1")].count("rho1-seed7") == 2
    assert names.count("rho1-seed8") == 1
    assert names.index("clm-seed7") < names.index("rho1-seed7")


def test_a_failure_keeps_back_what_needs_it_and_is_taken_up_again(recipe):
    made = recipe()
    Path("fail").touch()
    outcomes = Runner(made, SCRIPT).train(made.runs)
    assert outcomes["clm-seed7"] == "failed" and outcomes["rho1-seed7"] == "waits"
    Path("fail").unlink()
    Path("calls.txt").unlink()
    assert set(Runner(made, SCRIPT).train(made.runs).values()) == {"finished"}
    loads = dict(line.split() for line in Path("calls.txt").read_text().splitlines())
    assert loads["clm-seed7"] == "out/clm-seed7/checkpoints"
    assert loads["rho1-seed7"] == "weights"


def test_weights_to_start_from_are_loaded_once(recipe):
    made = recipe(methods={"a": {"selection": "clm", "load": "weights"}})
    Path("fail").touch()
    assert Runner(made, SCRIPT).train(made.runs) == {"a-seed7": "failed"}
    Path("fail").unlink()
    assert Runner(made, SCRIPT).train(made.runs) == {"a-seed7": "finished"}
    lines = Path("calls.txt").read_text().split()
    assert lines == ["a-seed7", "weights", "a-seed7", "out/a-seed7/checkpoints"]


def test_a_changed_recipe_is_refused(recipe):
    made = recipe()
    Runner(made, SCRIPT).train(made.runs)
    changed = recipe(flags={"train-iters": 200})
    with pytest.raises(ConfigError, match="begun with another command"):
        Runner(changed, SCRIPT).train(changed.runs)
    assert Path("out/clm-seed7/iters").read_text() == "100"
    Path("out/clm-seed7/command.json").write_text("{")
    with pytest.raises(ConfigError, match=r"clm-seed7/command\.json is not JSON"):
        Runner(made, SCRIPT).train(made.runs)


def test_a_run_that_another_process_trains_is_left_to_it(recipe):
    made = recipe()
    folder = Path("out/clm-seed7")
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        outcomes = Runner(made, SCRIPT).train(made.runs)
    assert outcomes["clm-seed7"] == "held" and outcomes["rho1-seed7"] == "waits"
    assert outcomes["random-seed7"] == "finished"


def test_prepare_that_fails_or_makes_nothing_is_named(recipe):
    for command, message in (("false", "false ended with code 1"), ("true", "did not make data/x")):
        made = recipe(prepare=[{"creates": "data/x", "run": command}])
        with pytest.raises(ConfigError, match=message):
            Runner(made, SCRIPT).train(made.runs)


def test_a_program_that_is_not_there_is_named_and_can_be_mended(recipe):
    made = recipe(launch="no-such-launcher --a")
    with pytest.raises(ConfigError, match="'no-such-launcher' cannot be started"):
        Runner(made, SCRIPT).train(made.runs)
    made = recipe(prepare=[{"creates": "data/y", "run": "no-such-step"}])
    with pytest.raises(ConfigError, match="'no-such-step' cannot be started"):
        Runner(made, SCRIPT).train(made.runs)
    made = recipe(output="r.yaml")
    with pytest.raises(ConfigError, match=r"r\.yaml/.* cannot be made: .* Choose another 'output'"):
        Runner(made, SCRIPT).train(made.runs)
    made = recipe()
    assert Runner(made, SCRIPT).train(made.runs)["clm-seed7"] == "finished"


def tool(*words: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "run_recipe.py"), "r.yaml", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        preexec_fn=partial(end_with_parent, os.getpid()),
        **kwargs,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_training_ends_with_its_runner(recipe, number):
    """Handed on by it, or by the kernel; and meanwhile nobody else trains in the folder."""
    made = recipe()
    Path("hang").touch()
    runner = subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "run_recipe.py"), "r.yaml", "--only", "clm"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=partial(end_with_parent, os.getpid()),
    )
    while not Path("hangs").exists():
        assert runner.poll() is None
        time.sleep(0.05)
    runner.send_signal(number)
    if number == signal.SIGKILL:
        runner.wait()
        one = [run for run in made.runs if run.method == "clm"]
        assert Runner(made, SCRIPT).train(one) == {"clm-seed7": "held"}
    Path("hang").unlink()
    _, errors = runner.communicate(timeout=60)
    while not Path("saved").exists():
        time.sleep(0.02)
    assert not Path("out/clm-seed7/finished.json").exists()
    if number == signal.SIGTERM:
        assert runner.returncode == 1 and "the same command goes on" in errors


def test_parts_and_mistakes_on_the_command_line(recipe):
    recipe()
    printed = tool("--dry-run", "--index", "1", "--of", "2").stdout
    assert "clm-seed7: " in printed and "short-seed7: " in printed and "random" not in printed
    for flags, message in (
        (["--only", "clam"], "--only clam: the recipe has clm,"),
        (["--index", "1"], "belong together"),
        (["--index", "2", "--of", "2"], "runs from 0"),
        (["--set", "x"], "not NAME=VALUE"),
    ):
        done = tool(*flags)
        assert done.returncode == 2 and message in done.stderr


def test_real_trainings_and_their_report(recipe, tmp_path):
    data = [make_domain(tmp_path / name, name, 100) for name in ("prose", "code")]
    flags = words(data, iters=3)
    named = {}
    for word in flags:
        if word.startswith("--"):
            key = word[2:]
            named[key] = []
        else:
            named[key].append(word)
    common = {key: values if len(values) > 1 else values[0] for key, values in named.items()}
    recipe(
        launch="python",
        prepare=[],
        seeds=[1],
        flags=common,
        methods={
            "rho1": {"selection": "rho1", "needs": "clm", "reference": "${run:clm}"},
            "clm": {"selection": "clm"},
            "random": {"selection": "random", "eslm-alpha": 0.25},
            "clm short": {"selection": "clm", "flops-of": "random"},
        },
        after=[{"creates": "out/done", "run": "cp out/report.md out/done"}],
    )
    done = tool()
    assert done.returncode == 0, done.stderr
    report = Path("out/done").read_text()
    for name in ("rho1", "clm", "random", "clm short"):
        assert f"| {name}" in report
    assert Path("out/report.html").exists() and Path("out/report.png").exists()
