"""The command: parse, build, train, and end with one clear message where that cannot be."""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
from collections.abc import Sequence

from megatron_eslm.config.run import parse_run
from megatron_eslm.errors import ConfigError
from megatron_eslm.parallel.bootstrap import init_distributed

logger = logging.getLogger(__name__)


def configure_logging() -> None:
    """INFO from rank 0, errors from everyone, warnings of libraries."""
    rank_zero = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr, force=True)
    logging.getLogger("megatron_eslm").setLevel(logging.INFO if rank_zero else logging.ERROR)


def fail(message: str, code: int) -> None:
    """Say why, once, and end the process.

    Mostly every rank comes here with the same message. Launchers kill all processes as soon as the
    first has ended, so the others give rank 0 the time to speak; one that is still alive then is
    the only one that knows.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(3.0)
    sys.stderr.write(f"error: {message}\n")
    sys.stderr.flush()
    # Skips the destructors of process groups, which may wait for ranks that are gone.
    os._exit(code)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of pretrain_gpt.py.

    Exit codes: 0 trained to the end, 2 bad input, 1 any other error, 128 + n stopped by signal n
    with a checkpoint.
    """
    configure_logging()
    argv = sys.argv[1:] if argv is None else argv
    try:
        run = parse_run(argv, int(os.environ.get("WORLD_SIZE", "1")))
        init_distributed(60.0 * run.engine.distributed_timeout_minutes)
        # Imported here, so that --help and a mistyped flag need not wait for them.
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
                stopped = build_trainer(run).train()
            except NonfiniteError as error:
                fail(str(error), 1)
    except ConfigError as error:
        fail(str(error), 2)
    except (Exception, KeyboardInterrupt) as error:
        # Not handed on: the interpreter would wait for its loader processes before it ends, and the
        # launcher, or another rank, for this one.
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(130 if isinstance(error, KeyboardInterrupt) else 1)

    import torch.distributed as dist

    dist.destroy_process_group()
    if stopped is not None:
        sys.exit(128 + stopped)
