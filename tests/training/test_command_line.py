"""The command itself, as processes: launchers, exit codes, messages, signals, dead ranks."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from megatron_eslm.launch import signals
from megatron_eslm.launch.signals import ECHO_SECONDS
from megatron_eslm.training.main import fail
from megatron_eslm.watchdog.parent import end_with_parent

from ..harness import run_ranks
from ..launch.ranks import free_port
from .runs import read_metrics, train, words

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "pretrain_gpt.py")
PYTHON = [sys.executable, SCRIPT]
BIN = Path(sys.executable).parent
TORCHRUN = [
    *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
    *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", SCRIPT),
]
DEEPSPEED = [
    *(str(BIN / "deepspeed"), "--num_accelerators", "2"),
    *("--master_port", str(free_port()), SCRIPT),
]


MARK = "TEST_COMMAND_LINE"
"""Environment variable by which the processes of one command are found: launchers put their ranks
into process groups of their own."""


def environment(mark: str) -> dict[str, str]:
    drop = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    kept = {k: v for k, v in os.environ.items() if k not in drop}
    path = os.pathsep.join([str(BIN), kept.get("PATH", "")])
    return {
        **kept,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PATH": path,
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONFAULTHANDLER": "1",
        MARK: mark,
    }


def start(command: list[str], *flags: str, cwd: Path) -> subprocess.Popen:
    """In a process group of its own, which ends with the tests; `cwd` is its mark."""
    return subprocess.Popen(
        [*command, *flags],
        cwd=cwd,
        env=environment(str(cwd)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=partial(end_with_parent, os.getpid()),
    )


def run(command: list[str], *flags: str, cwd: Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; no process of it may be left."""
    process = start(command, *flags, cwd=cwd)
    try:
        out, err = process.communicate(timeout=120)
        assert_nothing_left(cwd)
    finally:
        stop(process, cwd)
    return process.returncode, out, err


