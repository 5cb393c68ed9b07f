"""End processes together with the process that started them.

- Processes that we start ourselves (loaders, preprocessing, the runs of a recipe) ask the kernel
  for a signal: `end_with_parent`. It also ends a process that is stopped or busy in native code.
- Ranks poll their ancestors from a thread: `end_with_launcher`. The kernel's signal would not do:
  it comes when the *thread* that forked ends, and launchers may fork from short-lived threads
  (Open MPI has a thread pool). Also, several processes may stand between a rank and its launcher
  (a helper of `deepspeed`, a script), and each can die. The thread needs the interpreter lock;
  imports, the only long holders during start-up, release it several times per second.

Imported before anything else, so it imports nothing heavy.
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
"""Interval between two looks at the ancestors."""
SAVE_SECONDS = 30.0
"""Grace period for training to save a checkpoint; launchers allow as much after SIGTERM."""

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)

_RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
_SHELLS = frozenset(("ash", "bash", "csh", "dash", "fish", "ksh", "sh", "tcsh", "zsh"))


def end_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send this process the signal `number` as soon as `parent` ends.

    Call it in a newly forked process, or as `preexec_fn` of a subprocess:

        multiprocessing.Process(target=work, args=(os.getpid(),))    # work: end_with_parent(pid)
        subprocess.Popen(..., preexec_fn=partial(end_with_parent, os.getpid(), signal.SIGTERM))

    The thread that forks must live as long as the parent, as the main thread does. Does nothing on
    systems other than Linux.

    Args:
        parent: PID of the caller's parent, taken before the fork.
        number: SIGKILL, or a signal on which the program shuts down cleanly.
    """
    if hasattr(_libc, "prctl"):
        _libc.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        if os.getppid() != parent:  # The parent ended before the call.
            os.kill(os.getpid(), number)


def heed_parent_only(parent: int) -> None:
    """Make a worker process end with `parent` or on SIGTERM from `parent`, and on no other SIGTERM.

    Launchers signal the whole process tree, but the parent decides when to stop: if its loader died
    of SIGTERM, the current step and the final checkpoint would be lost.

    Args:
        parent: as for `end_with_parent`.
    """
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Block SIGTERM to learn its sender below: multiprocessing also ends its children with it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def listen() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=listen, name="signals", daemon=True).start()


class Launcher:
    """The processes that started this rank, from its parent up to the launcher.

    Empty for a process started by hand, without a rank or with a rank set in a shell: the user may
    leave that shell while the process continues.
    """

    def __init__(self) -> None:
        pids = _ancestors_of_rank()
        self._was_gone = bool(pids) and _is_orphan(pids[-1])
        while pids and _name(pids[-1]) in _SHELLS:
            pids.pop()
        self._pids = pids
        self._names = {pid: f"{_name(pid) or 'process'} (pid {pid})" for pid in self._pids}
        self.patience_seconds = 0.0
        """Grace period to save a checkpoint after one of these processes has ended."""

    @property
    def common_pid(self) -> int | None:
        """PID of the launcher, if certainly the same for all ranks of this machine; else None."""
        # Another user's process cannot be read, so it may serve only this rank.
        return self._pids[-1] if self._pids and _read(self._pids[-1], "environ") else None

    def gone(self) -> str | None:
        """Name the first process that has ended (its child has a new parent); None if all run."""
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
        gone = self.gone()  # Again, in case the first look missed one that ended during it.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            say(f"error: {gone}, which started this job, has ended. {HOW_TO_GO_ON}\n")
        if self.patience_seconds:
            # The launcher may have died of a signal meant for the whole job.
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(self.patience_seconds)
        os._exit(1)


def end_with_launcher() -> Launcher:
    """Start a thread that ends this rank as soon as a process that started it has ended.

    A thread, because the main thread may wait for ranks that are gone. If training has set
    `patience_seconds`, the thread sends SIGTERM and waits that long before it exits.

    Returns:
        The watched processes.
    """
    launcher = Launcher()
    if launcher._pids or launcher._was_gone:
        # A stopped rank must continue in order to notice; SIGCONT does nothing to a running one.
        end_with_parent(os.getppid(), signal.SIGCONT)
        threading.Thread(target=launcher._watch, name="launcher", daemon=True).start()
    return launcher


def _ancestors_of_rank() -> list[int]:
    """List the PIDs from this process's parent up to its launcher.

    The launcher is the first ancestor whose environment does not set this rank; a wrapper script
    that the launcher runs does set it. If `deepspeed` started that launcher, `deepspeed` is added.
    """
    names = [name for name in _RANK_VARIABLES if name in os.environ]
    if os.environ.get("SLURM_STEP_NUM_TASKS", "1") == "1" and "SLURM_PROCID" in names:
        names.remove("SLURM_PROCID")  # Set by a shell or script in an allocation.
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
    """Whether it is the `deepspeed` command, which starts ranks by another launcher or MPI."""
    return not {b"deepspeed", b"ds", b"deepspeed.launcher.runner"}.isdisjoint(_program(pid))


def _is_orphan(top: int) -> bool:
    """Whether the launcher had already ended at the first look, so that init is the parent.

    Checks `torchrun` and `deepspeed` only, since nobody sets their variables by hand.
    """
    if b"deepspeed.launcher.launch" in _read(top, "cmdline"):
        # DeepSpeed's per-machine launcher, started by `deepspeed`.
        above = _parent(top)
        return os.environ.get("CROSS_SIZE") == "1" and above is not None and _is_init(above)
    return ("TORCHELASTIC_RUN_ID" in os.environ or "CROSS_SIZE" in os.environ) and _is_init(top)


def _is_init(pid: int) -> bool:
    """Whether it adopts orphans and is not a launcher, which can have PID 1 in a container."""
    if pid != 1 and _name(pid) != "systemd":
        return False
    words = b" ".join(_program(pid))
    return not any(word in words for word in (b"python", b"torchrun", b"accelerate", b"deepspeed"))


def _program(pid: int) -> list[bytes]:
    """The first three words of its command line without folders: interpreter and program."""
    return [word.rpartition(b"/")[2] for word in _read(pid, "cmdline")[:3]]


def _parent(pid: int) -> int | None:
    seen = stat(pid)
    return None if seen is None else seen.parent


def _read(pid: int, what: str) -> list[bytes]:
    """The entries of a file in /proc; empty if the process is gone or belongs to another user."""
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes().split(b"\0")
    except OSError:
        return []


def _name(pid: int) -> str:
    return b"".join(_read(pid, "comm")).decode(errors="replace").strip()
