"""Both FLOPs ledgers: the executed one against torch's own counter, the paper's by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from megatron_eslm.config.run import parse_run
from megatron_eslm.cost.flops import FlopsModel, TeacherCost, Work, device_peak_flops
from megatron_eslm.cost.of_run import build_flops, step_work
from megatron_eslm.model.arithmetic import num_params, num_params_block
from megatron_eslm.selection.state import SelectionState
from megatron_eslm.training.loop import Trainer
from tests.harness import run_ranks

from .runs import train, words

SHAPE_124M = parse_run(["--data-path", "x", "--model-size", "124M"], 1).shape(50_257)

CASES = {
    "clm": ("--selection", "clm"),
    "eslm": ("--eslm-alpha", "0.3"),
    "two layers": ("--eslm-alpha", "0.3", "--eslm-proxy-layers", "2"),
    "stride": ("--eslm-alpha", "0.3", "--eslm-proxy-stride", "4"),
    "entropy": ("--eslm-alpha", "0.3", "--eslm-score", "entropy"),
    "instance": ("--eslm-alpha", "0.3", "--eslm-level", "instance"),
    "token": ("--eslm-alpha", "0.3", "--eslm-level", "token"),
    "random": ("--eslm-alpha", "0.3", "--selection", "random"),
    "llama": (
        *("--eslm-alpha", "0.3", "--last-mlp-backward", "kept", "--architecture", "llama"),
        *("--num-attention-heads", "4", "--num-query-groups", "2"),
        "--untie-embeddings-and-output-weights",
    ),
    "last MLP": ("--eslm-alpha", "0.3", "--last-mlp-backward", "kept"),
    "last MLP, checkpoints": (
        *("--eslm-alpha", "0.3", "--last-mlp-backward", "kept"),
        *("--activation-checkpoint-interval", "1"),
    ),
    "recompute": ("--eslm-alpha", "0.3", "--head-logits", "recompute"),
    "checkpoints": ("--eslm-alpha", "0.3", "--activation-checkpoint-interval", "1"),
    "sparse checkpoints": ("--eslm-alpha", "0.3", "--activation-checkpoint-interval", "2"),
}


def _addmm_(total, a, b, *args, **kwargs) -> int:
    return 2 * a[0] * a[1] * b[1]


def _attention(q, k, v, *args, **kwargs) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward(grad, q, k, v, *args, **kwargs) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


aten = torch.ops.aten
UNKNOWN_TO_TORCH = {
    # torch's own formulas for operations that its counter takes for nothing: attention as the CPU
    # runs it, and the product that is added in place.
    aten.addmm_: _addmm_,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=UNKNOWN_TO_TORCH)


def counted(trainer: Trainer) -> list[int]:
    """FLOPs that torch's dispatcher counts in each step, forward and backward."""
    found: list[int] = []
    ordinary = trainer.engine.step

    def step(*args):
        with counter() as mode:
            outcome = ordinary(*args)
        found.append(mode.get_total_flops())
        return outcome

    trainer.engine.step = step
    return found


@pytest.mark.parametrize("case", CASES)
def test_executed_is_what_torch_counts(data: list[str], tmp_path: Path, case: str) -> None:
    def fn(rank: int) -> tuple[list[int], list[float]]:
        found: list[list[int]] = []
        argv = words(data, *CASES[case], "--seq-length", "64", iters=2)
        outcome = train(argv, tmp_path / "m.jsonl", lambda t: found.append(counted(t)))
        return found[0], outcome.column("flops")

    found, ledger = run_ranks(1, fn)[0]
    assert ledger[0] == pytest.approx(found[0], rel=0.01)
    assert ledger[1] == pytest.approx(sum(found), rel=0.01)


def test_what_attention_counts() -> None:
    """What the ledger's comparison rests on: 4 T^2 d forward, 2.5 times that backward, per head."""
    q, k, v = (torch.randn(2, 3, 64, 16, requires_grad=True) for _ in range(3))
    attention = torch.nn.functional.scaled_dot_product_attention
    with counter() as forward:
        out = attention(q, k, v, is_causal=True)
    with counter() as backward:
        out.sum().backward()
    assert forward.get_total_flops() == 2 * 3 * 4 * 64 * 64 * 16
    assert backward.get_total_flops() == 2.5 * forward.get_total_flops()


