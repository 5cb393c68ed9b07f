"""Runs a recipe: one training after another, each of them resumable, none of them twice.

A run's folder holds the command that made it (command.json), its log, metrics and checkpoints, and
finished.json when it is done. Several runners may share one recipe, on one machine or on several
that see one disk: whoever holds the lock of a folder trains that run.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from megatron_eslm.errors import ConfigError, Failure
from megatron_eslm.files.json_file import read_json
from megatron_eslm.recipes.recipe import Recipe, RecipeRun, Step
from megatron_eslm.watchdog.parent import end_with_parent

logger = logging.getLogger(__name__)

Outcome = Literal["finished", "failed", "held", "waits"]
"""Of one run: done (now or before), ended with an error, somebody else's, needs another one."""

_FLOPS = re.compile(r"^FLOPs executed +(\S+) \((\S+) per step\)$", re.MULTILINE)


class StoppedError(Failure):
    """A signal ended the runner; the run under way has saved a checkpoint."""


class Runner:
    """Runs a recipe in the current folder.

    Args:
        recipe: what to run.
        script: what its trainings run, after the words of `launch`.
    """

    def __init__(self, recipe: Recipe, script: Path) -> None:
        self.recipe = recipe
        self.script = script
        self._known_flops: dict[str, tuple[float, float]] = {}
        """Of a run and of a step, by method; no seed changes what --dry-run says."""

    def train(self, runs: Sequence[RecipeRun]) -> dict[str, Outcome]:
        """Prepare, and train `runs` in their order, those that wait for others as soon as they may.

        Returns:
            The outcome of each, by the name of its folder.
        """
        for step in self.recipe.prepare:
            self._prepare(step)
        outcomes: dict[str, Outcome] = {}
        moved = True
        while moved:
            moved = False
            for run in runs:
                if outcomes.get(run.folder.name) in ("finished", "failed"):
                    continue
                outcomes[run.folder.name] = outcome = self._train(run)
                moved |= outcome in ("finished", "failed")
        return outcomes

    def after(self) -> None:
        """What comes after all runs."""
        for step in self.recipe.after:
            self._prepare(step)

    def finished(self, run: RecipeRun) -> bool:
        """Whether a run is done."""
        return (run.folder / "finished.json").is_file()

    def steps(self, run: RecipeRun) -> int | None:
        """The budget of a run with `flops-of`, by the FLOPs that --dry-run counts; else None."""
        if run.flops_of is None:
            return None
        total, _ = self._flops(self.recipe.run(run.flops_of, run.seed))
        _, per_step = self._flops(run)
        return round(total / per_step)

    def _portable(self, words: Sequence[str]) -> list[str]:
        """A command without the places of this Python and this package."""
        return [*self.recipe.launch, "pretrain_gpt.py", *words]

    def _launch(self) -> list[str]:
        words = list(self.recipe.launch)
        if words == ["python"]:
            words = [sys.executable]
        return [*words, str(self.script)]

    def _flops(self, run: RecipeRun) -> tuple[float, float]:
        """Of the whole run, and of a step."""
        if run.method not in self._known_flops:
            self._known_flops[run.method] = self._dry_run_flops(run)
        return self._known_flops[run.method]

    def _dry_run_flops(self, run: RecipeRun) -> tuple[float, float]:
        command = [*self._launch(), *run.words(planned=True), "--dry-run"]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, env=_environment(), preexec_fn=_with_this()
            )
        except OSError as error:
            raise _cannot_start(command, error) from error
        found = _FLOPS.search(done.stdout)
        if done.returncode or found is None:
            raise ConfigError(
                f"{shlex.join(command)} failed: {(done.stderr or done.stdout)[-500:]}"
            )
        return float(found[1]), float(found[2])

    def _train(self, run: RecipeRun) -> Outcome:
        counted = run.flops_of and self.recipe.run(run.flops_of, run.seed)
        # What the other one reads has to be there for its --dry-run, too.
        for needed in (run.needs, counted.needs if counted else None):
            if needed is not None and not self.finished(self.recipe.run(needed, run.seed)):
                logger.info("%s waits for %s", run.folder.name, needed)
                return "waits"
        with _lock(run.folder) as held:
            if held is None:
                logger.info("%s is being trained by another process", run.folder.name)
                return "held"
            stored, steps = run.folder / "command.json", self.steps(run)
            first = self._portable(run.words(steps))
            if stored.exists() and read_json(stored) != first:
                raise ConfigError(
                    f"{run.folder} was begun with another command than the one that "
                    f"{self.recipe.path} now gives; it is in {stored}. Remove the folder, or "
                    "choose another output."
                )
            if self.finished(run):
                return "finished"
            resumed = any(run.checkpoints.glob("iter_*"))
            command = [*self._launch(), *run.words(steps, resumed=resumed)]
            logger.info("%s: %s", run.folder.name, shlex.join(command))
            if not shutil.which(command[0], path=_environment()["PATH"]):
                raise _cannot_start(command, FileNotFoundError(errno.ENOENT, "no such program"))
            _write(stored, first)  # from here on the folder is of this command
            code = _call(command, run.folder / "log.txt", lock=held)
            if code == 0:
                _write(run.folder / "finished.json", {"command": first})
                return "finished"
        logger.error("%s ended with code %d; see %s", run.folder.name, code, run.folder / "log.txt")
        return "failed"

    def _prepare(self, step: Step) -> None:
        if step.creates.exists():
            return
        # Other runners of the recipe wait for it here.
        step.creates.parent.mkdir(parents=True, exist_ok=True)
        with _lock(step.creates.parent, f".{step.creates.name}.lock", wait=True) as held:
            if step.creates.exists():
                return
            words = [sys.executable if word == "python" else word for word in step.words]
            logger.info("%s", shlex.join(words))
            if code := _call(words, None, lock=held):
                raise ConfigError(f"{shlex.join(words)} ended with code {code}.")
            if not step.creates.exists():
                raise ConfigError(f"{shlex.join(words)} did not make {step.creates}.")


