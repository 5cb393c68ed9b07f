"""Who is the launcher of a rank, and that a process ends with its parent."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_eslm.watchdog import parent
from megatron_eslm.watchdog.parent import end_with_parent, heed_parent_only
from megatron_eslm.watchdog.process import stat

ROOT = Path(__file__).parents[2]

RANK = """
import os, sys, time
sys.path.insert(0, {root!r})
from megatron_eslm.watchdog.parent import end_with_launcher
launcher = end_with_launcher()
heavy = {{"torch", "numpy", "multiprocessing"}} & set(sys.modules)
assert not heavy, heavy
print(os.getpid(), launcher._pids, launcher.common_pid, flush=True)
time.sleep(60)
"""

LAUNCHER = """
import os, subprocess, sys
os.environ.update(v.split("=") for v in sys.argv[1].split())
subprocess.run(sys.argv[2:], env=dict(os.environ))
"""


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while (seen := stat(pid)) is not None and seen.state != "Z" and time.monotonic() < deadline:
        time.sleep(0.02)
    return seen is None or seen.state == "Z"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "rank.py").write_text(RANK.format(root=str(ROOT)))
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    # As `deepspeed` begins, which starts one more process.
    (tmp_path / "deepspeed").write_text(LAUNCHER)
    return tmp_path


def begin(command: list[str], folder: Path) -> tuple[subprocess.Popen, int, list[int], int | None]:
    """Start it; what the rank in it says: its number, its ancestors and the certain launcher."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    environment = {k: v for k, v in os.environ.items() if k not in names}
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    rank, _, rest = process.stdout.readline().strip().partition(" ")
    pids, common = rest.rsplit(" ", 1)
    return process, int(rank), [int(p) for p in pids.strip("[]").split(",") if p], eval(common)


PY = sys.executable
LAUNCH = [PY, "launcher.py"]
WRAPPED = ["bash", "-c", f"{PY} rank.py; true"]
EXPORTS = ["bash", "-c", f"export RANK=$PMI_RANK WORLD_SIZE=2; {PY} rank.py; true"]


@pytest.mark.parametrize(
    ("command", "watched"),
    [
        ([*LAUNCH, "RANK=1 WORLD_SIZE=2", PY, "rank.py"], 1),
        # A script that the launcher runs, which dies on its own, or with the launcher.
        ([*LAUNCH, "RANK=1 WORLD_SIZE=2", *WRAPPED], 2),
        ([*LAUNCH, "PMI_RANK=1", *EXPORTS], 2),
        ([*LAUNCH, "SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=2", *WRAPPED], 2),
        # DeepSpeed's, and the one that it starts for each machine.
        ([PY, "deepspeed", "A=b", *LAUNCH, "RANK=0 WORLD_SIZE=1", PY, "rank.py"], 2),
    ],
    ids=["launcher", "script", "script that sets the rank", "srun", "deepspeed"],
)
def test_a_rank_ends_with_each_process_up_to_its_launcher(
    script: Path, command: list[str], watched: int
) -> None:
    for victim in range(watched):
        process, rank, pids, common = begin(command, script)
        try:
            assert len(pids) == watched
            assert pids[-1] == process.pid == common
            os.kill(pids[victim], signal.SIGKILL)
            assert gone(rank)
            _, errors = process.communicate(timeout=20)
            assert f"(pid {pids[victim]}), which started this job, has ended. " in errors
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_a_rank_that_is_stopped_ends_with_its_launcher(script: Path) -> None:
    process, rank, _, _ = begin([*LAUNCH, "RANK=1 WORLD_SIZE=2", PY, "rank.py"], script)
    os.kill(rank, signal.SIGSTOP)
    process.kill()
    process.wait()
    assert gone(rank)


@pytest.mark.parametrize(
    "command",
    [
        [*WRAPPED],
        ["bash", "-c", f"RANK=0 WORLD_SIZE=2 {PY} rank.py & wait"],
        ["bash", "-c", f"export RANK=0 WORLD_SIZE=2; bash -c '{PY} rank.py; true' & wait"],
        ["env", "SLURM_PROCID=0", *WRAPPED],
        ["env", "SLURM_PROCID=0", "SLURM_STEP_NUM_TASKS=1", *WRAPPED],
    ],
    ids=["no rank", "a rank set in a shell", "and in a script", "batch script", "interactive step"],
)
def test_what_is_started_by_hand_outlives_its_shell(script: Path, command: list[str]) -> None:
    process, rank, pids, certain = begin(command, script)
    try:
        assert (pids, certain) == ([], None)
        process.kill()
        process.wait()
        assert stat(rank) is not None
    finally:
        os.killpg(process.pid, signal.SIGKILL)


PYTHON_LAUNCH = "python -u -m deepspeed.launcher.launch --world_info=x"