def test_the_papers_ledger_by_hand() -> None:
    """124M, one micro-batch of 12 x 1024 at alpha 0.1 with one proxy layer.

    Parameters, tied head counted once (D = 768, L = 12, T = 1024, V = 50,304):
        word 50,304 x 768 = 38,633,472; positions 1,024 x 768 = 786,432
        a block: 3D^2 + 3D + D^2 + D + 4D^2 + 4D + 4D^2 + D + 4D = 12 x 589,824 + 13 x 768
               = 7,077,888 + 9,984 = 7,087,872
        N = 39,419,904 + 12 x 7,087,872 + 2 x 768 = 124,475,904
    A token of a kept sequence: 6N + 12 L (HQ) T = 746,855,424 + 12 x 12 x 768 x 1,024
        = 746,855,424 + 113,246,208 = 860,101,632
    A token read, proxy: N_proxy = 39,419,904 + 7,087,872 + 1,536 = 46,509,312
        2 N_proxy + 6 x 1 x 768 x 1,024 + 2 x 768 x 50,304
        = 93,018,624 + 4,718,592 + 77,266,944 = 175,004,160
    A masked token saves 4DV + 32D^2 + 8D = 154,533,888 + 18,874,368 + 6,144 = 173,414,400
    Of 12 rows 10 are kept (10,240 tokens), of those floor(0.9 x 10,240) = 9,216 are trained on,
    1,024 masked.
    """
    shape = SHAPE_124M
    assert num_params_block(shape) == 7_087_872
    assert num_params(shape) == 124_475_904
    flops = FlopsModel(shape=shape, seq_length=1024, selector_depth=1, proxy=True)
    work = Work(tokens=12_288, tokens_deep=10_240, tokens_scored=10_240, tokens_trained=9_216)
    expected = 10_240 * 860_101_632 + 12_288 * 175_004_160 - 1_024 * 173_414_400
    assert flops.paper_flops(work) == pytest.approx(expected, rel=1e-12)

    plain = FlopsModel(shape=shape, seq_length=1024, selector_depth=0, proxy=False)
    everything = Work(
        tokens=12_288, tokens_deep=12_288, tokens_scored=12_288, tokens_trained=12_288
    )
    assert plain.paper_flops(everything) == pytest.approx(12_288 * 860_101_632, rel=1e-12)


# By the same steps, T = 1024, V = 50,304, alpha 0.1 and one proxy layer, a micro-batch of a rank:
# parameters of a block (12 D^2 + 13 D) and of the model; FLOPs of a kept token, of a token read,
# saved by a masked one; tokens read, kept and trained on (12, 8, 8, 4 rows keep 10, 7, 7, 3).
BY_HAND = {
    "124M": (7_087_872, 124_475_904, 860_101_632, 175_004_160, 173_414_400, 12_288, 10_240, 9_216),
    "350M": (12_596_224, 354_871_296, 2_431_217_664, 239_630_336, 239_607_808, 8_192, 7_168, 6_451),
    "774M": (19_677_440, 774_090_240, 5_210_772_480, 307_402_240, 309_995_520, 8_192, 7_168, 6_451),
    "1.5B": (
        *(30_740_800, 1_557_686_400, 10_289_836_800, 396_540_800, 403_878_400),
        *(4_096, 3_072, 2_764),
    ),
}


@pytest.mark.parametrize("size", BY_HAND)
def test_the_papers_ledger_of_all_sizes_by_hand(size: str) -> None:
    block, parameters, kept, read, masked, tokens, deep, trained = BY_HAND[size]
    words = ["--data-path", "x", "--model-size", size, "--eslm-alpha", "0.1"]
    run = parse_run([*words, "--eslm-scope", "global"], 1)
    shape = run.shape(50_257)
    assert num_params_block(shape) == block
    assert num_params(shape) == parameters
    work = step_work(run)
    steps = run.gradient_accumulation_steps
    assert (work.tokens, work.tokens_deep, work.tokens_trained) == (
        tokens * steps,
        deep * steps,
        trained * steps,
    )
    flops = FlopsModel(shape=shape, seq_length=1024, selector_depth=1, proxy=True)
    expected = steps * (deep * kept + tokens * read - (deep - trained) * masked)
    assert flops.paper_flops(work) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("size", "more"), [("124M", 0.020), ("350M", -0.035), ("774M", -0.071), ("1.5B", -0.214)]
)
def test_a_step_by_the_papers_ledger_beside_plain_training(size: str, more: float) -> None:
    """docs/paper.md, with thresholds per GPU and alpha 0.1."""
    _, _, kept, read, masked, tokens, deep, trained = BY_HAND[size]
    eslm = deep * kept + tokens * read - (deep - trained) * masked
    assert eslm / (tokens * kept) - 1 == pytest.approx(more, abs=0.0005)


@pytest.mark.parametrize(
    ("size", "budget", "micro_batches"),
    [("124M", 3e17, 28_400), ("350M", 3.5e17, 17_600), ("774M", 1e18, 23_400)],
)
def test_the_papers_budgets_count_micro_batches(
    size: str, budget: float, micro_batches: int
) -> None:
    """Counted per step of 40 micro-batches, the budgets would end within the 2000 of warm-up."""
    run = parse_run(["--data-path", "x", "--model-size", size, "--selection", "clm"], 1)
    flops, work = build_flops(run, run.shape(50_257), SelectionState(alpha=0.0)), step_work(run)
    per_step = flops.paper_flops(work)
    assert run.gradient_accumulation_steps == 40
    assert budget / (per_step / 40) == pytest.approx(micro_batches, rel=0.003)
    assert budget / per_step < run.optimizer.lr_warmup_iters


