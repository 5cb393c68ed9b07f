"""No process outlives the one that started it. Two means, for two kinds of processes:

- Those that we start ourselves (loaders, preprocessing, the runs of a recipe) ask the kernel for a
  signal: `end_with_parent`. It also ends a process that is stopped or busy outside the interpreter.
- Ranks look at their ancestors from a thread: `end_with_launcher`. The kernel's signal comes when
  the *thread* that forked ends, and from which one a launcher forks is not ours to know (Open MPI
  has a pool of them for many ranks). And more than one process may stand between a rank and its
  launcher (`deepspeed` has one of its own, a script may be another), each of which can die. A
  thread needs the interpreter, but imports, which are all that holds it for long in the start, let
  go of it several times a second.

Imported first of all, so it imports nothing heavy.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from pathlib import Path

from megatron_eslm.watchdog.heartbeat import HOW_TO_GO_ON
from megatron_eslm.watchdog.last_words import say
from megatron_eslm.watchdog.process import stat

LOOK_SECONDS = 0.5
"""Between two looks at the ancestors."""
SAVE_SECONDS = 30.0
"""What training gets to save a checkpoint and end: as much as launchers give after SIGTERM."""

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)

_RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
_SHELLS = frozenset(("ash", "bash", "csh", "dash", "fish", "ksh", "sh", "tcsh", "zsh"))


def end_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Let the kernel send this process `number` as soon as `parent` has ended.

    To be called in a process that was just forked, or as `preexec_fn` of one that runs a program:

        multiprocessing.Process(target=work, args=(os.getpid(),))    # work: end_with_parent(pid)
        subprocess.Popen(..., preexec_fn=partial(end_with_parent, os.getpid(), signal.SIGTERM))

    The fork must happen in a thread that lasts as long as the parent, such as the main one. Where
    the system is not Linux this does nothing.

    Args:
        parent: process number of the caller's parent, from before the fork.
        number: SIGKILL, or what lets a program end in order.
    """
    if hasattr(_libc, "prctl"):
        _libc.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        if os.getppid() != parent:  # It ended before the kernel was asked.
            os.kill(os.getpid(), number)


def heed_parent_only(parent: int) -> None:
    """In a worker process: end with `parent`, or by its SIGTERM, and by nobody else's.

    Launchers signal the whole process tree, and the parent decides when the work ends: a loader
    that died of SIGTERM would take the step and the checkpoint before leaving with it.

    Args:
        parent: as for `end_with_parent`.
    """
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Blocked, so that it can be asked who has sent it: multiprocessing ends its children by it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def listen() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=listen, name="signals", daemon=True).start()


class Launcher:
    """The processes that started this rank: its parent, and so on up to the launcher.

    None is watched for a process that was started by hand: without a rank, or with one that was set
    in a shell, which may be left while the process goes on.
    """

    def __init__(self) -> None:
        pids = _ancestors_of_rank()
        self._was_gone = bool(pids) and _is_orphan(pids[-1])
        while pids and _name(pids[-1]) in _SHELLS:
            pids.pop()
        self._pids = pids
        self._names = {pid: f"{_name(pid) or 'process'} (pid {pid})" for pid in self._pids}
        self.patience_seconds = 0.0
        """For how long this rank may go on to save a checkpoint once one of them is gone."""

    @property
    def common_pid(self) -> int | None:
        """Of the launcher, where it is certain to be the same for all ranks of this machine."""
        # Of another user's process it is not known whether it is this rank's alone.
        return self._pids[-1] if self._pids and _read(self._pids[-1], "environ") else None

    def gone(self) -> str | None:
        """Which of them has ended, in words; None while all run. Its child has another parent."""
        if self._was_gone:
            return "the launcher"
        parent: int | None = os.getppid()
        for pid in self._pids:
            if parent != pid:
                return self._names[pid]
            parent = _parent(pid)
        return None

    def _watch(self) -> None:
        while self.gone() is None:
            time.sleep(LOOK_SECONDS)
        gone = self.gone()  # One that ended during the look, and took the next with it, was passed.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            say(f"error: {gone}, which started this job, has ended. {HOW_TO_GO_ON}\n")
        if self.patience_seconds:
            # It may have died of a signal that was meant for the whole job.
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(self.patience_seconds)
        os._exit(1)


def end_with_launcher() -> Launcher:
    """From now on end this process, if it is a rank, as soon as what started it has ended.

    Without the main thread, which may wait for ranks that are gone. While `patience_seconds` is
    set, as training does, by SIGTERM first.

    Returns:
        Who is watched.
    """
    launcher = Launcher()
    if launcher._pids or launcher._was_gone:
        # A rank that was stopped has to go on to see it. To any other one this does nothing.
        end_with_parent(os.getppid(), signal.SIGCONT)
        threading.Thread(target=launcher._watch, name="launcher", daemon=True).start()
    return launcher


def _ancestors_of_rank() -> list[int]:
    """From this process's parent to its launcher.

    The launcher is the first that is not itself this rank by its environment, as a script would be
    that the launcher runs and that then runs Python; or `deepspeed`, where that has started it.
    """
    names = [name for name in _RANK_VARIABLES if name in os.environ]
    if os.environ.get("SLURM_STEP_NUM_TASKS", "1") == "1" and "SLURM_PROCID" in names:
        names.remove("SLURM_PROCID")  # That of a shell or a script in an allocation.
    marks = {f"{name}={os.environ[name]}".encode() for name in names}
    pids: list[int] = []
    pid = os.getppid() if marks else None
    while pid:
        pids.append(pid)
        if marks.isdisjoint(_read(pid, "environ")):
            break
        pid = _parent(pid)
    if pids and (above := _parent(pids[-1])) and _is_deepspeed(above):
        pids.append(above)
    return pids


def _is_deepspeed(pid: int) -> bool:
    """Whether it is DeepSpeed's launcher, which starts ranks through one of its own or by MPI."""
    return not {b"deepspeed", b"ds", b"deepspeed.launcher.runner"}.isdisjoint(_program(pid))


def _is_orphan(top: int) -> bool:
    """Whether the launcher had ended before this process could look: an init has taken its place.

    Asked of `torchrun` and `deepspeed` only, which nobody imitates by hand.
    """
    if b"deepspeed.launcher.launch" in _read(top, "cmdline"):
        # DeepSpeed's for one machine, which `deepspeed` has started.
        above = _parent(top)
        return os.environ.get("CROSS_SIZE") == "1" and above is not None and _is_init(above)
    return ("TORCHELASTIC_RUN_ID" in os.environ or "CROSS_SIZE" in os.environ) and _is_init(top)


def _is_init(pid: int) -> bool:
    """Whether it takes in orphans, and is no launcher itself, as it can be in a container."""
    if pid != 1 and _name(pid) != "systemd":
        return False
    words = b" ".join(_program(pid))
    return not any(word in words for word in (b"python", b"torchrun", b"accelerate", b"deepspeed"))


def _program(pid: int) -> list[bytes]:
    """The first words of its command line, without folders: the interpreter, what it runs."""
    return [word.rpartition(b"/")[2] for word in _read(pid, "cmdline")[:3]]


def _parent(pid: int) -> int | None:
    seen = stat(pid)
    return None if seen is None else seen.parent


def _read(pid: int, what: str) -> list[bytes]:
    """The words of a file of /proc; none where it is gone, or another user's."""
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes().split(b"\0")
    except OSError:
        return []


def _name(pid: int) -> str:
    return b"".join(_read(pid, "comm")).decode(errors="replace").strip()