def stop(process: subprocess.Popen, cwd: Path) -> None:
    """End what this test started, whatever became of it."""
    for pid in members(cwd):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def members(cwd: Path) -> dict[int, dict[str, str]]:
    """Environments of the live processes of a command that was started in `cwd`, by process."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            text = (entry / "environ").read_bytes().decode(errors="replace")
        except OSError:
            continue
        variables = dict(v.split("=", 1) for v in text.split("\0") if "=" in v)
        if variables.get(MARK) == str(cwd):
            found[int(entry.name)] = variables
    return found


def process_of_rank(cwd: Path, rank: int) -> int:
    """The lowest process: loaders, which have the same environment, come later."""
    return min(pid for pid, env in members(cwd).items() if env.get("RANK") == str(rank))


def assert_nothing_left(cwd: Path, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while (left := members(cwd)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, left.keys()


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


def test_every_launcher_trains_the_same(data: list[str], tmp_path: Path) -> None:
    """As a single rank without a launcher does."""
    one = run_ranks(1, lambda rank: train(words(data, iters=3), tmp_path / "one.jsonl"))[0]
    losses = {}
    for name, command in (("torchrun", TORCHRUN), ("deepspeed", DEEPSPEED)):
        metrics = tmp_path / f"{name}.jsonl"
        argv = words(data, "--metrics-file", metrics, iters=3, micro_batch_size=4)
        code, _, err = run(command, *argv, cwd=tmp_path)
        assert code == 0, err
        # Rank 0 alone reports.
        assert len(re.findall(r"iteration +3/3 \| loss", err)) == 1, err
        losses[name] = [line["loss"] for line in read_metrics(metrics)[1:]]
    assert len(one.column("loss")) == 3
    assert losses["torchrun"] == pytest.approx(one.column("loss"), abs=1e-5)
    assert losses["deepspeed"] == pytest.approx(losses["torchrun"], abs=1e-7)


def test_a_job_ends_with_tests_that_are_killed(tmp_path: Path) -> None:
    if (tests := os.fork()) == 0:
        try:
            start([sys.executable, "-c", "import time; time.sleep(60)"], cwd=tmp_path)
            signal.pause()
        finally:
            os._exit(1)
    while not members(tmp_path):
        assert os.waitpid(tests, os.WNOHANG) == (0, 0)
        time.sleep(0.01)
    os.kill(tests, signal.SIGKILL)
    os.waitpid(tests, 0)
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        pytest.param(PYTHON, 2, id="py"),
        # Ten seconds until DeepSpeed's launcher is there; bad data below ends its ranks, too.
        pytest.param(DEEPSPEED, 2, id="ds", marks=pytest.mark.slow),
        pytest.param(TORCHRUN, 1, id="torchrun"),
    ],
)
def test_a_mistyped_flag_ends_at_once_with_one_paragraph(
    tmp_path: Path, command: list[str], code: int
) -> None:
    begin = time.monotonic()
    found, _, err = run(command, "--eslm-alhpa", "0.1", cwd=tmp_path)
    assert found == code, err
    assert errors(err) == ["error: There is no option --eslm-alhpa. Did you mean --eslm-alpha?"]
    ours = err if command is not TORCHRUN else err[: err.find("error: ")]
    assert "Traceback" not in ours
    assert time.monotonic() - begin < 60


def test_bad_data_ends_every_rank(data: list[str], tmp_path: Path) -> None:
    """Found after the process group exists: still one paragraph, and nobody waits."""
    argv = words([str(tmp_path / "none"), data[1]], iters=3, micro_batch_size=4)
    code, _, err = run(DEEPSPEED, *argv, cwd=tmp_path)
    assert code == 2, err
    (text,) = errors(err)
    assert f"{tmp_path / 'none'}: there is no file" in text
    assert "Traceback" not in err


@pytest.mark.parametrize(("rank", "waits"), [("0", []), ("1", [3.0])])
def test_the_others_let_rank_zero_speak_first(
    rank: str, waits: list[float], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    done: list[float] = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(time, "sleep", done.append)
    monkeypatch.setattr(os, "_exit", done.append)
    monkeypatch.setattr(signals, "leave_with", lambda code: None)  # this process goes on
    fail("--flag is wrong.", 2)
    assert done == [*waits, 2]
    assert capfd.readouterr().err == "error: --flag is wrong.\n"


def test_dry_run_prints_and_trains_nothing(data: list[str], tmp_path: Path) -> None:
    argv = words(data, "--dry-run", "--save", tmp_path / "run")
    code, out, err = run(PYTHON, *argv, cwd=tmp_path)
    assert code == 0, err
    assert out.startswith("steps                4\n") and "FLOPs executed" in out
    assert "Traceback" not in err and not (tmp_path / "run").exists()


def wait_for_iteration(process: subprocess.Popen, metrics: Path, iteration: int) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if metrics.exists() and f'"iteration": {iteration},' in metrics.read_text():
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    for pid in members(metrics.parent):
        os.kill(pid, signal.SIGABRT)  # They say where they stand.
    raise AssertionError(f"training did not get under way: {process.communicate(timeout=30)[1]}")


def test_a_killed_rank_ends_the_job(data: list[str], tmp_path: Path) -> None:
    metrics = tmp_path / "m.jsonl"
    flags = ("--metrics-file", metrics, "--max-epochs", "1000000", "--num-workers", "1")
    argv = words(data, *flags, iters=100_000, micro_batch_size=4)
    process = start(TORCHRUN, *argv, cwd=tmp_path)
    try:
        wait_for_iteration(process, metrics, 3)
        os.kill(process_of_rank(tmp_path, 1), signal.SIGKILL)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "Signal 9 (SIGKILL)" in err
        assert_nothing_left(tmp_path)
    finally:
        stop(process, tmp_path)


def storm(process: subprocess.Popen) -> None:
    """Signals to the whole group until it ends, as an impatient person and a batch system send."""
    os.killpg(process.pid, signal.SIGINT)
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        time.sleep(0.02)


def test_a_storm_of_signals_to_everything_leaves_a_checkpoint(
    data: list[str], tmp_path: Path
) -> None:
    """Loader processes get them, too; after the first, nothing changes any more."""
    metrics, save = tmp_path / "m.jsonl", tmp_path / "run"
    flags = ("--metrics-file", metrics, "--save", save, "--max-epochs", "1000000")
    # Many micro-steps are left in the step when the first comes: loading has to go on.
    more = ("--num-workers", "2", "--global-batch-size", "320")
    argv = words(data, *flags, *more, iters=10_000)
    process = start(PYTHON, *argv, cwd=tmp_path)
    try:
        wait_for_iteration(process, metrics, 2)
        storm(process)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGINT, err
        assert "SIGINT: stopped after iteration" in err and "Traceback" not in err
        assert "KeyboardInterrupt" not in err and "Exception ignored" not in err
        assert err.count("stopping after this step") == 1
        assert_nothing_left(tmp_path)
    finally:
        stop(process, tmp_path)
    (folder,) = save.glob("iter_*")
    last = [line["iteration"] for line in read_metrics(metrics)][-1]
    assert folder.name == f"iter_{last:07d}"


@pytest.mark.slow
def test_a_second_ctrl_c_after_a_pause_ends_at_once(data: list[str], tmp_path: Path) -> None:
    """The short form is in test_signals.py; here are the process and its one line."""
    metrics = tmp_path / "m.jsonl"
    flags = ("--metrics-file", metrics, "--save", tmp_path / "run", "--max-epochs", "1000000")
    long = ("--num-workers", "1", "--global-batch-size", "8000", "--eval-iters", "0")
    process = start(PYTHON, *words(data, *flags, *long, iters=1000), cwd=tmp_path)
    try:
        wait_for_iteration(process, metrics, 1)
        process.send_signal(signal.SIGINT)
        time.sleep(ECHO_SECONDS + 0.5)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        (text,) = errors(err)
        assert text.startswith("error: stopped by SIGINT, at once by a second Ctrl-C")
        assert "Traceback" not in err and not list((tmp_path / "run").glob("iter_*"))
        assert_nothing_left(tmp_path)
    finally:
        stop(process, tmp_path)
