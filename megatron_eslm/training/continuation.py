"""Where a run starts from: what `--load` names, whether it fits this run, and where it stood."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from megatron_eslm.config.run import RunConfig
from megatron_eslm.data.tokenizers import Tokenizer, load_tokenizer, same_ids
from megatron_eslm.errors import ConfigError
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.selection.state import SelectionState
from megatron_eslm.training.checkpoint import Found, find_checkpoint, load_engine
from megatron_eslm.training.engine import Engine
from megatron_eslm.training.manifest import list_checkpoints
from megatron_eslm.training.method import check_same_method
from megatron_eslm.training.state import TrainState
from megatron_eslm.training.stored_shape import holds_nothing_yet

logger = logging.getLogger(__name__)


def continues_itself(run: RunConfig) -> bool:
    """Whether the run loads from where it saves: the habit of jobs that are requeued."""
    return run.checkpoint.continues_itself


def find_start(run: RunConfig) -> Found | None:
    """The checkpoint to start from; None starts a new run."""
    load, save = run.checkpoint.load, run.checkpoint.save
    if load is None:
        return None
    if holds_nothing_yet(run.checkpoint):
        logger.info("--load %s holds no checkpoint yet: starting a new run", load)
        return None
    found = find_checkpoint(load)
    if run.checkpoint.finetune:
        return _for_finetuning(run, found)
    siblings = list_checkpoints(Path(save)) if save is not None else []
    if found.folder.resolve() == Path(load).resolve() and found.folder.resolve() in (
        path.resolve() for path in siblings[1:]
    ):
        raise ConfigError(
            f"--load {load} goes back behind {siblings[0].name} in the same --save {save}, and a "
            "later --load of that folder would take the newer one. Save to another folder, or "
            "remove the newer checkpoints."
        )
    return found


def _for_finetuning(run: RunConfig, found: Found) -> Found:
    """A checkpoint as if it held weights alone."""
    save = run.checkpoint.save
    if save is not None and Path(save).resolve() == found.folder.resolve().parent:
        raise ConfigError(
            f"--finetune starts a new run from --load {run.checkpoint.load}, and --save {save} is "
            "where that run saves. Save to another folder; or leave out --finetune to continue "
            "the run."
        )
    return dataclasses.replace(found, kind="weights")


def check_continues(
    run: RunConfig, found: Found, shape: ModelShape, data: dict[str, Any], tokenizer: Tokenizer
) -> None:
    """ConfigError unless the checkpoint fits this run; differences that may be are logged."""
    ours, theirs = shape.to_dict(), found.shape.to_dict()
    unequal = [
        f"{key}: {theirs[key]} there, {value} here"
        for key, value in ours.items()
        if value != theirs[key] and key != "padded_vocab_size"  # that depends on the layout
    ]
    if unequal:
        raise ConfigError(
            f"{found.folder} holds a model of another shape ({', '.join(unequal)}). Start with the "
            "same model flags and tokenizer, or load another checkpoint."
        )
    if found.kind == "weights":
        theirs_dir = found.tokenizer_dir
        if theirs_dir is not None and not same_ids(load_tokenizer(theirs_dir), tokenizer):
            raise ConfigError(
                f"The weights in {found.folder} were trained with another tokenizer than the one "
                f"of --data-path ({tokenizer.name}): the same text has other ids. Preprocess the "
                f"text with the tokenizer in {theirs_dir}."
            )
        return
    check_same_method(run, found)
    options = found.run["options"]
    differ = [
        f"{key}: {found.run['data'].get(key)} there, {value} here"
        for key, value in data.items()
        if found.run["data"].get(key) != value
    ]
    if differ and not run.checkpoint.allow_data_change:
        raise ConfigError(
            f"{found.folder} was trained on other data or in another order ({'; '.join(differ)}). "
            "Continue with the same, or consent with --allow-data-change."
        )
    repeats = max(d["epochs"] for d in found.run["domains"]) > 1
    longer = options["training"]["train_iters"] != run.training.train_iters
    if repeats and longer and not run.checkpoint.allow_data_change:
        raise ConfigError(
            f"{found.folder} was planned for --train-iters {options['training']['train_iters']}, "
            f"this run for {run.training.train_iters}. With data read more than once the order of "
            "samples depends on it. Keep it, or consent with --allow-data-change."
        )
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


def resume(run: RunConfig, engine: Engine, found: Found) -> TrainState:
    """Restore the engine from a checkpoint and return where the run stands. Collective."""
    t = run.training
    assert t.train_iters and t.global_batch_size
    state = load_engine(engine, found)
    # The same number, unless the batch size changed (--allow-data-change).
    state.consumed_samples = state.iteration * t.global_batch_size
    before = found.run["options"]["selection"]
    decide = ("selection", "eslm_alpha", "uncertainty_quantile")
    if any(key in before and before[key] != getattr(run.selection, key) for key in decide):
        state.selection = SelectionState(alpha=run.selection.initial_alpha)
    if state.iteration == t.train_iters and continues_itself(run):
        logger.info("%s is the end of this run: nothing is left to train", found.folder)
    elif state.iteration >= t.train_iters:
        raise ConfigError(
            f"{found.folder} is at iteration {state.iteration} and --train-iters is "
            f"{t.train_iters}: nothing is left to train. Raise --train-iters."
        )
    else:
        logger.info("continuing from %s, iteration %d", found.folder, state.iteration)
    return state
