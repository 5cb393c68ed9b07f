"""The selective head in all its forms: PyTorch, Triton over cuBLAS's logits, Triton fused.

python -m benchmarks.head_kernel --hidden-size 1600 --tokens 8192

One line a form and memory mode: the product alone that all forms are made of, statistics of
all tokens (loss and entropy) and gradients of the kept ones, each in milliseconds and TFLOP/s of
the products that it needs (those that it takes besides cost time but do not count), and the memory
that the form takes at its peak beside inputs and gradients. Forms take turns, medians are shown.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch

from benchmarks.interleave import report
from megatron_eslm.ops.head.contract import HeadKernel
from megatron_eslm.ops.head.cross_entropy import kept_linear_cross_entropy
from megatron_eslm.ops.head.dispatch import resolve_head_kernel
from megatron_eslm.ops.head.statistics import VocabShard, head_statistics

KERNELS: tuple[HeadKernel, ...] = ("torch", "triton", "triton-fused")


class Measured(NamedTuple):
    """Of one form, in one repetition."""

    forward_seconds: float
    backward_seconds: float
    peak_bytes: int


class Head:
    """Inputs of the size of a model's."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.device, dtype = device, getattr(torch, args.dtype)
        rng = torch.Generator(device).manual_seed(0)
        n, d, padded = args.tokens, args.hidden_size, math.ceil(args.vocab_size / 128) * 128

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=rng, device=device)

        self.hidden_ND = random(n, d).to(dtype)
        self.weight_VD = (random(padded, d) / math.sqrt(d)).to(dtype).requires_grad_()
        self.labels_N = torch.randint(args.vocab_size, (n,), generator=rng, device=device)
        kept = torch.randperm(n, generator=rng, device=device)[: n - round(args.alpha * n)]
        self.kept_K = kept.sort().values
        self.hidden_KD = self.hidden_ND[self.kept_K].requires_grad_()
        self.vocab_size, self.padded = args.vocab_size, padded

    @property
    def flops_of_a_token(self) -> float:
        """Of one product of one token."""
        return 2.0 * self.padded * self.hidden_ND.shape[1]

    def seconds_of(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds that some work takes, on the device, and what it returns."""
        self._wait()
        start = time.perf_counter()
        result = work()
        self._wait()
        return time.perf_counter() - start, result

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def product_seconds(self) -> float:
        """Of the logits of as many tokens as a chunk holds, scaled to all."""
        tokens = min(1024, len(self.hidden_ND))
        hidden_CD, weight_VD = self.hidden_ND[:tokens], self.weight_VD.detach()
        seconds, _ = self.seconds_of(lambda: hidden_CD @ weight_VD.t())
        return seconds * len(self.hidden_ND) / tokens

    def measure(self, kernel: HeadKernel, keep_logits: bool) -> Measured:
        """Statistics of all tokens, then gradients of the kept ones."""
        shard = VocabShard.of(self.vocab_size, self.padded, kernel=kernel)
        before = self._memory(reset=True)
        forward_seconds, statistics = self.seconds_of(
            lambda: head_statistics(
                self.hidden_ND,
                self.weight_VD,
                self.labels_N,
                shard,
                entropy=True,
                keep_logits=keep_logits,
            )
        )
        loss = kept_linear_cross_entropy(
            self.hidden_KD,
            self.weight_VD,
            self.labels_N[self.kept_K],
            self.kept_K,
            statistics,
            shard,
        ).mean()
        backward_seconds, gradients = self.seconds_of(
            lambda: torch.autograd.grad(loss, (self.hidden_KD, self.weight_VD))
        )
        wanted = sum(x.numel() * x.element_size() for x in gradients)
        peak_bytes = max(0, self._memory() - before - wanted)
        return Measured(forward_seconds, backward_seconds, peak_bytes)

    def _memory(self, reset: bool = False) -> int:
        if self.device.type != "cuda":
            return 0
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192, help="scored (default 8192)")
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--vocab-size", type=int, default=50_257, help="padded to 128")
    parser.add_argument("--alpha", type=float, default=0.19, help="share of tokens dropped")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=None)
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Without a GPU there is the PyTorch form alone, unless another one is asked for by name.
    kernels = args.kernels or (KERNELS if device.type == "cuda" else KERNELS[:1])
    for kernel in kernels:
        resolve_head_kernel(kernel, device.type)
    head = Head(args, device)
    forms = [(kernel, keep) for kernel in kernels for keep in (False, True)]
    # With kept logits the fused form is the other one.
    forms = [form for form in forms if form != ("triton-fused", True)]
    found: dict[tuple[HeadKernel, bool], list[Measured]] = {form: [] for form in forms}
    product: list[float] = []
    for repetition in range(args.repetitions + 1):
        for form in forms:
            measured = head.measure(*form)
            if repetition:  # the first one compiles
                found[form].append(measured)
        product.append(head.product_seconds())

    tokens, kept = len(head.hidden_ND), len(head.kept_K)
    product_ms = 1e3 * median(product[1:])
    for (kernel, keep_logits), times in found.items():
        forward_ms = 1e3 * median(x.forward_seconds for x in times)
        backward_ms = 1e3 * median(x.backward_seconds for x in times)
        products = 2 if keep_logits else 3
        report(
            f"head, {kernel}, logits {'kept' if keep_logits else 'computed again'}, {args.dtype}: "
            "time / that of its products alone",
            (forward_ms + backward_ms) / (product_ms * (1 + products * kept / tokens)),
            "1",
            tokens=tokens,
            kept=kept,
            hidden_size=args.hidden_size,
            vocab_size=head.padded,
            product_ms=round(product_ms, 3),
            product_tflops=_tflops(head, tokens, product_ms),
            forward_ms=round(forward_ms, 3),
            forward_tflops=_tflops(head, tokens, forward_ms),
            backward_ms=round(backward_ms, 3),
            backward_tflops=_tflops(head, products * kept, backward_ms),
            peak_mib=round(max(x.peak_bytes for x in times) / 2**20, 1)
            if device.type == "cuda"
            else None,
            repetitions=args.repetitions,
        )


def _tflops(head: Head, products: float, milliseconds: float) -> float:
    return round(products * head.flops_of_a_token / milliseconds / 1e9, 3)


if __name__ == "__main__":
    main()
