"""The training command in a fork of this process, which has imported everything already."""

from __future__ import annotations

import atexit
import faulthandler
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_eslm.launch.bootstrap import quiet_imports
from megatron_eslm.launch.device import prepare_device

LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int | None
    """Exit code, negative for a signal; None where it hung and was killed."""
    err: str
    """Its stderr."""

    @property
    def errors(self) -> list[str]:
        """Messages of the command."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


def warm_up() -> None:
    """Import what the command imports, on one thread: forks of a pool of threads hang."""
    torch.set_num_threads(1)
    quiet_imports()
    prepare_device()
    import megatron_eslm.training.build
    import megatron_eslm.training.loop  # noqa: F401


def start(argv: Sequence[str], folder: Path, name: str = "out") -> int:
    """Fork a process that runs pretrain_gpt.py's `main(argv)`; its number."""
    from megatron_eslm.training.main import main

    return fork(lambda: main(list(argv)), folder, name)


def fork(do: Callable[[], object], folder: Path, name: str = "out") -> int:
    """Fork a process, of its own group, that does something in `folder` and leaves its stderr."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        atexit._clear()  # what the parent registered, as the end of its temporary folders
        os.setsid()
        os.chdir(folder)
        file = os.open(f"{name}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        faulthandler.enable(file)
        for variable in LAUNCH:
            os.environ.pop(variable, None)
        do()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait(pid: int, folder: Path, name: str = "out", *, seconds: float = 60.0) -> Ended:
    """Wait for a forked process, and kill it if it does not end."""
    deadline = time.monotonic() + seconds
    code: int | None = None
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            break
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            break
        time.sleep(0.01)
    return Ended(code, (folder / f"{name}.err").read_text(errors="replace"))


def run(argv: Sequence[str], folder: Path, name: str = "out", *, seconds: float = 60.0) -> Ended:
    """Run the training command to its end."""
    return wait(start(argv, folder, name), folder, name, seconds=seconds)
