"""Open and check the data of a run."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

from megatron_eslm.checkpoint.find import CheckpointInfo
from megatron_eslm.checkpoint.manifest import new_run_id
from megatron_eslm.checkpoint.resume import (
    carried_on,
    find_start,
    starting_state,
)
from megatron_eslm.checkpoint.train_state import TrainState
from megatron_eslm.config.run import RunConfig
from megatron_eslm.data.data_options import DataOptions
from megatron_eslm.data.demo_corpus import prepare_demo_corpus
from megatron_eslm.data.plan import (
    MixtureReport,
    check_epochs,
    check_skipped,
    plan_mixture,
)
from megatron_eslm.data.reference_losses import ReferenceLosses, open_reference_losses
from megatron_eslm.data.source import DataSource, open_data
from megatron_eslm.errors import ConfigError
from megatron_eslm.parallel.collectives import on_every_rank, on_rank_zero
from megatron_eslm.parallel.ranks import rank_zero_first
from megatron_eslm.training.gradient_alignment import (
    check_alignment,
    rows_to_choose_by,
)
from megatron_eslm.training.reading_plan import ReadingPlan, forget_ahead, plan_reading

logger = logging.getLogger(__name__)

DEMO_FOLDER = "demo/corpus"


def open_run_data(run: RunConfig) -> tuple[DataSource, DataOptions]:
    """Open the data of a run; without --data-path the demo corpus, created on first use."""
    options = run.data
    if run.demo:
        logger.info(
            "no --data-path: using the demo corpus in %s (this Python's own source and "
            "documentation)",
            DEMO_FOLDER,
        )
        words = rank_zero_first(lambda: prepare_demo_corpus(DEMO_FOLDER))
        options = dataclasses.replace(options, data_path=tuple(words))
    return open_data(options), options


def plan_run(run: RunConfig, source: DataSource, reading: ReadingPlan) -> MixtureReport:
    """Plan what the run reads of each domain."""
    t = run.training
    evaluated = t.eval_iters * t.micro_batch_size * run.dp_size
    return plan_mixture(
        source,
        run.model.seq_length,
        train_samples=reading.end,
        valid_samples=evaluated,
        test_samples=evaluated,
        aligns=rows_to_choose_by(run),
    )


def open_stored_losses(run: RunConfig, source: DataSource) -> ReferenceLosses | None:
    """Open the losses that --reference-losses names; None without it. Collective."""
    name = run.reference.reference_losses
    if name is None:
        return None
    losses = on_every_rank(lambda: open_reference_losses(source, name))
    split = source.split or "1,0,0"  # all documents of --train-data-path are for training
    if losses.split not in (None, split):
        raise ConfigError(
            f"--reference-losses {name}: its n-grams were counted from the training documents of "
            f"--split {losses.split}, but this run trains on those of --split {split}. Score the "
            "text again with this --split, or train with that one."
        )
    if losses.seq_length not in (None, run.model.seq_length):
        logger.info(
            "--reference-losses %s: scored in windows of %d tokens, but training reads %d",
            name,
            losses.seq_length,
            run.model.seq_length,
        )
    return losses


def check_reading(
    run: RunConfig, options: DataOptions, reading: ReadingPlan, report: MixtureReport
) -> None:
    """Raise ConfigError if a run reads more than there is, or more than --max-epochs."""
    check_skipped(report, options.max_epochs, reading.skipped)
    check_epochs(report, options.max_epochs)
    check_alignment(run, report)


def data_record(
    run: RunConfig, source: DataSource, stored: ReferenceLosses | None, report: MixtureReport
) -> dict[str, Any]:
    """Everything that determines what is read and in which order; compared when a run continues."""
    return {
        **order_record(run, source, report),
        "eod_mask_loss": run.data.eod_mask_loss,
        "reset_attention_mask": run.data.reset_attention_mask or None,
        "reset_position_ids": run.data.reset_position_ids or None,
        "global_batch_size": run.training.global_batch_size,
        "rampup_batch_size": list(run.training.rampup_batch_size) or None,
        "micro_batch_rows": run.training.micro_batch_size * run.dp_size,
        # None without label noise, as in checkpoints older than the option.
        "label_noise": run.data.label_noise or None,
        "reference_losses": stored.weights if stored is not None else None,
        # None without --valid-data-path, as in checkpoints older than the option.
        "validation": _validation_record(source),
        # The choice of these samples depends on how many are evaluated.
        "alignment_samples": report.alignment_samples or None,
    }


def _validation_record(source: DataSource) -> dict[str, Any] | None:
    valid = source.apart.get("valid")
    if valid is None:
        return None
    return {"fingerprint": valid.fingerprint, "weights": list(valid.weights)}


def order_record(run: RunConfig, source: DataSource, report: MixtureReport) -> dict[str, Any]:
    """The part of `data_record` that determines the numbering of sequences."""
    epochs = [math.ceil(domain.epochs) for domain in report.domains]
    return {
        "fingerprint": source.fingerprint,
        "weights": list(source.weights),
        "split": source.split,
        "seed": run.training.seed,
        "seq_length": run.model.seq_length,
        # Within one epoch, the order does not depend on the total amount read.
        "epochs": epochs if max(epochs) > 1 else None,
    }


def find_reading(
    run: RunConfig, source: DataSource
) -> tuple[CheckpointInfo | None, TrainState, ReadingPlan]:
    """Find the checkpoint to start from, the state there, and the samples left. Collective."""
    found = on_rank_zero(lambda: find_start(run))
    run_id = on_rank_zero(new_run_id)

    def plan() -> tuple[TrainState, ReadingPlan]:
        state = starting_state(run, found, run_id)
        recorded = carried_on(found, "skipped_samples")
        reading = plan_reading(run, state, recorded)
        if found is not None and any(end > state.consumed_samples for _, end in recorded):
            there = found.run["data"]
            here = order_record(run, source, plan_run(run, source, reading))
            if any(there.get(key) != value for key, value in here.items()):
                recorded = forget_ahead(recorded, state.consumed_samples)
                reading = plan_reading(run, state, recorded)
        return state, reading

    return found, *on_every_rank(plan)
