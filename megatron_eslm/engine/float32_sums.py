"""Float32 sums of 16-bit gradients in DeepSpeed's BF16_Optimizer, with fewer passes over memory.

DeepSpeed sets all sums to zero twice a step, and makes a float32 copy of each gradient before it
adds it. Here the first gradient of a step is written over what is there. The sums are the same.
"""

from __future__ import annotations

from typing import Any

import torch


class Float32Sums:
    """Takes the place of the methods of one BF16_Optimizer that write its sums."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._reduced, self._step = optimizer.get_grads_for_reduction, optimizer.step
        optimizer._update_hp_grad = self._add
        optimizer.clear_hp_grads = self._forget
        optimizer.get_grads_for_reduction = self._for_reduction
        optimizer.step = self._complete_step

    @torch.no_grad()
    def _add(self, parameter: torch.Tensor, group: int, index: int, clear_lp_grads: bool) -> None:
        if parameter.grad is None:
            return
        total = self._optimizer.fp32_groups_gradients[group][index]
        written = self._optimizer.fp32_groups_has_gradients[group]
        gradient = parameter.grad.view(total.shape)
        if written[index]:
            total.add_(gradient)
        else:
            total.copy_(gradient)
        written[index] = True
        parameter._hp_grad = total  # type: ignore[attr-defined]
        if clear_lp_grads:
            parameter.grad.zero_()

    def _forget(self) -> None:
        for written in self._optimizer.fp32_groups_has_gradients:
            written[:] = [False] * len(written)

    @torch.no_grad()
    def _complete(self) -> None:
        """Set to zero what no gradient was written to in this step."""
        optimizer = self._optimizer
        for totals, written in zip(
            optimizer.fp32_groups_gradients, optimizer.fp32_groups_has_gradients, strict=True
        ):
            for index, total in enumerate(totals):
                if not written[index]:
                    total.zero_()
                    written[index] = True

    def _for_reduction(self) -> Any:
        self._complete()  # others may have a gradient where this rank has none
        return self._reduced()

    def _complete_step(self, closure: Any = None) -> None:
        self._complete()
        self._step(closure)
