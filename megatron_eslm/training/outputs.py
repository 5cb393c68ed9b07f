"""Files and folders that a run writes during training: locks, and handling of full disks.

If metrics or dumps cannot be written, the run saves a checkpoint and stops. Continuing without
records would go unnoticed until the end, and aborting would lose trained steps. Only the rank that
writes sees the failure; `unwritten` is its vote to stop.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from megatron_eslm.checkpoint.save_folder import SaveFolder
from megatron_eslm.config.run import RunConfig
from megatron_eslm.errors import ConfigError
from megatron_eslm.files.lock import FileLock
from megatron_eslm.parallel.collectives import on_every_rank, on_rank_zero
from megatron_eslm.training.dump import take_dump_folder
from megatron_eslm.training.progress_report import MetricsFile, run_summary


class Outputs:
    """--save, --dump-selection and --metrics-file of a run. Rank 0 holds the locks.

    Attributes:
        save: folder of checkpoints, on every rank; None without --save.
        metrics: on rank 0, once open; None without --metrics-file.
        unwritten: name of the first record that could not be written, and the reason; on the rank
            that failed to write it.
    """

    def __init__(self, run: RunConfig) -> None:
        self._run = run
        self.save = SaveFolder(run.checkpoint.save) if run.checkpoint.save else None
        self.metrics: MetricsFile | None = None
        self.unwritten: str | None = None
        self._dump: FileLock | None = None

    def take_folders(self) -> None:
        """Check that both folders are writable and not used by another job; lock them. Collective.

        Raises:
            ConfigError: a folder cannot be written, or another job writes to it.
        """
        on_rank_zero(self._take_folders)

    def _take_folders(self) -> None:
        if self.save is not None:
            self.save.take(self._run.checkpoint.load)
        if folder := self._run.report.dump_selection:
            self._dump = take_dump_folder(folder)

    def open_metrics(self, *, resumed: bool, restarts: bool) -> None:
        """Open the metrics file on rank 0; on failure every rank raises. Collective.

        Args:
            resumed, restarts: see MetricsFile.
        """
        on_every_rank(lambda: self._open_metrics(resumed, restarts))

    def _open_metrics(self, resumed: bool, restarts: bool) -> None:
        path = self._run.report.metrics_file
        if path is not None and dist.get_rank() == 0:
            summary = run_summary(self._run)
            self.metrics = MetricsFile(path, summary, resumed=resumed, restarts=restarts)

    def write_metrics(self, line: dict[str, Any]) -> None:
        """Write a line to the metrics file, if there is one."""
        if self.metrics is not None:
            with self.recording(f"--metrics-file {self._run.report.metrics_file}"):
                self.metrics.write(line)

    def guard(self, monitor: Any) -> None:
        """Make failures of DeepSpeed's monitors report here, including its own writes to them."""
        if not monitor.enabled:
            return
        write = monitor.write_events

        def guarded(events: Any) -> None:
            with self.recording(f"--deepspeed_config {self._run.engine.deepspeed_config}: monitor"):
                write(events)

        monitor.write_events = guarded

    @contextmanager
    def recording(self, what: str) -> Iterator[None]:
        """Remember a failure to write a record in the block.

        Args:
            what: flag and value that ask for the record.
        """
        try:
            yield
        except OSError as error:
            self.unwritten = self.unwritten or f"{what}: {error.strerror or error}"

    def check_written(self, iteration: int, *, saved: bool) -> None:
        """Raise ConfigError on every rank if any rank failed to write a record. Collective.

        Args:
            iteration: iteration at which training stopped.
            saved: whether that iteration is in a checkpoint.
        """
        on_every_rank(lambda: self._check_written(iteration, saved))

    def _check_written(self, iteration: int, saved: bool) -> None:
        if self.unwritten is None:
            return
        if saved:
            where = f"is saved in {self._run.checkpoint.save}. Free space and continue with --load"
        else:
            where = "is lost, as --save is not set. Free space and start again"
        raise ConfigError(f"{self.unwritten}. Training stopped; iteration {iteration} {where}.")

    def close(self) -> None:
        """Release the locks and close the metrics file."""
        if self.save is not None:
            self.save.release()
        if self._dump is not None:
            self._dump.release()
        if self.metrics is not None:
            self.metrics.close()
