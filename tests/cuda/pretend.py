"""A CUDA device that is not there: find device mixes and host synchronisations on a CPU.

Tensors that live "on the GPU" are `Pretend`: a subclass whose `.device` says cuda:0 and which holds
an ordinary CPU tensor. `PretendCuda()` is a context in which

- `.to("cuda:0")`, `.cuda()` and factories with device="cuda..." make such tensors;
- an operation that mixes them with CPU tensors raises `DeviceMix`, by CUDA's own rules (0-dim CPU
  tensors may take part; CPU index tensors may index, which costs a copy);
- every point where the host waits for the device is noted with the line of the project that did it:
  `.item()`, `bool()`, `.tolist()`, `nonzero`, boolean-mask indexing, `.cpu()`, copies from memory
  that is not pinned (torch.tensor(..., device=cuda), new_tensor, from_numpy(...).to(cuda));
- a collective over a CPU tensor raises, as NCCL does (object collectives are let through);
- a tensor that another stream has made raises `StreamRace`, unless the current stream waits for
  that one and the allocator knows of the use (`record_stream`);
- launches are counted: operations that are neither views nor metadata.

    with PretendCuda(root="/path/of/the/project") as cuda:
        model.to("cuda:0"); ...
        with cuda.watch("one micro-step") as seen: loss = model(...); loss.backward()
        print(seen.report())

What it does not see: what happens below aten (Triton, NCCL), DeepSpeed's own engine,
numbers (they are the CPU's), memory. Needs nothing but torch; works on torch's CPU build.
"""

from __future__ import annotations

import collections
import contextlib
import os
import traceback
from dataclasses import dataclass, field

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

aten = torch.ops.aten
CUDA0 = torch.device("cuda", 0)


class DeviceMix(RuntimeError):
    """Tensors of both devices where CUDA takes one."""


class StreamRace(RuntimeError):
    """A tensor of another stream that may not be written yet, or be overwritten too early."""


class Stream:
    """A stream of the device that is not there; its clock counts what was launched in it."""

    def __init__(self, device: object = None) -> None:
        self.clock = 0
        self.waited: dict[Stream, int] = {}

    def wait_stream(self, other: Stream) -> None:
        self.waited[other] = other.clock


class Pretend(torch.Tensor):
    """A tensor that says it is on cuda:0."""

    elem: torch.Tensor
    stream: Stream
    """Of which its memory is."""
    launched: int
    """Time of that stream's clock at which it was made."""
    recorded: set[Stream]
    """Other streams that the allocator knows to use it."""

    @staticmethod
    def __new__(cls, elem: torch.Tensor, requires_grad: bool = False) -> Pretend:
        assert type(elem) is torch.Tensor, type(elem)
        out = torch.Tensor._make_wrapper_subclass(
            cls,
            elem.size(),
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            # Impl on meta: autograd then runs on the calling thread, as for the CPU.
            device="meta",
            requires_grad=requires_grad,
        )
        out.elem = elem
        out.stream = MODE.current.stream
        out.stream.clock += 1
        out.launched, out.recorded = out.stream.clock, set()
        return out

    def record_stream(self, stream):
        self.recorded.add(stream)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:
        return CUDA0

    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    def pin_memory(self, *_):  # type: ignore[override]
        raise RuntimeError("cannot pin a tensor on cuda")

    def tolist(self):  # C++ tolist() reads the data itself
        MODE.current.sync("tolist")
        return self.elem.tolist()

    # C++ makes the next two on the device of the impl, which is meta.
    def __setitem__(self, key, value):
        if not isinstance(value, torch.Tensor):
            value = torch.tensor(value, dtype=self.dtype)
        keys = key if isinstance(key, tuple) else (key,)
        # A list becomes an index on the CPU, which is copied.
        keys = tuple(torch.tensor(list(k)) if isinstance(k, (list, range)) else k for k in keys)
        torch.Tensor.__setitem__(self, keys if isinstance(key, tuple) else keys[0], value)

    def new_tensor(self, data, *, dtype=None, device=None, requires_grad=False):
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device)

    def numpy(self, *a, **k):  # type: ignore[override]
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use .cpu() first")

    def __array__(self, *a, **k):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use .cpu() first")

    def data_ptr(self):
        return self.elem.data_ptr()

    def __repr__(self, **k):  # type: ignore[override]
        return f"Pretend({self.elem!r})"

    def __reduce_ex__(self, protocol):
        raise RuntimeError("a CUDA tensor was about to be pickled")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        mode = MODE.current
        if mode is None:
            raise RuntimeError(f"{func} on a pretended CUDA tensor outside PretendCuda()")
        return mode.run(func, types, args, kwargs or {})


