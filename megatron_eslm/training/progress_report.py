"""Reports of a run during training: progress line, metrics file, DeepSpeed's monitors."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from megatron_eslm.checkpoint.train_state import TrainState
from megatron_eslm.config.run import RunConfig
from megatron_eslm.data.data_options import DEFAULT_SPLIT, PATHS
from megatron_eslm.data.source import canonical_data_path, canonical_split
from megatron_eslm.errors import ConfigError
from megatron_eslm.files.lock import FileLock
from megatron_eslm.selection.build import policy_traits
from megatron_eslm.selection.selection_options import SelectionOptions
from megatron_eslm.training.evaluate import Evaluation
from megatron_eslm.training.method import selection_summary
from megatron_eslm.training.step_stats import StepStats

logger = logging.getLogger(__name__)

_JSON = (bool, int, float, str, type(None))


def _plain(name: str, value: Any) -> Any:
    """Replace nan and infinity, which are not JSON, by None; except in losses of evaluations.

    A diverged loss must not look like a missing one, and Python's reader accepts NaN.
    """
    keep = (
        name in ("valid_loss", "test_loss") or not isinstance(value, float) or math.isfinite(value)
    )
    return value if keep else None


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as f:
        f.seek(-1, 2)
        return f.read(1)


class MetricsFile:
    """`--metrics-file`: one JSON object per line, the first one {"run": ...}. Rank 0 only."""

    def __init__(
        self, path: str, run: dict[str, Any], *, resumed: bool, restarts: bool = False
    ) -> None:
        """Open the file.

        Args:
            path: the file; an existing one is continued, moved aside or refused.
            run: content of the first line.
            resumed: whether the run continues from a checkpoint.
            restarts: whether the run would continue if there were a checkpoint (--load equal to
                --save).
        """
        self._path = Path(path)
        self._lock = FileLock(self._path.with_name(f".{self._path.name}.lock"))
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.take(f"--metrics-file {path}", "Name another file.")
            self._file = self._open(resumed=resumed, restarts=restarts)
            self.write({"run": run})
        except OSError as error:
            self._lock.release()
            raise ConfigError(f"--metrics-file {path}: {error.strerror}.") from error
        except BaseException:
            self._lock.release()
            raise

    def _open(self, *, resumed: bool, restarts: bool) -> TextIO:
        target = self._path
        if target.exists() and not target.is_file():
            raise ConfigError(
                f"--metrics-file {target} exists but is not a regular file. Name another file."
            )
        if target.exists() and not resumed and restarts:
            # A job killed before its first checkpoint starts over, and so do its metrics.
            target.replace(target.with_name(f"{target.name}.abandoned"))
            logger.warning(
                "%s belongs to an earlier start that never saved a checkpoint; moved to "
                "*.abandoned",
                target,
            )
        if target.exists() and not resumed:
            raise ConfigError(
                f"--metrics-file {target} exists, but this run does not continue another (--load). "
                "Name another file or remove it."
            )
        torn = target.exists() and target.stat().st_size > 0 and _last_byte(target) != b"\n"
        file = target.open("a")
        if torn:  # a kill cut off the last line; end it, so that the next one is not appended to it
            file.write("\n")
        return file

    def write(self, values: dict[str, Any]) -> None:
        """Append a line and flush it.

        Raises:
            OSError: writing failed. The next call tries to write both lines.
        """
        self._file.write(json.dumps({k: _plain(k, v) for k, v in values.items()}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file and release its lock."""
        with suppress(OSError):  # a full disk was reported before
            self._file.close()
        self._lock.release()


def run_summary(run: RunConfig) -> dict[str, Any]:
    """Summary of a run for comparisons; first line of the metrics file.

    Contains common fields plus every option that differs from its default. Runs that differ only in
    the seed are grouped as one method, so options without effect are left out.
    """
    s, t = run.selection, run.training
    selection = selection_summary(s)
    summary = {
        **selection,
        "seed": t.seed,
        "model_size": run.model.model_size,
        "num_layers": run.model.num_layers,
        "hidden_size": run.model.hidden_size,
        "seq_length": run.model.seq_length,
        "micro_batch_size": t.micro_batch_size,
        "global_batch_size": t.global_batch_size,
        "train_iters": t.train_iters,
        "lr": run.optimizer.lr,
        "dtype": str(run.dtype).removeprefix("torch."),
        "zero_stage": run.engine.zero_stage,
        "data_parallel_size": run.dp_size,
        **_data_summary(run),
    }
    if t.rampup_batch_size:
        summary["rampup_batch_size"] = " ".join(map(str, t.rampup_batch_size))
    if t.skip_samples:
        summary["skip_samples"] = " ".join(t.skip_samples)
    told = {"selection", "eslm_alpha", "eslm_score", "eslm_level", "eslm_proxy_layers", *summary}
    told |= _without_effect(s)
    if run.model.ffn_hidden_size == 4 * run.model.hidden_size:
        told.add("ffn_hidden_size")
    told |= {"split", *PATHS}
    parts = (run.model, run.selection, run.objective, run.reference, run.optimizer, run.data)
    for options in parts:
        for field in dataclasses.fields(options):
            value = getattr(options, field.name)
            if value != field.default and field.name not in {*told, "data_cache_path"}:
                summary[field.name] = value if isinstance(value, _JSON) else str(value)
    if run.checkpoint.load is not None and not run.checkpoint.continues_itself:
        summary["load"] = run.checkpoint.load
    if run.checkpoint.save is not None:
        summary["save"] = run.checkpoint.save
    return summary


