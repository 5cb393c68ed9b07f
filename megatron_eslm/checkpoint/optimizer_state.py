"""Access to the optimizer's float32 state by parameter, wherever DeepSpeed keeps it.

DeepSpeed keeps master weights and moments in one of three places: the parameters themselves
(float32 without ZeRO), flat partitions over the data-parallel ranks (ZeRO 1 and 2, and its bf16
optimizer), or partitions of each parameter (ZeRO 3). A PartitionView locates this rank's part of a
parameter, so that reading and writing work the same for all three.

DeepSpeed's own accessors (safe_get_full_fp32_param etc.) have no state before the first step, and
under ZeRO 3 cannot set a parameter whose size is not a multiple of the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_eslm.checkpoint.tensor_index import KINDS, LossScale, Scalars
from megatron_eslm.errors import ConfigError
from megatron_eslm.parallel.mesh import Mesh

if TYPE_CHECKING:
    from megatron_eslm.engine.engine import Engine


@dataclass(frozen=True)
class PartitionView:
    """Locates elements `begin` to `end` of a flattened parameter in `master`, from `offset` on."""

    master: torch.Tensor
    """The float32 tensor that the optimizer updates, which is the key of its state. For a frozen
    parameter, the tensor that the model computes with."""
    offset: int
    begin: int
    end: int


class OptimizerState:
    """Master weights, moments, Adam's step count and the loss scale of an engine.

    Raises:
        ConfigError: DeepSpeed is configured to keep them where they cannot be accessed.
    """

    def __init__(self, engine: Engine) -> None:
        self._mesh, self._device = engine.mesh, engine.ds.device
        self._wrapper = engine.ds.optimizer
        self._adam = self._wrapper if engine.plain_optimizer else self._wrapper.optimizer
        places = (
            _plain(self._wrapper) if engine.plain_optimizer else _places(self._wrapper, engine.mesh)
        )
        self._places = dict(places)
        self._partitioned = not engine.plain_optimizer

    @staticmethod
    def kinds(parameter: torch.nn.Parameter) -> tuple[str, ...]:
        """Kinds of tensors stored for a parameter; a frozen parameter has no moments."""
        return KINDS if parameter.requires_grad else KINDS[:1]

    def part(self, parameter: torch.nn.Parameter, kind: str) -> tuple[int, int, torch.Tensor]:
        """Return this rank's part of a tensor: (begin, end, float32 [end - begin]).

        The range refers to the flattened parameter and is empty if other ranks hold all of it. The
        tensor is a view: writing to it changes the optimizer's state. For a frozen parameter it is
        the parameter itself, in the compute dtype.
        """
        place = self._places.get(parameter)
        if not parameter.requires_grad:
            place = _frozen(parameter, self._mesh.dp_rank)
        if place is None:
            return 0, 0, torch.empty(0)
        tensor = place.master if kind == "weight" else self._moments(place.master)[kind]
        flat = tensor.detach().view(-1)
        return (
            place.begin,
            place.end,
            flat[place.offset : place.offset + place.end - place.begin],
        )

    def gather(self, parameter: torch.nn.Parameter, kind: str, owner: int) -> torch.Tensor | None:
        """Gather a full tensor on one data-parallel rank; None on the others. Collective.

        Args:
            parameter: the parameter.
            kind: one of `kinds(parameter)`.
            owner: data-parallel rank that receives the tensor.

        Returns:
            float32 [elements of the parameter]; may be a view of the state.
        """
        begin, end, part = self.part(parameter, kind)
        mine = self._mesh.dp_rank == owner
        everywhere = not self._partitioned or (
            not parameter.requires_grad and not hasattr(parameter, "ds_tensor")
        )
        if everywhere or self._mesh.dp_size == 1:  # every rank has the full tensor
            return part.float() if mine else None
        numel = getattr(parameter, "ds_numel", parameter.numel())
        # Each element is nonzero on one rank only; summed as integers, it arrives bit for bit.
        whole = torch.zeros(numel, dtype=torch.float32, device=self._device)
        whole[begin:end] = part
        to = dist.get_global_rank(self._mesh.dp_group, owner)
        dist.reduce(whole.view(torch.int32), to, group=self._mesh.dp_group)
        return whole if mine else None

    def scalars(self) -> Scalars:
        """Adam's step count and the state of the loss scaler."""
        steps = {int(self._adam.state[m]["step"]) for m in self._masters() if self._adam.state[m]}
        assert len(steps) <= 1, f"parameters have made different numbers of steps: {steps}"
        scaler = self._scaler()
        scale = scaler and LossScale(**{f.name: getattr(scaler, f.name) for f in fields(LossScale)})
        return Scalars(steps.pop() if steps else 0, scale)

    def set_scalars(self, scalars: Scalars) -> None:
        """Restore `scalars`; without a stored loss scale the configured one is kept."""
        for master in self._masters():
            state = self._moments(master)
            if isinstance(state["step"], torch.Tensor):
                state["step"].fill_(scalars.adam_step)
            else:
                state["step"] = scalars.adam_step
        if not isinstance(self._adam, torch.optim.AdamW):
            _replay(self._adam, scalars.adam_step)
        scaler = self._scaler()
        if scaler is not None and scalars.loss_scale is not None:
            for name, value in asdict(scalars.loss_scale).items():
                setattr(scaler, name, value)

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the master weights into the weights that the model computes with. Collective."""
        optimizer = self._wrapper
        if hasattr(optimizer, "fp32_partitioned_groups_flat"):
            # ZeRO 3: as DeepSpeed does in a step after updating each sub-group.
            optimizer.checkpoint_event_prologue()
            for i in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(i)
            optimizer.checkpoint_event_epilogue()
        elif self._partitioned:
            optimizer.update_lp_params()

    def _masters(self) -> list[torch.Tensor]:
        """All tensors that the optimizer updates on this rank, including pure padding."""
        if hasattr(self._wrapper, "fp32_partitioned_groups_flat"):
            return self._wrapper.fp32_partitioned_groups_flat
        return [p for group in self._adam.param_groups for p in group["params"]]

    def _moments(self, master: torch.Tensor) -> dict[str, Any]:
        """Adam's state of a master tensor; before the first step, created as Adam would."""
        state = self._adam.state[master]
        if not state:
            # torch's fused AdamW counts steps in a tensor, DeepSpeed's CPU Adam in an int.
            fused = isinstance(self._adam, torch.optim.AdamW)
            zero = torch.zeros((), dtype=torch.float32, device=master.device)
            state["step"] = zero if fused else 0
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(master)
        return state

    def _scaler(self) -> Any:
        """DeepSpeed's dynamic loss scaler; None without one."""
        scaler = getattr(self._wrapper, "loss_scaler", None)
        return scaler if scaler is not None and scaler.dynamic else None