class MODE:
    current: PretendCuda | None = None


VIEWS_AND_METADATA = {
    "aten::detach",
    "aten::view",
    "aten::_unsafe_view",
    "aten::t",
    "aten::transpose.int",
    "aten::permute",
    "aten::expand",
    "aten::slice.Tensor",
    "aten::select.int",
    "aten::unsqueeze",
    "aten::squeeze.dim",
    "aten::squeeze",
    "aten::as_strided",
    "aten::split.Tensor",
    "aten::split_with_sizes",
    "aten::unbind.int",
    "aten::alias",
    "aten::_reshape_alias",
    "aten::empty.memory_format",
    "aten::new_empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty_strided",
    "aten::sym_size.int",
    "aten::is_same_size",
    "aten::view.dtype",
    "aten::unfold",
    "aten::narrow",
    "aten::resize_",
    "aten::set_.source_Tensor",
    "aten::lift_fresh",
    "aten::_fused_sdp_choice",
    "aten::transpose_",
    "aten::squeeze_.dim",
}
INDEXING = (
    "aten::index.Tensor",
    "aten::index_put_",
    "aten::index_put",
    "aten::_index_put_impl_",
    "aten::_unsafe_index.Tensor",
)


@dataclass
class Seen:
    """What happened in a `watch`."""

    root: str
    syncs: collections.Counter = field(default_factory=collections.Counter)
    launches: collections.Counter = field(default_factory=collections.Counter)
    collectives: collections.Counter = field(default_factory=collections.Counter)

    @property
    def num_syncs(self) -> int:
        return sum(self.syncs.values())

    def report(self, per: int = 1) -> str:
        lines = [
            f"{self.num_syncs / per:g} host syncs, {sum(self.launches.values()) / per:g} "
            f"launches, {sum(self.collectives.values()) / per:g} collectives"
        ]
        for (what, where), n in sorted(self.syncs.items(), key=lambda x: x[0][1]):
            lines.append(f"  {n / per:4g} x {what:28s} {where}")
        return "\n".join(lines)


