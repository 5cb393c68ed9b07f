"""`--profile`: trace a few steps with torch.profiler."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_eslm.config.training_options import ReportOptions
from megatron_eslm.training.loop import Callback, StepOutcome, Trainer


class Profiler(Callback):
    """Writes a trace of the steps from --profile-step-start to --profile-step-end on each rank.

    `rankN.json.gz` in the folder opens in Perfetto and in chrome://tracing.
    """

    def __init__(self, options: ReportOptions) -> None:
        assert options.profile is not None
        self.folder = Path(options.profile)
        self.first, self.last = options.profile_step_start, options.profile_step_end
        self._profile: torch.profiler.profile | None = None

    def on_start(self, trainer: Trainer) -> None:
        self._begin(trainer)

    def on_step(self, trainer: Trainer, step: StepOutcome) -> None:
        if self._profile is not None and (trainer.state.iteration >= self.last or step.ends):
            self._write(trainer)
        elif not step.ends:
            self._begin(trainer)

    def _begin(self, trainer: Trainer) -> None:
        """Start profiling before the first step to profile; steps count from 1."""
        if trainer.state.iteration + 1 != self.first:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if trainer.engine.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(activities=activities)
        self._profile.__enter__()

    def _write(self, trainer: Trainer) -> None:
        profile, self._profile = self._profile, None
        assert profile is not None
        profile.__exit__(None, None, None)
        with trainer.outputs.recording(f"--profile {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(self.folder / f"rank{trainer.mesh.rank}.json.gz"))
