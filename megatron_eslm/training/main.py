"""Entry point: parse, build and train; on failure, end with one clear message."""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
from collections.abc import Sequence

from megatron_eslm.errors import ConfigError
from megatron_eslm.launch import signals
from megatron_eslm.launch.bootstrap import init_distributed, leave
from megatron_eslm.launch.device import (
    device_text,
    order_kernels_for_tensor_parallel,
    out_of_memory_text,
    set_matmul_precision,
)
from megatron_eslm.launch.launchers import discover
from megatron_eslm.launch.rendezvous import meet
from megatron_eslm.training.command_line import read_command_line
from megatron_eslm.watchdog.last_words import say
from megatron_eslm.watchdog.parent import SAVE_SECONDS, Launcher
from megatron_eslm.watchdog.phases import Phases
from megatron_eslm.watchdog.watchdog import Watchdog, job_watchdog

logger = logging.getLogger(__name__)


def configure_logging() -> None:
    """Log INFO from rank 0, errors from all ranks, and warnings of libraries."""
    rank_zero = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr, force=True)
    logging.getLogger("megatron_eslm").setLevel(logging.INFO if rank_zero else logging.ERROR)


def fail(message: str, code: int, watchdog: Watchdog | None = None) -> None:
    """Print the message once per job and end the process.

    Usually every rank fails with the same message. Launchers kill all processes as soon as the
    first has ended, so other ranks wait to let rank 0 print first. A rank still alive afterwards is
    the only one that failed, and prints the message itself.
    """
    signals.leave_with(code)
    if watchdog is not None:
        watchdog.fail(message, code=code)
    if os.environ.get("RANK", "0") != "0":
        time.sleep(3.0)
    say(f"error: {message}\n")
    # Skip destructors of process groups, which may wait for ranks that are gone.
    os._exit(code)


def print_page(text: str) -> None:
    """Write to standard output; raise ConfigError if that fails, as on a full disk."""
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except OSError as error:
        raise ConfigError(f"standard output cannot be written: {error.strerror}.") from error


def main(argv: Sequence[str] | None = None, launcher: Launcher | None = None) -> None:
    """Entry point of pretrain_gpt.py.

    Args:
        argv: flags. Default: the command line.
        launcher: the launcher of this rank, already being watched.

    Exit codes, the same on all ranks:

    - 0: trained to the end, or saved and stopped by --exit-interval or --exit-duration-minutes;
    - 2: bad input;
    - 1: any other error;
    - 128 + n: stopped by signal n: 143 SIGTERM, 130 Ctrl-C, 138 --exit-signal USR1. During
      training, a checkpoint is saved first.
    """
    began_seconds = time.monotonic()
    signals.end_at_once()
    argv = sys.argv[1:] if argv is None else argv
    phases, watchdog = Phases(), None
    try:
        discover()
        configure_logging()
        run = read_command_line(argv, int(os.environ.get("WORLD_SIZE", "1")))
        signals.end_at_once(run.training.stop_signals)
        connect_seconds = 60.0 * run.engine.rendezvous_timeout_minutes
        meeting = meet(connect_seconds, launcher)
        timeout_seconds = 60.0 * run.engine.distributed_timeout_minutes
        watchdog = job_watchdog(meeting, phases, timeout_seconds, launcher)
        signals.unwind(run.training.stop_signals)
        order_kernels_for_tensor_parallel(run.engine.tensor_model_parallel_size)
        set_matmul_precision(tf32=run.engine.tf32, deterministic=run.engine.deterministic)
        device = init_distributed(
            run.engine.collective_timeout_seconds, meeting=meeting, connect_seconds=connect_seconds
        )
        logger.info("%d x %s", meeting.world_size, device_text(device))
        # Imported here, so that --help and a mistyped flag need not wait for them.
        from megatron_eslm.data.loader_processes import LoaderError
        from megatron_eslm.training.build import build_trainer
        from megatron_eslm.training.dry_run import dry_run
        from megatron_eslm.training.nonfinite import NonfiniteError

        if run.report.dry_run:
            text, refusal = dry_run(run)
            if os.environ["RANK"] == "0":
                print_page(text)
            if refusal is not None:
                raise refusal
            stopped = None
        else:
            try:
                trainer = build_trainer(run, phases)
                if launcher is not None:
                    launcher.patience_seconds = SAVE_SECONDS
                stopped = trainer.train(began_seconds)
            except (LoaderError, NonfiniteError) as error:
                fail(str(error), 1, watchdog)
        signals.ignore()
        if watchdog is not None:
            watchdog.stop()
    except ConfigError as error:
        fail(str(error), 2, watchdog)
    except signals.Interrupted as end:
        signals.leave_with(end.code)
        if watchdog is not None:
            # Launchers also send the signal to other ranks when one dies. Report the death then.
            watchdog.fail(str(end), code=end.code, patience_seconds=1.0)
        fail(str(end), end.code)
    except Exception as error:
        if (lack := out_of_memory_text(error)) is not None:
            traceback.print_exc()
            fail(lack, 1, watchdog)
        # Do not re-raise: the interpreter would wait for its loader processes at exit, and the
        # launcher or another rank for this one.
        signals.ignore()
        if watchdog is not None:
            watchdog.fail_with(error)
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)

    leave(0 if stopped is None else 128 + stopped)