class PretendCuda(TorchDispatchMode):
    def __init__(self, root: str) -> None:
        super().__init__()
        self.root = os.path.realpath(root)
        self.seen = Seen(self.root)
        self.objects = 0
        self.pinned: set[int] = set()
        self.generators: dict[int, object] = {}
        self.stream = Stream()
        self._undo: list = []

    # -- what is noted ------------------------------------------------------------------------
    def where(self) -> str:
        for frame in reversed(traceback.extract_stack(limit=60)):
            ours = frame.filename.startswith(self.root) and "/site-packages/" not in frame.filename
            if ours and "tests/cuda/pretend" not in frame.filename:
                return f"{os.path.relpath(frame.filename, self.root)}:{frame.lineno}  {frame.line}"
        return "?"

    def sync(self, what: str) -> None:
        self.seen.syncs[what, self.where()] += 1

    @contextlib.contextmanager
    def watch(self, name: str = ""):
        outer, self.seen = self.seen, Seen(self.root)
        try:
            yield self.seen
        finally:
            self.seen = outer

    # -- the mode -----------------------------------------------------------------------------
    def __enter__(self):
        assert MODE.current is None
        MODE.current = self
        self._patch(torch.cuda, "_lazy_init", lambda: None)
        self._patch(torch.cuda, "current_device", lambda: CUDA0)
        self._patch(torch.cuda, "Stream", Stream)
        self._patch(torch.cuda, "stream", self._in_stream)
        self._patch(torch.cuda, "current_stream", lambda device=None: self.stream)
        self._patch(torch.cuda, "synchronize", lambda *a: self.sync("cuda.synchronize"))

        def pin(tensor, *_):
            if isinstance(tensor, Pretend):
                raise RuntimeError("cannot pin a tensor on cuda")
            copy = tensor.clone()
            self.pinned.add(copy.data_ptr())
            return copy

        self._patch(torch.Tensor, "pin_memory", pin)
        real, generators = torch.Generator, self.generators

        class Generator(real):  # type: ignore[misc, valid-type]
            def __new__(cls, device="cpu"):
                self = real.__new__(cls, "cpu")
                if torch.device(device).type == "cuda":
                    generators[self._cdata] = self
                return self

            def __init__(self, device="cpu"):
                pass

        self._patch(torch, "Generator", Generator)
        real_tensor = torch.tensor

        def tensor(data, *, dtype=None, device=None, requires_grad=False, pin_memory=False):
            made = real_tensor(data, dtype=dtype)
            if device is not None and torch.device(device).type == "cuda":
                made = made.to(device)
            return made.requires_grad_(requires_grad)

        self._patch(torch, "tensor", tensor)
        real_as_tensor = torch.as_tensor

        def as_tensor(data, dtype=None, device=None):
            if isinstance(data, torch.Tensor):
                return data.to(device=device or data.device, dtype=dtype or data.dtype)
            made = real_as_tensor(data, dtype=dtype)
            return made if device is None else made.to(device)

        self._patch(torch, "as_tensor", as_tensor)
        real_where = torch.where

        def where(condition, *both, **more):
            # C++ makes numbers into tensors on the device of the impl.
            kind = next((x.dtype for x in both if isinstance(x, torch.Tensor)), None)
            both = [
                x if isinstance(x, torch.Tensor) else torch.scalar_tensor(x, dtype=kind)
                for x in both
            ]
            return real_where(condition, *both, **more)

        self._patch(torch, "where", where)
        functional = torch.nn.functional
        real_attention = functional.scaled_dot_product_attention

        def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **more):
            if not any(isinstance(x, Pretend) for x in (q, k, v)):
                return real_attention(q, k, v, attn_mask, dropout_p, is_causal, **more)
            # The composite asks in C++ for the device of the impl and takes the plain form.
            if attn_mask is not None or dropout_p:
                raise NotImplementedError("only what the flash kernels take")
            if not q.numel():  # as the composite does on CUDA
                return (q + k + v) * 0
            if any(x.stride(-1) != 1 for x in (q, k, v)):
                raise DeviceMix("flash attention needs a contiguous last dimension")
            flash = aten._scaled_dot_product_flash_attention_for_cpu
            return flash(q, k, v, dropout_p, is_causal)[0]

        self._patch(functional, "scaled_dot_product_attention", attention)
        import torch.distributed as dist

        for name in ("all_gather_object", "broadcast_object_list", "gather_object"):
            self._patch(dist, name, self._objects(getattr(dist, name)))
        return super().__enter__()

    @contextlib.contextmanager
    def _in_stream(self, stream):
        outer, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = outer

    def _check_streams(self, name, ours):
        for x in ours:
            if x.stream is self.stream:
                continue
            if self.stream.waited.get(x.stream, 0) < x.launched:
                raise StreamRace(
                    f"{name}: the stream does not wait for {x.shape} at {self.where()}"
                )
            if self.stream not in x.recorded:
                raise StreamRace(f"{name}: no record_stream of {x.shape} at {self.where()}")

    def _objects(self, call):
        def through(*a, **k):
            self.objects += 1
            try:
                return call(*a, **k)
            finally:
                self.objects -= 1

        return through

    def _patch(self, owner, name, value):
        self._undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def __exit__(self, *exc):
        out = super().__exit__(*exc)
        for owner, name, value in reversed(self._undo):
            setattr(owner, name, value)
        self._undo.clear()
        MODE.current = None
        return out

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, types, args, kwargs or {})

    # -- one operation --------------------------------------------------------------------------
    def run(self, func, types, args, kwargs):
        name = func.name()
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        ours = [x for x in tensors if isinstance(x, Pretend)]
        device = kwargs.get("device")
        device = torch.device(device) if device is not None else None

        if name.startswith("c10d::"):
            return self._collective(func, name, tensors, ours, args, kwargs)
        if not ours and (device is None or device.type != "cuda"):
            return func(*args, **kwargs)

        self._check(func, name, tensors, ours, device, args, kwargs)
        self._check_streams(name, ours)
        self._note(func, name, device, args, kwargs, bool(ours))
        inner_args, inner_kwargs = pytree.tree_map_only(Pretend, lambda x: x.elem, (args, kwargs))
        if device is not None:
            inner_kwargs = {**inner_kwargs, "device": torch.device("cpu")}
        if inner_kwargs.get("pin_memory"):
            inner_kwargs["pin_memory"] = False
        if name == "aten::_to_copy":
            inner_kwargs = {k: v for k, v in inner_kwargs.items() if k != "non_blocking"}
        out = func(*inner_args, **inner_kwargs)
        to_cpu = name == "aten::_to_copy" and device is not None and device.type == "cpu"
        if to_cpu:
            return out
        out = pytree.tree_map_only(
            torch.Tensor, lambda x: x if isinstance(x, Pretend) else Pretend(x), out
        )
        if not ours:
            return out
        return return_and_correct_aliasing(func, args, kwargs, out)

    def _check(self, func, name, tensors, ours, device, args, kwargs):
        others = [x for x in tensors if not isinstance(x, Pretend) and x.dim() > 0]
        generator = kwargs.get("generator")
        if generator is not None and generator._cdata not in self.generators:
            raise DeviceMix(f"{name}: a CPU generator for a tensor on cuda at {self.where()}")
        if not others or not ours:
            return
        if name in ("aten::_to_copy", "aten::copy_"):
            return
        if name in INDEXING:
            # self and values have to be on one device; indices may be on the CPU.
            values = [args[0], *(args[2:3] if "put" in name else [])]
            kinds = {isinstance(x, Pretend) for x in values if x.dim() > 0}
            if len(kinds) == 1 and isinstance(args[0], Pretend):
                self.sync("CPU index of a CUDA tensor")
                return
        raise DeviceMix(
            f"{name}: "
            + ", ".join(
                f"{'cuda' if isinstance(x, Pretend) else 'cpu'}{list(x.shape)}" for x in tensors
            )
            + f" at {self.where()}"
        )

    def _note(self, func, name, device, args, kwargs, ours):
        seen = self.seen
        if name not in VIEWS_AND_METADATA:
            seen.launches[name] += 1
        if name in ("aten::_local_scalar_dense", "aten::item", "aten::equal", "aten::is_nonzero"):
            self.sync("item/bool")
        elif name in (
            "aten::nonzero",
            "aten::masked_select",
            "aten::unique_consecutive",
            "aten::_unique2",
            "aten::bincount",
            "aten::repeat_interleave.Tensor",
        ):
            self.sync(name.removeprefix("aten::"))
        elif name in INDEXING:
            indices = args[1]
            masks = [i for i in indices if i is not None and i.dtype in (torch.bool, torch.uint8)]
            if masks and "put" in name:
                value = args[2]
                scalar = value.numel() == 1 and not isinstance(value, Pretend)
                if not scalar or len([i for i in indices if i is not None]) > 1:
                    self.sync("boolean mask (index_put)")
            elif masks:
                self.sync("boolean mask (index)")
        elif name == "aten::_to_copy" and device is not None:
            from_cuda = isinstance(args[0], Pretend)
            if device.type == "cpu" and from_cuda:
                self.sync("copy to the CPU")
            elif device.type == "cuda" and not from_cuda:
                pinned = args[0].data_ptr() in self.pinned
                if not (kwargs.get("non_blocking") and pinned):
                    self.sync("copy to cuda, not pinned" if not pinned else "blocking copy to cuda")
        elif name == "aten::copy_":
            a, b = args[0], args[1]
            if isinstance(a, Pretend) != isinstance(b, Pretend):
                self.sync("copy_ between devices")

    def _collective(self, func, name, tensors, ours, args, kwargs):
        self.seen.collectives[name] += 1
        self._check_streams(name, ours)
        if not self.objects and len(ours) != len(tensors):
            raise DeviceMix(f"{name}: a CPU tensor in a collective at {self.where()}")
        for x in ours:
            if not x.elem.is_contiguous():
                raise DeviceMix(f"{name}: a tensor that is not contiguous at {self.where()}")
        inner_args, inner_kwargs = pytree.tree_map_only(Pretend, lambda x: x.elem, (args, kwargs))
        out = func(*inner_args, **inner_kwargs)
        # Outputs are the tensors that were handed in.
        back = {id(x.elem): x for x in ours}
        return pytree.tree_map_only(
            torch.Tensor,
            lambda x: back.get(id(x), Pretend(x) if type(x) is torch.Tensor else x),
            out,
        )
