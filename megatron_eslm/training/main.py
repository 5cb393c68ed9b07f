"""The command: parse, build, train, and end with one clear message where that cannot be."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from types import FrameType

from megatron_eslm.config.run import parse_run
from megatron_eslm.errors import ConfigError
from megatron_eslm.parallel.bootstrap import init_distributed, leave
from megatron_eslm.parallel.launch import discover
from megatron_eslm.parallel.phases import Phases
from megatron_eslm.parallel.watchdog import Watchdog, job_watchdog

logger = logging.getLogger(__name__)


def configure_logging() -> None:
    """INFO from rank 0, errors from everyone, warnings of libraries."""
    rank_zero = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr, force=True)
    logging.getLogger("megatron_eslm").setLevel(logging.INFO if rank_zero else logging.ERROR)


def fail(message: str, code: int, watchdog: Watchdog | None = None) -> None:
    """Say why, once, and end the process.

    Mostly every rank comes here with the same message. Where they do not know of each other yet:
    launchers kill all processes as soon as the first has ended, so the others give rank 0 the time
    to speak; one that is still alive then is the only one that knows.
    """
    if watchdog is not None:
        watchdog.fail(message, code=code)
    if os.environ.get("RANK", "0") != "0":
        time.sleep(3.0)
    sys.stderr.write(f"error: {message}\n")
    sys.stderr.flush()
    # Skips the destructors of process groups, which may wait for ranks that are gone.
    os._exit(code)


class Terminated(BaseException):
    """SIGTERM where no step is under way that could be finished and saved first."""


def print_page(text: str) -> None:
    """Write to standard output; ConfigError where that cannot be, as on a full disk."""
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except OSError as error:
        raise ConfigError(f"standard output cannot be written: {error.strerror}.") from error


def raise_terminated(number: int, frame: FrameType | None) -> None:
    """Handler of SIGTERM: the default one would end this rank without a word to the others."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of pretrain_gpt.py.

    Exit codes: 0 trained to the end, 2 bad input, 1 any other error, 128 + n stopped by signal n
    (in training, with a checkpoint).
    """
    argv = sys.argv[1:] if argv is None else argv
    phases, watchdog = Phases(), None
    try:
        discover()
        configure_logging()
        run = parse_run(argv, int(os.environ.get("WORLD_SIZE", "1")))
        timeout_seconds = 60.0 * run.engine.distributed_timeout_minutes
        init_distributed(run.engine.collective_timeout_seconds)
        watchdog = job_watchdog(phases, timeout_seconds)
        if watchdog is not None:
            signal.signal(signal.SIGTERM, raise_terminated)
        # Imported here, so that --help and a mistyped flag need not wait for them.
        from megatron_eslm.training.build import build_trainer, dry_run
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
                stopped = build_trainer(run, phases).train()
            except NonfiniteError as error:
                fail(str(error), 1, watchdog)
        if watchdog is not None:
            watchdog.stop()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    except ConfigError as error:
        fail(str(error), 2, watchdog)
    except Terminated:
        assert watchdog is not None
        # Launchers send it to the others when one rank has died, which is the thing to say then.
        watchdog.fail("stopped by SIGTERM, without a checkpoint.", code=143, patience_seconds=1.0)
    except (Exception, KeyboardInterrupt) as error:
        # Not handed on: the interpreter would wait for its loader processes before it ends, and the
        # launcher, or another rank, for this one.
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
        if watchdog is not None:
            watchdog.fail_with(error, code=code)
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)

    leave(0 if stopped is None else 128 + stopped)
