"""Resume from `--load`: find the checkpoint, check that it fits the run, restore its state."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from megatron_eslm.checkpoint.find import CheckpointInfo, find_checkpoint
from megatron_eslm.checkpoint.load import load_engine
from megatron_eslm.checkpoint.manifest import list_checkpoints
from megatron_eslm.checkpoint.same_method import check_same_method
from megatron_eslm.checkpoint.stored_shape import holds_nothing_yet
from megatron_eslm.checkpoint.train_state import TrainState
from megatron_eslm.config.run import RunConfig
from megatron_eslm.cost.budget import is_complete
from megatron_eslm.data.tokenizers.build import Tokenizer, load_tokenizer, same_ids
from megatron_eslm.engine.engine import Engine
from megatron_eslm.errors import ConfigError
from megatron_eslm.model.architectures.registry import architecture_of
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.selection.state import SelectionState

logger = logging.getLogger(__name__)


def continues_itself(run: RunConfig) -> bool:
    """Whether --load and --save are the same folder, as in requeued jobs."""
    return run.checkpoint.continues_itself


def find_start(run: RunConfig) -> CheckpointInfo | None:
    """Find the checkpoint to start from; None starts a new run."""
    load, save = run.checkpoint.load, run.checkpoint.save
    if load is None:
        return None
    if holds_nothing_yet(run.checkpoint):
        logger.info("--load %s contains no checkpoint yet: starting a new run", load)
        return None
    found = find_checkpoint(load)
    if run.checkpoint.finetune:
        return _for_finetuning(run, found)
    siblings = list_checkpoints(Path(save)) if save is not None else []
    if found.folder.resolve() == Path(load).resolve() and found.folder.resolve() in (
        path.resolve() for path in siblings[1:]
    ):
        raise ConfigError(
            f"--load {load} is older than {siblings[0].name} in the same --save {save}, so a later "
            "--load of that folder would take the newer one. Save to another folder, or remove "
            "the newer checkpoints."
        )
    return found


def _for_finetuning(run: RunConfig, found: CheckpointInfo) -> CheckpointInfo:
    """View a checkpoint as weights only, for --finetune."""
    save = run.checkpoint.save
    if save is not None and Path(save).resolve() == found.folder.resolve().parent:
        raise ConfigError(
            f"--finetune starts a new run from --load {run.checkpoint.load}, but --save {save} is "
            "the folder of that run. Save to another folder, or leave out --finetune to continue "
            "the run."
        )
    return found.as_weights()


def check_continues(
    run: RunConfig,
    found: CheckpointInfo,
    shape: ModelShape,
    data: dict[str, Any],
    tokenizer: Tokenizer,
) -> None:
    """Raise ConfigError unless the checkpoint fits this run; log permitted differences."""
    ours, theirs = shape.to_dict(), found.shape.to_dict()
    free = {"padded_vocab_size"}  # depends on the layout
    if found.kind == "weights" and architecture_of(shape).rotary:
        # No weight depends on them: sequences may become longer or shorter.
        free |= {"max_position_embeddings", *(key for key in ours if key.startswith("rotary_"))}
    unequal = [
        f"{key}: {theirs[key]} there, {value} here"
        for key, value in ours.items()
        if value != theirs[key] and key not in free
    ]
    if unequal:
        raise ConfigError(
            f"{found.folder} has a model of another shape ({', '.join(unequal)}). Start with the "
            "same model flags and tokenizer, or load another checkpoint."
        )
    if found.kind == "weights":
        theirs_dir = found.tokenizer_dir
        if theirs_dir is not None and not same_ids(load_tokenizer(theirs_dir), tokenizer):
            raise ConfigError(
                f"The weights in {found.folder} were trained with another tokenizer than that of "
                f"--data-path ({tokenizer.name}): the same text has other ids. Preprocess the "
                f"text with the tokenizer in {theirs_dir}."
            )
        return
    check_same_method(run, found)
    options = found.run["options"]
    _check_same_data(run, found, data)
    _check_something_is_left(run, found)
    for group in ("optimizer", "selection", "reference", "objective"):
        for key, value in dataclasses.asdict(getattr(run, group)).items():
            if key in options.get(group, {}) and options[group][key] != value:
                logger.warning(
                    "--%s is %s; it was %s when %s was saved",
                    key.replace("_", "-"),
                    value,
                    options[group][key],
                    found.folder,
                )


_ORDER = ("fingerprint", "weights", "split", "seed", "seq_length", "epochs")
"""Keys of a data record that determine the order of sequences."""


def _check_same_data(run: RunConfig, found: CheckpointInfo, data: dict[str, Any]) -> None:
    theirs = found.run["data"]
    differ = [key for key, value in data.items() if theirs.get(key) != value]
    if not differ:
        return
    text = "; ".join(f"{key}: {theirs.get(key)} there, {data[key]} here" for key in differ)
    if not run.checkpoint.allow_data_change:
        repeats = (
            " When data are read more than once, their order depends on the number of epochs "
            "(--train-iters, batch size, --skip-samples)."
        )
        raise ConfigError(
            f"{found.folder} was trained on other data or in another order ({text})."
            f"{repeats if 'epochs' in differ else ''} "
            "Continue with the same data, or give --allow-data-change."
        )
    reordered = bool(set(differ) & set(_ORDER))
    logger.warning(
        "--allow-data-change: %s; reading continues with sample %d%s",
        text,
        found.state().consumed_samples,
        " of the new order, whose samples may have been read in the old one" if reordered else "",
    )


def _check_something_is_left(run: RunConfig, found: CheckpointInfo) -> None:
    state, last = found.state(), run.training.train_iters
    iteration, flops = state.iteration, state.flops_paper
    if iteration < last and is_complete(run, iteration, flops) and not continues_itself(run):
        raise ConfigError(
            f"{found.folder} has used {flops:.4g} FLOPs by the paper's count, and --train-flops is "
            f"{run.training.train_flops:.4g}: nothing is left to train. Raise --train-flops."
        )
    if iteration > last or (iteration == last and not continues_itself(run)):
        budget = run.training.train_flops
        length, flag = f"--train-iters is {last}", "--train-iters"
        if budget is not None:  # it may be what has set --train-iters
            length += f" (with --train-flops {budget:.4g})"
            flag += " or --train-flops, whichever ends the run first"
        raise ConfigError(
            f"{found.folder} is at iteration {iteration}, but {length}: nothing is left to train. "
            f"Raise {flag}."
        )


def starting_state(run: RunConfig, found: CheckpointInfo | None, run_id: str) -> TrainState:
    """State before the first step of this run: a new one, or that of the checkpoint.

    Args:
        run: the run.
        found: the checkpoint to start from, if any.
        run_id: ID to use for a new run.
    """
    fresh = SelectionState(alpha=run.selection.initial_alpha)
    if found is None or found.kind == "weights":
        return TrainState(fresh, run_id=run_id)
    state = found.state()
    before = found.run["options"]["selection"]
    decide = ("selection", "eslm_alpha", "eslm_alpha_end", "uncertainty_quantile")
    if any(key in before and before[key] != getattr(run.selection, key) for key in decide):
        state.selection = fresh
    theirs = found.run["options"].get("reference", {})
    ours = dataclasses.asdict(run.reference)
    if any(ours.get(key) != value for key, value in theirs.items()):
        # Another reference has not been overtaken yet.
        state.selection.mean_excess = state.selection.overtaken_at = None
    return state


def carried_on(found: CheckpointInfo | None, key: str) -> list[Any]:
    """Return a list of run.json that later checkpoints of the same run extend."""
    return list(found.run.get(key, [])) if found is not None and found.kind == "training" else []


def resets_optimizer(run: RunConfig, found: CheckpointInfo | None) -> bool:
    """Whether `--reset-optimizer` takes effect in this start.

    A job requeued with the same flags resets only once: a checkpoint saved with this flag is from
    after the reset. If the job ends before such a checkpoint, the next start resets again, since
    the steps after the reset are lost. Loading from another folder always resets.
    """
    if not run.checkpoint.reset_optimizer or found is None or found.kind == "weights":
        return False
    saved_by = found.run["options"].get("checkpoint", {})
    return not (continues_itself(run) and saved_by.get("reset_optimizer", False))


def resume(run: RunConfig, engine: Engine, found: CheckpointInfo) -> None:
    """Restore the engine from a checkpoint. Collective."""
    resets = resets_optimizer(run, found)
    state = load_engine(engine, found, optimizer=not resets)
    if is_complete(run, state.iteration, state.flops_paper):
        logger.info("%s is the end of this run: nothing is left to train", found.folder)
        return
    logger.info(
        "continuing from %s, iteration %d, sample %d%s",
        found.folder,
        state.iteration,
        state.consumed_samples,
        ", with a fresh optimizer (--reset-optimizer)" if resets else "",
    )
    if run.checkpoint.reset_optimizer and not resets:
        logger.info(
            "--reset-optimizer: already done, %s was saved with this flag",
            found.folder.name,
        )
