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
from megatron_eslm.parallel.last_words import say
from megatron_eslm.parallel.launch import discover
from megatron_eslm.parallel.parent import SAVE_SECONDS, Launcher
from megatron_eslm.parallel.phases import Phases
from megatron_eslm.parallel.rendezvous import meet
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
    say(f"error: {message}\n")
    # Skips the destructors of process groups, which may wait for ranks that are gone.
    os._exit(code)


class Terminated(BaseException):
    """SIGTERM where no step is under way that could be finished and saved first."""


def raise_terminated(number: int, frame: FrameType | None) -> None:
    """Handler of SIGTERM: the default one would end this rank without a word to the others."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


def main(argv: Sequence[str] | None = None, launcher: Launcher | None = None) -> None:
    """Entry point of pretrain_gpt.py.

    Args:
        argv: flags; by default those of the command line.
        launcher: who started this rank; it is watched already.

    Exit codes: 0 trained to the end, 2 bad input, 1 any other error, 128 + n stopped by signal n
    (in training, with a checkpoint).
    """
    argv = sys.argv[1:] if argv is None else argv
    phases, watchdog = Phases(), None
    try:
        discover()
        configure_logging()
        run = parse_run(argv, int(os.environ.get("WORLD_SIZE", "1")))
        connect_seconds = 60.0 * run.engine.rendezvous_timeout_minutes
        meeting = meet(connect_seconds, launcher)
        timeout_seconds = 60.0 * run.engine.distributed_timeout_minutes
        watchdog = job_watchdog(meeting, phases, timeout_seconds, launcher)
        if watchdog is not None:
            signal.signal(signal.SIGTERM, raise_terminated)
        init_distributed(
            run.engine.collective_timeout_seconds, meeting=meeting, connect_seconds=connect_seconds
        )
        # Imported here, so that --help and a mistyped flag need not wait for them.
        from megatron_eslm.data.loader_processes import LoaderError
        from megatron_eslm.training.build import build_trainer, dry_run
        from megatron_eslm.training.nonfinite import NonfiniteError

        if run.report.dry_run:
            text, refusal = dry_run(run)
            if os.environ["RANK"] == "0":
                sys.stdout.write(text + "\n")
                sys.stdout.flush()
            if refusal is not None:
                raise refusal
            stopped = None
        else:
            try:
                trainer = build_trainer(run, phases)
                if launcher is not None:
                    launcher.patience_seconds = SAVE_SECONDS
                stopped = trainer.train()
            except (LoaderError, NonfiniteError) as error:
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