@pytest.mark.parametrize(
    ("table", "variables", "gone"),
    [
        # (parent, name, command line) by number; this process's parent is 20.
        ({20: (10, "pt_elastic", "python /bin/torchrun"), 10: (1, "bash", "bash")}, {}, False),
        ({20: (0, "pt_elastic", "python /bin/torchrun x")}, {}, False),
        ({20: (0, "tini", "/sbin/tini -- bash")}, {}, True),
        ({20: (0, "bash", "bash run.sh")}, {}, True),
        ({20: (1, "systemd", "/usr/lib/systemd/systemd --user")}, {}, True),
        # Ranks that were numbered by hand have nobody to wait for.
        ({20: (0, "tini", "/sbin/tini -- bash")}, {"TORCHELASTIC_RUN_ID": None}, False),
        ({20: (10, "python", PYTHON_LAUNCH), 10: (5, "deepspeed", "python /bin/deepspeed x")},
         {"CROSS_SIZE": "1"}, False),
        ({20: (1, "python", PYTHON_LAUNCH), 1: (0, "deepspeed", "python /bin/deepspeed x")},
         {"CROSS_SIZE": "1"}, False),
        ({20: (1, "python", PYTHON_LAUNCH), 1: (0, "init", "/sbin/init")},
         {"CROSS_SIZE": "1"}, True),
        # Its part on one of several machines has been started by hand, or over ssh.
        ({20: (1, "python", PYTHON_LAUNCH), 1: (0, "init", "/sbin/init")},
         {"CROSS_SIZE": "2"}, False),
    ],
)  # fmt: skip
def test_a_launcher_that_had_ended_before_the_first_look(
    table: dict[int, tuple[int, str, str]],
    variables: dict[str, str | None],
    gone: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    top = 1 if table[20][0] == 0 else 20

    def of(pid: int) -> tuple[int, str, str]:
        return table.get(20 if pid == top else pid, (0, "init", "/sbin/init"))

    def read(pid: int, what: str) -> list[bytes]:
        words = {"cmdline": of(pid)[2].split(), "comm": [of(pid)[1]], "environ": ["HOME=/"]}
        return [word.encode() for word in words[what]]

    environment = {"RANK": "0", "TORCHELASTIC_RUN_ID": "x", **variables}
    monkeypatch.setattr(os, "environ", {k: v for k, v in environment.items() if v is not None})
    monkeypatch.setattr(os, "getppid", lambda: top)
    monkeypatch.setattr(parent, "_read", read)
    monkeypatch.setattr(parent, "_parent", lambda pid: of(pid)[0])
    assert (parent.Launcher().gone() is not None) == gone


SAVES = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from megatron_eslm.watchdog.parent import end_with_launcher
def save(*_):
    open("saved", "w").write("x")
    while {hangs}:
        time.sleep(1)
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
end_with_launcher().patience_seconds = {patience}
print(os.getpid(), [], None, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("hangs", [False, True])
def test_training_saves_before_it_ends(script: Path, hangs: bool) -> None:
    (script / "rank.py").write_text(
        SAVES.format(root=str(ROOT), hangs=hangs, patience=0.5 if hangs else 30)
    )
    command = [*LAUNCH, "RANK=1 WORLD_SIZE=2 LOCAL_RANK=0", PY, "rank.py"]
    process, rank, _, _ = begin(command, script)
    assert process.stderr is not None
    process.stderr.close()  # A launcher that hands on what its ranks say takes that with it.
    process.kill()
    process.wait()
    assert gone(rank)
    assert (script / "saved").read_text() == "x"


def test_the_kernel_ends_a_process_with_its_parent() -> None:
    """Even one that is stopped; and a program, by the signal that was asked for."""
    reader, writer = os.pipe()
    starter = os.fork()
    if starter == 0:
        with_this = functools.partial(end_with_parent, os.getpid())
        program = subprocess.Popen(
            [PY, "-c", "import signal, time; print(signal.SIGTERM, flush=True); time.sleep(60)"],
            preexec_fn=functools.partial(with_this, signal.SIGTERM),
            stdout=writer,
        )
        stopped = os.fork()
        if stopped == 0:
            with_this()
            os.kill(os.getpid(), signal.SIGSTOP)
            os._exit(0)
        os.waitpid(stopped, os.WUNTRACED)
        os.write(writer, f"{program.pid} {stopped}\n".encode())
        time.sleep(60)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        lines = sorted(pipe.readline() for _ in range(2))
    pids = next(line for line in lines if line.count(" ") == 1 and line[0].isdigit()).split()
    os.kill(starter, signal.SIGKILL)
    os.waitpid(starter, 0)
    assert all(gone(int(pid)) for pid in pids)


def test_a_worker_heeds_its_parent_only() -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        heed_parent_only(os.getppid())
        os.write(writer, b".")
        time.sleep(60)
        os._exit(1)
    os.read(reader, 1)
    others = "import os, signal; [os.kill({}, n) for n in (signal.SIGINT, signal.SIGTERM)]"
    subprocess.run([PY, "-c", others.format(pid)], check=True)
    os.kill(pid, signal.SIGINT)
    time.sleep(0.2)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    os.kill(pid, signal.SIGTERM)
    assert os.waitpid(pid, 0) == (pid, 0)


def test_a_parent_that_has_ended_already_counts() -> None:
    pid = os.fork()
    if pid == 0:
        end_with_parent(os.getppid() + 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