def test_the_papers_ledger_does_not_depend_on_the_layout() -> None:
    flags = ["--data-path", "x", "--model-size", "124M", "--eslm-alpha", "0.1"]
    found = []
    for tp in (1, 4):
        run = parse_run([*flags, "--tensor-model-parallel-size", str(tp)], tp)
        shape = run.shape(50_257)
        assert shape.padded_vocab_size == {1: 50_304, 4: 50_688}[tp]
        state = SelectionState(alpha=0.1)
        flops = build_flops(run, shape, state, teacher=shape, reference=shape)
        found.append(flops.paper_flops(step_work(run)))
    assert found[0] == found[1]


def test_the_papers_ledger_of_a_reference_by_hand() -> None:
    """2 N + 6 L H Q T = 248,951,808 + 6 x 12 x 768 x 1,024 = 305,574,912 per token."""
    plain = FlopsModel(shape=SHAPE_124M, seq_length=1024, selector_depth=0, proxy=False)
    taught = dataclasses.replace(plain, teacher=TeacherCost(shape=SHAPE_124M, runs=lambda: True))
    referring = dataclasses.replace(plain, reference=SHAPE_124M)
    work = Work(tokens=12_288, tokens_deep=12_288, tokens_scored=12_288, tokens_trained=12_288)
    for model in (taught, referring):
        more = model.paper_flops(work) - plain.paper_flops(work)
        assert more == pytest.approx(12_288 * 305_574_912, rel=1e-12)


def test_the_executed_ledger_by_hand() -> None:
    """The same step, by products that run.

    A block, a token: linear layers 2 x 12 D^2 = 14,155,776 forward, three times that with backward
    = 42,467,328; attention 4 T D = 3,145,728 forward, 3.5 times = 11,010,048; together 53,477,376.
    The head 2DV = 77,266,944: once for the proxy, once for the scores, twice in backward.
    """
    flops = FlopsModel(shape=SHAPE_124M, seq_length=1024, selector_depth=1, proxy=True)
    work = Work(tokens=12_288, tokens_deep=10_240, tokens_scored=10_240, tokens_trained=9_216)
    expected = (
        12_288 * (53_477_376 + 77_266_944)
        + 10_240 * 11 * 53_477_376
        + 77_266_944 * (10_240 + 2 * 9_216)
    )
    assert flops.executed(work) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("depth", [0, 1, 5])
@pytest.mark.parametrize("again", [False, True])
def test_the_executed_ledger_is_the_sum_of_its_parts(depth: int, again: bool) -> None:
    flops = FlopsModel(
        shape=SHAPE_124M,
        seq_length=1024,
        selector_depth=depth,
        proxy=depth > 0,
        proxy_stride=4,
        logits_recomputed=True,
        blocks_recomputed=again,
    )
    work = Work(tokens=12_288, tokens_deep=10_240, tokens_scored=10_240, tokens_trained=9_216)
    parts = [flops.scoring(work), *(flops.block(work, i) for i in range(12)), flops.head(work)]
    assert flops.executed(work) == pytest.approx(sum(parts), rel=1e-12)
    # 2 x 12 D^2 + 4TD forward, and once more where activations are computed again
    forward = 17_301_504 * again
    assert parts[1] == (12_288 if depth else 10_240) * (53_477_376 + forward)
    assert parts[-2] == 10_240 * (53_477_376 + forward)
    assert parts[0] == (12_288 * 77_266_944 / 4 if depth else 0)
    assert parts[-1] == 77_266_944 * (10_240 + 3 * 9_216)


def test_a_policy_without_proxy_pays_for_none() -> None:
    from megatron_eslm.selection.state import SelectionState

    for flags, proxy, depth in (
        ("--selection clm", False, 0),
        ("--selection random", False, 0),
        ("--eslm-level token", False, 0),
        ("--eslm-proxy-layers 2", True, 2),
    ):
        run = parse_run(f"--data-path x --model-size 124M {flags}".split(), 1)
        state = SelectionState(alpha=0.1)
        flops = build_flops(run, SHAPE_124M, state)
        assert (flops.proxy, flops.selector_depth) == (proxy, depth)


def test_peaks() -> None:
    assert device_peak_flops("NVIDIA A100-SXM4-80GB", None) == 312e12
    assert device_peak_flops("NVIDIA H100 80GB HBM3", None) == 989e12
    assert device_peak_flops("some CPU", None) is None
    assert device_peak_flops("some CPU", 2.5) == 2.5e12
