"""How many sequences each optimizer step reads: `--global-batch-size`, `--rampup-batch-size`."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_eslm.data.skipped_samples import SkippedSamples
from megatron_eslm.errors import ConfigError


@dataclass(frozen=True)
class BatchSchedule:
    """The batch size as a function of the position (consumed samples) alone.

    So a resumed run has the same batches as an uninterrupted one, and a run that changes its batch
    size continues reading where the earlier run stopped.
    """

    global_batch_size: int
    rampup: tuple[int, ...] = ()
    """(start, increment, samples); empty for a constant batch size."""

    def __call__(self, position: int) -> int:
        """Batch size of the step that begins at `position`, by Megatron-LM's rule in integers.

        start + floor(position * n / samples) * increment with n = (global - start) / increment.
        """
        if not self.rampup:
            return self.global_batch_size
        start, increment, samples = self.rampup
        if position >= samples:
            return self.global_batch_size
        return start + position * self._increments // samples * increment

    @property
    def sizes(self) -> list[int]:
        """All batch sizes, ascending."""
        if not self.rampup:
            return [self.global_batch_size]
        start, increment, _ = self.rampup
        return [*range(start, self.global_batch_size, increment), self.global_batch_size]

    @property
    def _increments(self) -> int:
        start, increment, _ = self.rampup
        return (self.global_batch_size - start) // increment

    def end(self, position: int, steps: int, skipped: SkippedSamples) -> int:
        """The position after `steps` steps that begin at `position`."""
        ramp_end = self.rampup[2] if self.rampup else 0
        while steps and position < ramp_end:
            # Take all steps of one batch size at once, since a ramp may be as long as a run.
            size, change = self(position), self._next_change(position)
            unread = change - position - skipped.between(position, change)
            several = min(steps, max(1, -(-unread // size)))
            position = skipped.after(position, several * size)
            steps -= several
        return skipped.after(position, steps * self.global_batch_size)

    def _next_change(self, position: int) -> int:
        """The next position with another batch size; `position` must be within the ramp."""
        samples = self.rampup[2]
        increment = position * self._increments // samples
        return -(-(increment + 1) * samples // self._increments)

    def check(self, micro_batch_size: int, dp_size: int) -> None:
        """Raise ConfigError unless the ramp ends at the global batch size and every batch divides
        into micro-batches of all data-parallel ranks."""
        rows, total = micro_batch_size * dp_size, self.global_batch_size
        rows_text = (
            f"--micro-batch-size {micro_batch_size} x {dp_size} data-parallel ranks = {rows}"
        )
        if total % rows:
            raise ConfigError(
                f"--global-batch-size {total} is not a multiple of {rows_text}; change one of them."
            )
        if not self.rampup:
            return
        start, increment, _ = self.rampup
        flag = f"--rampup-batch-size {' '.join(map(str, self.rampup))}"
        if start >= total:
            raise ConfigError(
                f"{flag} starts at {start} sequences, but --global-batch-size {total} is not "
                "larger. Lower START, or leave the ramp out."
            )
        if rest := (total - start) % increment:
            raise ConfigError(
                f"{flag} does not reach --global-batch-size {total} from {start} in increments of "
                f"{increment}: it would come to {total - rest} and then {total - rest + increment}."
            )
        for size in (start, start + increment):
            if size % rows:
                raise ConfigError(
                    f"{flag} has batches of {size} sequences, which is not a multiple of "
                    f"{rows_text}. Make START and INCREMENT multiples of {rows}."
                )