def _replay(adam: Any, num_steps: int) -> None:
    """Advance the powers of beta inside DeepSpeed's CPU Adam to step `num_steps`.

    It multiplies them step by step but uses pow() after a jump, which rounds differently, so a
    resumed run would diverge from the uninterrupted one. A step on empty tensors takes
    microseconds.
    """
    group, nothing = adam.param_groups[0], [torch.empty(0)] * 4
    settings = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
    for step in range(1, num_steps + 1):
        adam.ds_opt_adam.adam_update(
            adam.opt_id, step, *settings, group["bias_correction"], *nothing
        )


def _frozen(parameter: Any, dp_rank: int) -> PartitionView:
    """Locate a parameter that is not in the optimizer; only ZeRO 3 partitions it (see _zero3)."""
    if not hasattr(parameter, "ds_tensor"):
        return PartitionView(parameter, 0, 0, parameter.numel())
    size = parameter.partition_numel()
    begin = min(dp_rank * size, parameter.ds_numel)
    return PartitionView(parameter.ds_tensor, 0, begin, min(begin + size, parameter.ds_numel))


Placed = Iterator[tuple[torch.nn.Parameter, PartitionView]]


def _plain(optimizer: torch.optim.Optimizer) -> Placed:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter, PartitionView(parameter, 0, 0, parameter.numel())


def _places(optimizer: Any, mesh: Mesh) -> Placed:
    """Locate all parameters in any of DeepSpeed's optimizers, identified by their attributes."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return _zero3(optimizer, mesh.dp_rank)
    if hasattr(optimizer, "bf16_groups_flat"):
        flat = zip(optimizer.bf16_groups, optimizer.bf16_groups_flat, strict=True)
        return _flat(optimizer, flat, mesh)
    if hasattr(optimizer, "bit16_groups_flat"):
        flat = zip(optimizer.bit16_groups, optimizer.bit16_groups_flat, strict=True)
        return _flat(optimizer, flat, mesh)
    raise ConfigError(
        f"The DeepSpeed configuration selects an optimizer ({type(optimizer).__name__}) whose "
        "state cannot be saved. Remove the setting from --deepspeed_config."
    )


def _flat(optimizer: Any, groups: Any, mesh: Mesh) -> Placed:
    """Locate parameters that are views of one flat tensor per group, partitioned over ranks."""
    for (parameters, flat), group in zip(groups, optimizer.param_groups, strict=True):
        (master,) = group["params"]
        size = master.numel()
        assert size * mesh.dp_size == flat.numel()
        for parameter in parameters:
            start = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
            low = max(start, mesh.dp_rank * size)
            high = min(start + parameter.numel(), (mesh.dp_rank + 1) * size)
            if low < high:
                place = PartitionView(master, low - mesh.dp_rank * size, low - start, high - start)
                yield parameter, place


def _zero3(optimizer: Any, rank: int) -> Placed:
    """Locate parameters that are each cut into equal parts, with padding in the last."""
    for i, group in enumerate(optimizer.fp16_groups):
        offset = 0
        for parameter in group:
            size = parameter.partition_numel()
            begin = min(rank * size, parameter.ds_numel)
            end = min(begin + size, parameter.ds_numel)
            if begin < end:
                place = PartitionView(optimizer.fp32_partitioned_groups_flat[i], offset, begin, end)
                yield parameter, place
            offset += size