def _write(path: Path, content: object) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


@contextmanager
def _lock(folder: Path, name: str = ".lock", *, wait: bool = False) -> Iterator[int | None]:
    """The open file of the lock while this process has the folder to itself; None if it has not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be made: {error.strerror}. Choose another 'output'."
        ) from error
    with (folder / name).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
            return
        yield file.fileno()


def _with_this() -> Callable[[], None]:
    """For a program that is to end with this process: a training saves a checkpoint before."""
    return functools.partial(end_with_parent, os.getpid(), signal.SIGTERM)


def _environment() -> dict[str, str]:
    """Ours, with this Python's launchers found first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": path}


def _cannot_start(command: Sequence[str], error: OSError) -> ConfigError:
    return ConfigError(
        f"{command[0]!r} cannot be started: {error.strerror}. Mend the recipe's 'launch' or step."
    )


def _call(command: Sequence[str], log: Path | None, lock: int | None = None) -> int:
    """Run a command to its end; its output goes to the end of `log`, or where ours goes.

    SIGTERM and SIGINT are handed on: a training then saves a checkpoint and ends. It does so, too,
    when this process is killed, and holds `lock` until then.

    Raises:
        StoppedError: after such a signal.
    """
    received: list[int] = []
    with open(log, "ab") if log is not None else open(os.dup(1), "wb") as file:
        # A session of its own, so that a terminal's Ctrl-C comes once, from here.
        try:
            child = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=_environment(),
                start_new_session=True,
                preexec_fn=_with_this(),
                pass_fds=() if lock is None else (lock,),
            )
        except OSError as error:
            raise _cannot_start(command, error) from error

        def hand_on(number: int, _: object) -> None:
            received.append(number)
            child.send_signal(number)

        before = {s: signal.signal(s, hand_on) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            code = child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if received:
        name = signal.Signals(received[0]).name
        raise StoppedError(f"stopped by {name}; the same command goes on from here.")
    return code
