"""The sums of a step are those of its gradients, whatever an earlier step left in them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from megatron_eslm.engine.float32_sums import Float32Sums


class _Optimizer:
    """What Float32Sums uses of DeepSpeed's BF16_Optimizer, with sums left by an earlier step."""

    def __init__(self) -> None:
        self.fp32_groups_gradients = [[torch.full((4,), 7.0) for _ in range(2)]]
        self.fp32_groups_has_gradients = [[False, False]]
        self.stepped: list[list[float]] = []

    def get_grads_for_reduction(self) -> str:
        return "gradients"

    def step(self, closure: Any = None) -> None:
        self.stepped.append([float(total.sum()) for total in self.fp32_groups_gradients[0]])
        self.clear_hp_grads()

    def clear_hp_grads(self) -> None:
        raise AssertionError("sums are not set to zero")


def test_sums_start_anew_in_each_step() -> None:
    optimizer: Any = _Optimizer()
    Float32Sums(optimizer)
    tiny = 2.0**-12  # added to 1, lost in bf16
    for reduces in (False, True):
        for value in (1.0, tiny):
            gradient = torch.full((2, 2), value, dtype=torch.bfloat16)
            weight = SimpleNamespace(grad=gradient)
            optimizer._update_hp_grad(weight, 0, 0, False)
        assert weight._hp_grad is optimizer.fp32_groups_gradients[0][0]
        if reduces:
            assert optimizer.get_grads_for_reduction() == "gradients"
            # From other ranks; this one has no gradient of the second weight.
            optimizer.fp32_groups_gradients[0][1] += 1.0
        optimizer.step()
        assert optimizer.stepped.pop() == [4 * (1 + tiny), 4.0 * reduces]
        assert optimizer.fp32_groups_has_gradients == [[False, False]]
