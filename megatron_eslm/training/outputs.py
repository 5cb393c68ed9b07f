"""What a run writes to while it trains, each of it for this run alone, and what a full disk means.

A disk that takes no metrics or dumps stops the run, but behind a checkpoint: a run that went on
without its records would be found out at its end, and one that broke off would lose what it has
trained. Only the rank that writes knows; `unwritten` is its vote to stop.
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
from megatron_eslm.training.report import MetricsFile, run_summary


class Outputs:
    """--save, --dump-selection and --metrics-file of a run. Rank 0 holds the locks.

    Attributes:
        save: folder of checkpoints, on every rank; None without --save.
        metrics: on rank 0, once it is open; None without --metrics-file.
        unwritten: what names the first record that a disk did not take, and why; on the rank that
            wrote it.
    """

    def __init__(self, run: RunConfig) -> None:
        self._run = run
        self.save = SaveFolder(run.checkpoint.save) if run.checkpoint.save else None
        self.metrics: MetricsFile | None = None
        self.unwritten: str | None = None
        self._dump: FileLock | None = None

    def take_folders(self) -> None:
        """Make sure that both folders can be written, and that no other job does. Collective.

        Raises:
            ConfigError: they cannot, or another job does.
        """
        on_rank_zero(self._take_folders)

    def _take_folders(self) -> None:
        if self.save is not None:
            self.save.take(self._run.checkpoint.load)
        if folder := self._run.report.dump_selection:
            self._dump = take_dump_folder(folder)

    def open_metrics(self, *, resumed: bool, restarts: bool) -> None:
        """Open the metrics file on rank 0; if it cannot be written every rank stops. Collective.

        Args:
            resumed, restarts: as MetricsFile has them.
        """
        on_every_rank(lambda: self._open_metrics(resumed, restarts))

    def _open_metrics(self, resumed: bool, restarts: bool) -> None:
        path = self._run.report.metrics_file
        if path is not None and dist.get_rank() == 0:
            summary = run_summary(self._run)
            self.metrics = MetricsFile(path, summary, resumed=resumed, restarts=restarts)

    def write_metrics(self, line: dict[str, Any]) -> None:
        """Write a line of the metrics file, where there is one."""
        if self.metrics is not None:
            with self.recording(f"--metrics-file {self._run.report.metrics_file}"):
                self.metrics.write(line)

    def guard(self, monitor: Any) -> None:
        """Have DeepSpeed's monitors, to which it writes in its own steps as well, report here."""
        if not monitor.enabled:
            return
        write = monitor.write_events

        def guarded(events: Any) -> None:
            with self.recording(f"--deepspeed_config {self._run.engine.deepspeed_config}: monitor"):
                write(events)

        monitor.write_events = guarded

    @contextmanager
    def recording(self, what: str) -> Iterator[None]:
        """Remember that the record written in the block was not taken.

        Args:
            what: flag and value that ask for it.
        """
        try:
            yield
        except OSError as error:
            self.unwritten = self.unwritten or f"{what}: {error.strerror or error}"

    def check_written(self, iteration: int, *, saved: bool) -> None:
        """ConfigError on every rank if a record was not taken on any. Collective.

        Args:
            iteration: where training stopped.
            saved: whether that is in a checkpoint.
        """
        on_every_rank(lambda: self._check_written(iteration, saved))

    def _check_written(self, iteration: int, saved: bool) -> None:
        if self.unwritten is None:
            return
        if saved:
            where = f"is saved in {self._run.checkpoint.save}. Make room and continue with --load"
        else:
            where = "is lost without --save. Make room and start again"
        raise ConfigError(f"{self.unwritten}. Training stopped; iteration {iteration} {where}.")

    def close(self) -> None:
        """Let others write there."""
        if self.save is not None:
            self.save.release()
        if self._dump is not None:
            self._dump.release()
        if self.metrics is not None:
            self.metrics.close()
