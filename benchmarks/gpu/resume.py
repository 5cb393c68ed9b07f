"""Rows 10 and 11: a run that is saved and continued, and its export."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.process import in_process
from benchmarks.gpu.row import Row, at_least, at_most, exactly
from benchmarks.gpu.setup import Setup
from benchmarks.gpu.training import SMALL, TINY, Flags, Outcome, data_flags, train_all

ITERS = 10
BF16_ERROR = 2e-2
"""Of the logits as a whole, relative."""


def rows(setup: Setup) -> Iterator[Row]:
    """Of resuming and exporting."""
    # A CPU computes the same bits anyway.
    for deterministic in (True, False) if setup.cuda else (True,):
        yield from _resumed(setup, deterministic)
    yield from in_process(_exported, setup, seconds=120.0)


def _checkpoints(setup: Setup, deterministic: bool) -> Path:
    return setup.folder / f"resume-{'deterministic' if deterministic else 'default'}" / "run"


def _resumed(setup: Setup, deterministic: bool) -> Iterator[Row]:
    save = _checkpoints(setup, deterministic)
    folder = save.parent
    folder.mkdir()
    shape = TINY if setup.toy else SMALL
    common: Flags = (
        *(*data_flags(setup), *shape, "--global-batch-size", 32, "--train-iters", ITERS),
        *("--eslm-alpha", 0.3, "--eslm-scope", "global", "--bf16", "--eval-iters", 0),
        *("--log-interval", 1, "--dump-selection", "{dumps}", "--no-compile"),
        *(("--deterministic",) if deterministic else ()),
    )
    runs = {
        "whole": common,
        "first": (*common, "--save", save, "--exit-interval", ITERS // 2),
        "second": (*common, "--save", save, "--load", save),
    }
    found = dict(in_process(train_all, runs, folder, seconds=120.0))
    yield from _compared(found["whole"], found["second"], deterministic)


def _compared(whole: Outcome, second: Outcome, deterministic: bool) -> Iterator[Row]:
    whole = dataclasses.replace(whole, steps=whole.steps[-len(second.steps) :])
    losses = np.abs(np.subtract(whole.column("loss"), second.column("loss"))).max()
    same = [
        whole.dumps[step]["token_kept"] == second.dumps[step]["token_kept"] for step in second.dumps
    ]
    kind = "--deterministic" if deterministic else "default kernels"
    what = f"resumed against whole, bf16 eslm, {kind}: "
    bound = exactly(0) if deterministic else at_most(2e-3)
    yield Row.measured(10, f"{what}losses, nats", losses, bound)
    bound = exactly(1) if deterministic else at_least(0.99)
    yield Row.measured(10, f"{what}share of equal choices", float(np.mean(same)), bound)


def _exported(setup: Setup) -> Iterator[Row]:
    from megatron_eslm.checkpoint.weights import read_weights
    from megatron_eslm.interop.convert import checkpoint_to_folder
    from megatron_eslm.interop.huggingface import LOGIT_TOLERANCE, compare_logits
    from megatron_eslm.model.hf.folder import load_hf

    folder, load = setup.folder / "hf", str(_checkpoints(setup, True))
    difference = checkpoint_to_folder(load, str(folder))
    yield Row.measured(11, "export, logits on the CPU", difference, at_most(LOGIT_TOLERANCE))
    source = read_weights(load)
    model: Any = load_hf(folder)
    length = source.shape.max_position_embeddings
    rng = torch.Generator().manual_seed(0)
    prompts = torch.randint(source.shape.vocab_size, (4, length), generator=rng)
    with torch.no_grad():
        exact = model(prompts, use_cache=False).logits.double()
    model.to(setup.device)
    difference = compare_logits(source.weights, source.shape, model, prompts.tolist())
    what = "our logits on the CPU, transformers' on the device"
    yield Row.measured(11, f"{what}, float32", difference, at_most(LOGIT_TOLERANCE))
    model.to(torch.bfloat16)
    with torch.no_grad():
        rounded = model(prompts.to(setup.device), use_cache=False).logits.double().cpu()
    error = float((rounded - exact).norm() / exact.norm())
    yield Row.measured(11, f"{what}, bf16, relative", error, at_most(BF16_ERROR))
