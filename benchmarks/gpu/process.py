"""Work in a process of its own: an error of the device, a crash or a hang ends that work alone."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch

HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


class WorkFailed(Exception):
    """The process raised, crashed, or ran out of time; the message says which."""


def in_process(
    work: Callable[..., Iterator[Any]], *args: Any, seconds: float, on_cpu: bool = False
) -> Iterator[Any]:
    """Yield what a generator function yields, run in another process, as it comes.

    Args:
        work: a function of a module; it and what it yields are pickled.
        args: its arguments.
        seconds: after which the process is killed.
        on_cpu: hide the GPUs from it.

    Raises:
        WorkFailed: the process did not come to its end; what it yielded before was yielded.
    """
    # A CUDA context does not survive a fork. Without one, a fork saves seconds of imports.
    spawns = torch.cuda.is_available()
    context: Any = multiprocessing.get_context("spawn" if spawns else "fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, work, args))
    with _environment(HIDDEN if on_cpu else {}):
        process.start()
    theirs.close()
    deadline = time.monotonic() + seconds
    try:
        while True:
            if not ours.poll(max(0.0, deadline - time.monotonic())):
                process.kill()
                raise WorkFailed(f"not done after {seconds:.0f} s, killed")
            try:
                kind, value = ours.recv()
            except EOFError:
                process.join()
                raise WorkFailed(f"its process ended with code {process.exitcode}") from None
            if kind == "end":
                return
            if kind == "error":
                raise WorkFailed(value)
            yield value
    finally:
        if process.is_alive():
            process.join(5.0)
        if process.is_alive():
            process.kill()
        process.join()
        ours.close()


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def _work(pipe: Connection, work: Callable[..., Iterator[Any]], args: tuple[Any, ...]) -> None:
    # DeepSpeed collects garbage several times an engine; what was imported need not be looked at.
    gc.freeze()
    try:
        for value in work(*args):
            pipe.send(("value", value))
        pipe.send(("end", None))
    except BaseException as error:
        traceback.print_exc()
        text = str(error).strip().partition("\n")[0]
        pipe.send(("error", f"{type(error).__name__}: {text}"))
    pipe.close()
    # Without the interpreter's end, which waits for threads of process groups.
    os._exit(0)