def _data_summary(run: RunConfig) -> dict[str, str]:
    """Paths by set, and --split if it is not the default."""
    if run.demo:
        summary = {"data_path": "demo corpus"}
    else:
        given = {name: getattr(run.data, name) for name in PATHS}
        summary = {name: canonical_data_path(words) for name, words in given.items() if words}
    split = canonical_split(run.data.split or DEFAULT_SPLIT)
    return summary | ({"split": split} if split != DEFAULT_SPLIT else {})


def _without_effect(options: SelectionOptions) -> set[str]:
    """Options of selection without effect in this run."""
    traits = policy_traits(options)
    idle = {field.name for field in dataclasses.fields(options)} - traits.reads - _OF_ANY_POLICY
    tokens_alone = not traits.selects_sequences
    if options.eslm_scope == "global" or (tokens_alone and options.eslm_scope == "step"):
        idle.add("eslm_scope")  # same as without the flag on one rank
    return idle


_OF_ANY_POLICY = {"selection", "eslm_alpha", "eslm_adaptive", "max_nonfinite_steps"}


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Speed of the steps since the last report."""

    step_seconds: float
    tokens_per_second: float
    """Tokens read, including masked ones, over all ranks."""
    seconds_left: float
    """Time for the remaining samples at this speed."""
    mfu: float | None
    """Model FLOPs (`FlopsModel.model_flops`) over the devices' peak; None if that is unknown."""
    hfu: float | None
    """The same for the matrix products that were executed."""


def metrics_line(
    state: TrainState,
    stats: StepStats | None,
    *,
    evaluation: Evaluation | None,
    lr: float,
    grad_norm: float | None,
    batch_size: int | None,
    micro_batches_of_step: float | None,
    speed: Speed | None,
) -> dict[str, Any]:
    """Fields of a metrics line (docs/design.md). At iteration 0 nothing has been trained yet.

    `micro_batches_of_step` is the mean over the run so far, of all ranks; None at iteration 0.
    """
    return {
        "iteration": state.iteration,
        "loss": stats.loss if stats else None,
        "valid_loss": evaluation.loss if evaluation else None,
        "valid_loss_by_domain": evaluation.loss_by_domain if evaluation else None,
        "alpha": state.selection.alpha,
        "cvar_delta": state.selection.delta,
        "kept_instances": stats.kept_instances_share if stats else None,
        "kept_tokens": stats.kept_tokens_share if stats else None,
        "tau_instance": stats.tau_instance if stats else None,
        "tau_token": stats.tau_token if stats else None,
        "cvar": stats.cvar if stats else None,
        "mean_excess": state.selection.mean_excess,
        "lr": lr,
        "grad_norm": grad_norm,
        "batch_size": batch_size,
        "batch_size_trained": stats.rows_kept if stats else None,
        "consumed_samples": state.consumed_samples,
        "tokens": state.tokens,
        "tokens_trained": state.tokens_trained,
        "flops": state.flops,
        "flops_paper": state.flops_paper,
        "flops_paper_micro_batch": state.flops_paper / micro_batches_of_step
        if micro_batches_of_step
        else 0.0,
        "step_seconds": speed.step_seconds if speed else None,
        "elapsed_seconds": state.elapsed_seconds,
        "mfu": speed.mfu if speed else None,
        "hfu": speed.hfu if speed else None,
        "nonfinite_steps": state.nonfinite_steps,
    }


def progress_line(line: dict[str, Any], train_iters: int, speed: Speed | None) -> str:
    """Render a metrics line for people."""
    parts = [f"iteration {line['iteration']:>6d}/{train_iters}"]
    if line["loss"] is not None and speed is not None:
        parts += [
            f"loss {line['loss']:.4f}",
            f"kept {line['kept_instances']:.1%} of sequences, {line['kept_tokens']:.1%} of tokens",
            f"lr {line['lr']:.2e}",
            f"grad norm {line['grad_norm']:.2f}",
            f"{speed.tokens_per_second:,.0f} tokens/s",
            f"left {time.strftime('%H:%M:%S', time.gmtime(speed.seconds_left))}",
        ]
    if line["mfu"] is not None:
        parts.append(f"MFU {line['mfu']:.1%} (HFU {line['hfu']:.1%})")
    if line["valid_loss"] is not None:
        parts.append(f"validation loss {line['valid_loss']:.4f}")
    if "test_loss" in line:
        parts.append(f"test loss {line['test_loss']:.4f}")
    if line["nonfinite_steps"]:
        parts.append(f"skipped {line['nonfinite_steps']}")
    return " | ".join(parts)


def write_monitors(monitor: Any, line: dict[str, Any]) -> None:
    """Write to the monitors that the DeepSpeed JSON enables: TensorBoard, W&B, Comet, CSV."""
    if not monitor.enabled:
        return
    by_domain = ("valid_loss_by_domain", "test_loss_by_domain")
    values = {k: v for k, v in line.items() if k not in ("iteration", *by_domain)}
    for name in by_domain:
        for domain, loss in (line.get(name) or {}).items():
            values[f"{name}/{domain}"] = loss
    events = [
        (f"Train/{name}", value, line["iteration"])
        for name, value in values.items()
        if _plain(name, value) is not None
    ]
    monitor.write_events(events)
