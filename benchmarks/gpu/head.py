"""Rows 2 and 3: the head's kernels against float64, and how near they are to their limit.

Shape legend as in ops/head: N tokens, K kept ones, D hidden, V rows of the vocabulary.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from statistics import median

import torch

from benchmarks.gpu.device import copy_bandwidth
from benchmarks.gpu.row import Bound, Row, at_least, at_most, exactly
from benchmarks.gpu.setup import Setup
from benchmarks.head_kernel import KERNELS, Head
from megatron_eslm.ops.head.contract import HeadKernel
from megatron_eslm.ops.head.cross_entropy import kept_linear_cross_entropy
from megatron_eslm.ops.head.statistics import VocabShard, head_statistics

Shape = tuple[int, int, int]
"""N, D and V."""
ODD: list[Shape] = [(1, 17, 1000), (9, 40, 4097), (130, 100, 290)]
LARGE: list[Shape] = [(4096, 768, 50_257), (4096, 1600, 50_257)]
BOUNDS: dict[str, dict[str, Bound]] = {
    # A logit in bf16 has 8 bits: one unit of those near 4 is 1/64, and a kernel may round the
    # label's logit to the other neighbour.
    "float32": {"losses": at_most(1e-5), "gradients": at_most(1e-5)},
    "bfloat16": {"losses": at_most(2**-5), "gradients": at_most(2**-7)},
}
FORMS: list[tuple[HeadKernel, bool]] = [
    (kernel, keep) for kernel in KERNELS for keep in (False, True)
]
"""(kernel, whether logits are kept)."""


def rows(setup: Setup) -> Iterator[Row]:
    """Of the head."""
    kernels = KERNELS if setup.cuda else KERNELS[:1]
    forms = [form for form in FORMS if form[0] in kernels]
    shapes = [*ODD, (40, 24, 500)] if setup.toy else [*ODD, *LARGE]
    same_bits = True
    for dtype, bounds in BOUNDS.items():
        worst = dict.fromkeys(bounds, (0.0, ""))
        for shape in shapes:
            head = _head(shape, dtype, setup)
            exact = _exact(head)
            for kernel, keep in forms:
                got, again = (_run(head, kernel, keep) for _ in range(2))
                same_bits &= all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
                name = f"{kernel}{', logits kept' if keep else ''}, N, D, V = {shape}"
                for kind, error in _errors(got, exact).items():
                    worst[kind] = max(worst[kind], (error, name))
        for kind, (error, name) in worst.items():
            note = f"worst: {name}"
            yield Row.measured(2, f"head's {kind}, {dtype}", error, bounds[kind], note)
    yield Row.measured(2, "head twice: the same bits", same_bits, exactly(1))
    yield from _speed(setup, forms)


def _head(shape: Shape, dtype: str, setup: Setup) -> Head:
    tokens, hidden, vocab = shape
    sizes = {"tokens": tokens, "hidden_size": hidden, "vocab_size": vocab}
    return Head(Namespace(**sizes, dtype=dtype, alpha=0.19), setup.device)


def _run(head: Head, kernel: HeadKernel, keep: bool) -> tuple[torch.Tensor, ...]:
    """Losses of all tokens; gradients of the mean loss of the kept ones: hidden and weight."""
    shard = VocabShard.of(head.vocab_size, head.padded, kernel=kernel)
    found = head_statistics(
        head.hidden_ND, head.weight_VD, head.labels_N, shard, entropy=True, keep_logits=keep
    )
    loss = kept_linear_cross_entropy(
        head.hidden_KD, head.weight_VD, head.labels_N[head.kept_K], head.kept_K, found, shard
    ).mean()
    return found.loss_N, *torch.autograd.grad(loss, (head.hidden_KD, head.weight_VD))


@torch.no_grad()
def _exact(head: Head) -> tuple[torch.Tensor, ...]:
    """The same in float64, from the logits in the type of the head, some tokens at a time."""
    weight_VD = head.weight_VD.double()
    hidden_KD, labels_K = head.hidden_KD, head.labels_N[head.kept_K]
    losses = [
        torch.nn.functional.cross_entropy(_logits(head, hidden), labels, reduction="none")
        for hidden, labels in zip(head.hidden_ND.split(512), head.labels_N.split(512), strict=True)
    ]
    hidden_gradients, weight_gradient_VD = [], torch.zeros_like(weight_VD)
    for hidden, labels in zip(hidden_KD.split(512), labels_K.split(512), strict=True):
        gradient_CV = _logits(head, hidden).softmax(dim=1)
        gradient_CV[torch.arange(len(labels), device=labels.device), labels] -= 1.0
        gradient_CV /= len(hidden_KD)
        real_VD = weight_VD[: head.vocab_size]
        hidden_gradients.append(gradient_CV @ real_VD)
        weight_gradient_VD[: head.vocab_size] += gradient_CV.t() @ hidden.double()
    return torch.cat(losses), torch.cat(hidden_gradients), weight_gradient_VD


def _logits(head: Head, hidden_CD: torch.Tensor) -> torch.Tensor:
    """float64 [C, real V]."""
    if hidden_CD.dtype == torch.float32:
        logits_CV = hidden_CD.double() @ head.weight_VD.double().t()
    else:
        logits_CV = (hidden_CD @ head.weight_VD.t()).double()
    return logits_CV[:, : head.vocab_size]


def _errors(got: tuple[torch.Tensor, ...], exact: tuple[torch.Tensor, ...]) -> dict[str, float]:
    losses = ((got[0].double() - exact[0]).abs() / (1.0 + exact[0].abs())).max()
    gradients = [
        float((a.double() - b).norm() / b.norm()) for a, b in zip(got[1:], exact[1:], strict=True)
    ]
    return {"losses": float(losses), "gradients": max(gradients)}


def _speed(setup: Setup, forms: list[tuple[HeadKernel, bool]]) -> Iterator[Row]:
    bandwidth, repetitions = copy_bandwidth(setup), 2 if setup.toy else 10
    for shape in [(64, 64, 1000)] if setup.toy else [(8192, 768, 50_257), (8192, 1600, 50_257)]:
        head = _head(shape, "bfloat16", setup)
        for kernel, keep in forms:
            if (kernel, keep) == ("triton-fused", True):
                continue  # the other Triton form
            times = [head.measure(kernel, keep) for _ in range(repetitions + 1)][1:]
            seconds = median(x.forward_seconds for x in times)
            product = median(head.product_seconds() for _ in range(repetitions))
            # Logits are written and read once.
            least = product + 4 * shape[0] * head.padded / bandwidth
            kept = ", logits kept" if keep else ""
            bound = at_least(1e-6 if setup.toy else 0.7) if kernel != "triton-fused" else None
            if kernel == "torch" and setup.cuda:
                bound = None
            yield Row.measured(
                3,
                f"head's statistics, {kernel}{kept}, D {shape[1]}: product and one pass / time",
                least / seconds,
                bound,
                f"{1e3 * seconds:.3g} ms; backward "
                f"{1e3 * median(x.backward_seconds for x in times):.3g} ms",
            )
