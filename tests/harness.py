"""Run a function on several ranks: `run_ranks`, for every test that needs more than one process.

    def on_rank(rank: int, scale: float) -> float:
        x = torch.full((1,), scale * rank)
        dist.all_reduce(x)
        return x.item()

    def test_sum():
        assert run_ranks(2, on_rank, 3.0) == [3.0, 3.0]

Ranks are forked from the test process, which has imported torch, deepspeed and megatron-core by
then: a world of four starts in about half a second. What follows from that:

- The function and its arguments need not be picklable: closures and lambdas will do. What it
  returns must be. Return CPU tensors without gradient, or plain numbers.
- What the ranks change (arguments, environment, module state) stays with them.
- The test process must not hold a process group (no `process_group` fixture in the same test) and
  must never have run torch on more than one thread (conftest.py sees to it).
- Ranks meet in a file, so no port is taken, and talk over gloo. `dist.group.WORLD` exists when the
  function starts; RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set as a launcher
  sets them, for code that reads them (deepspeed.initialize, bootstrap.init_distributed).

A rank that raises fails the test with that rank's traceback. Ranks that hang are killed after
`timeout` seconds and fail the test with the place where each of them stood.
"""

from __future__ import annotations

import os

# Ranks are forked, and a CUDA context does not survive a fork.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import faulthandler
import gc
import multiprocessing.connection
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_eslm.launch.bootstrap import quiet_imports
from megatron_eslm.launch.device import prepare_device
from megatron_eslm.watchdog.parent import end_with_parent


class RankFailed(AssertionError):
    """A rank raised, died or hung; the message carries what is known of each."""


def run_ranks(
    world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 120.0
) -> list[Any]:
    """Run `fn(rank, *args)` on `world_size` ranks at once and return their results in rank order.

    Args:
        world_size: number of processes.
        fn: called on every rank inside a gloo group of all ranks; may be a closure.
        args: passed on as they are.
        timeout: seconds after which the ranks are killed and the test fails.

    Raises:
        RankFailed: a rank raised an exception, ended without a result or did not end in time.
    """
    if dist.is_initialized():
        raise RuntimeError("run_ranks forks, and the group of this process cannot be forked")
    quiet_imports()
    prepare_device()
    with TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        context = mp.start_processes(
            _one_rank,
            args=(os.getpid(), world_size, fn, args, folder, timeout),
            nprocs=world_size,
            join=False,
            start_method="fork",
        )
        try:
            hung = _wait(context.processes, folder, timeout)
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return _results(folder, world_size, [p.exitcode for p in context.processes], hung)


def _wait(processes: list, folder: Path, timeout: float) -> bool:
    """Until all ranks have ended or one has failed; True if the time ran out first."""
    deadline = time.monotonic() + timeout + 1.0  # the ranks write where they stand at `timeout`
    while any(p.is_alive() for p in processes):
        if any(p.exitcode not in (None, 0) for p in processes) or any(folder.glob("*.error")):
            # The others may fail because of this one; they get a moment to say so.
            multiprocessing.connection.wait([p.sentinel for p in processes], timeout=0.2)
            return False
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return True
        alive = [p.sentinel for p in processes if p.is_alive()]
        multiprocessing.connection.wait(alive, timeout=min(remaining, 0.5))
    return False


def _results(folder: Path, world_size: int, exit_codes: list[int], hung: bool) -> list[Any]:
    results, failures, missing = [], [], []
    for rank in range(world_size):
        error, result = folder / f"{rank}.error", folder / f"{rank}.result"
        if error.exists():
            failures.append((error.stat().st_mtime_ns, f"rank {rank} raised:\n{error.read_text()}"))
        elif result.exists():
            results.append(pickle.loads(result.read_bytes()))
        else:
            stack = (folder / f"{rank}.stack").read_text() if hung else ""
            how = "did not end in time; it stood at\n" if hung else "ended without a result"
            missing.append(f"rank {rank} {how}{stack} (exit code {exit_codes[rank]})")
    if failures:  # the first is the cause, others often its consequence
        raise RankFailed("\n".join(text for _, text in sorted(failures)))
    if missing:
        raise RankFailed("\n".join(missing))
    return results


def _one_rank(
    rank: int,
    tests: int,
    world_size: int,
    fn: Callable,
    args: tuple,
    folder: Path,
    timeout: float,
) -> None:
    end_with_parent(tests)
    gc.freeze()  # what the test process has imported is not looked through again and again
    stack = (folder / f"{rank}.stack").open("w")
    faulthandler.dump_traceback_later(timeout, file=stack)
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",  # never listened to: the group exists already
    )
    try:
        store = dist.FileStore(str(folder / "store"), world_size)
        dist.init_process_group(
            "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=2 * timeout),
        )
        result = pickle.dumps(fn(rank, *args))
        dist.barrier()  # no rank leaves while another still waits for its data
    except BaseException:
        draft = folder / f"{rank}.draft"
        draft.write_text(traceback.format_exc())
        draft.rename(folder / f"{rank}.error")
        _leave(1)
    (folder / f"{rank}.result").write_bytes(result)
    _leave(0)


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the interpreter's clean-up, which would run what the test process has registered.
    os._exit(code)
