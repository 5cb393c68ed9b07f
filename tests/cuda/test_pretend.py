"""The model on a CUDA device that is not there: no mix of devices, and few waits of the host.

Each case runs a micro-step, forward and backward, on the CPU and on the pretended device. Loss,
gradients, kept sets and evaluation are the same to the bit, and the host waits for the device at
most as often as the table says. What a wait is: pretend.py.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from megatron_eslm.data.batch import Batch
from megatron_eslm.data.device_copies import DeviceCopies
from megatron_eslm.frozen.model import FrozenModel
from megatron_eslm.model.gpt import GPT, ModelSettings, bare_gpt, build_gpt
from megatron_eslm.model.model_options import Lora
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.objectives.causal_lm import CausalLM
from megatron_eslm.objectives.distillation import Distillation
from megatron_eslm.objectives.uncertainty import Uncertainty
from megatron_eslm.ops.head.statistics import VocabShard, head_statistics
from megatron_eslm.parallel.mesh import Mesh, build_mesh
from megatron_eslm.selection.build import build_policy
from megatron_eslm.selection.selection_options import SelectionOptions
from megatron_eslm.selection.state import Peers, Recorder, SelectionRecord, SelectionState
from megatron_eslm.training.gradient_alignment import gradient_products

from ..harness import run_ranks
from .pretend import CUDA0, DeviceMix, Pretend, PretendCuda, Seen, StreamRace

ROOT = str(Path(__file__).parents[2])
SHAPE = ModelShape(
    num_layers=4,
    hidden_size=32,
    num_attention_heads=2,
    ffn_hidden_size=64,
    max_position_embeddings=16,
    vocab_size=93,
    padded_vocab_size=96,
)
ROWS = 6
ALL = ("one", "dp", "tp", "sp")


@dataclass(frozen=True)
class Case:
    """Options of a micro-step, the layouts that allow it, and how often the host may wait in it."""

    options: dict[str, Any]
    waits: dict[str, int] = field(default_factory=dict)
    """By layout; 0 where a layout is not named."""
    layouts: tuple[str, ...] = ALL


# Where rows or tokens are kept by data-parallel ranks together, each rank has to ask how many are
# its own. So has one rank alone, where rows differ in the number of labels that count.
TOKENS = {"dp": 1}
BOTH = {"one": 1, "dp": 2, "tp": 1, "sp": 1}
DROPOUT = {"hidden_dropout": 0.2, "attention_dropout": 0.1}
CASES = {
    "clm": Case({"selection": "clm"}),
    "clm, logits recomputed": Case({"selection": "clm", "settings": {"keep_logits": False}}),
    "clm, checkpoints": Case(
        {"selection": "clm", "settings": {"activation_checkpoint_interval": 2}}
    ),
    "clm, hidden dropout": Case({"selection": "clm", "settings": {"hidden_dropout": 0.2}}),
    "clm, attention dropout": Case({"selection": "clm", "settings": {"attention_dropout": 0.2}}),
    "clm, lora": Case({"selection": "clm", "settings": {"lora": Lora(2, 4.0)}}),
    "eslm": Case({}, BOTH),
    "eslm, all labels count": Case({"masked": False}, {"dp": 2}),
    "eslm, ahead of the step": Case({"eslm_scope": "step"}, TOKENS),
    "eslm, alpha 0": Case({"alpha": 0.0}),
    "eslm entropy": Case({"eslm_score": "entropy"}, BOTH),
    "eslm stride 4": Case({"eslm_proxy_stride": 4}, BOTH),
    "eslm depth 2, logits recomputed": Case(
        {"eslm_proxy_layers": 2, "settings": {"keep_logits": False}}, BOTH
    ),
    "eslm instance": Case({"eslm_level": "instance"}, BOTH),
    "eslm token": Case({"eslm_level": "token"}, TOKENS),
    "eslm, last MLP kept": Case({"settings": {"last_mlp_kept": True}}, BOTH, ALL[:3]),
    "eslm, dropout": Case({"settings": DROPOUT}, {"one": 2, "dp": 3, "tp": 2, "sp": 2}),
    "random": Case({"selection": "random"}, BOTH),
    "rho1, stored losses": Case({"selection": "rho1"}, TOKENS),
    "rho1, reference model": Case({"selection": "rho1", "reference": True}, layouts=("one",)),
    "uncertainty": Case({"selection": "uncertainty", "objective": "uncertainty"}, layouts=ALL[:2]),
    "distill dense": Case({"selection": "clm", "objective": "distill"}),
    "distill eslm": Case({"objective": "distill"}, BOTH),
    "greats": Case({"selection": "greats"}, {"one": 7}, ("one",)),
}


def make_batch(
    positions: int, seed: int, *, rows: int = ROWS, reference: bool = False, masked: bool = True
) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(SHAPE.vocab_size, (rows, positions + 1), generator=rng)
    valid = torch.ones(rows, positions, dtype=torch.bool)
    if masked:
        valid[1, 7:] = False
        valid[2] = False
    losses = torch.rand(rows, positions, generator=rng) * 5 if reference else torch.empty(rows, 0)
    return Batch.of(tokens, valid, tokens[:, 1:].contiguous(), losses)


def frozen(mesh: Mesh, device: torch.device) -> FrozenModel:
    torch.manual_seed(0)
    model = bare_gpt(SHAPE, mesh)
    for p in model.parameters():
        p.data.normal_(0, 0.2)
    return FrozenModel(model.to(device))


class Losses:
    """A reference model's losses, as frozen.reference computes them."""

    def __init__(self, model: FrozenModel) -> None:
        self.model = model

    def __call__(self, batch: Batch) -> torch.Tensor:
        hidden = self.model.hidden(batch.tokens_MU)
        shard = VocabShard.of(SHAPE.vocab_size, SHAPE.padded_vocab_size, kernel="torch")
        labels = batch.labels_MT.t().flatten()
        found = head_statistics(
            hidden.flatten(0, 1), self.model.weight_VE, labels, shard, entropy=False
        )
        return found.loss_N.view(hidden.shape[:2]).t()


def build(mesh: Mesh, device: torch.device, options: dict[str, Any]) -> tuple[GPT, Recorder]:
    options = dict(options)
    parallel_state._GLOBAL_MEMORY_BUFFER = None  # of the run before, on its device
    objective: Any = {
        None: CausalLM,
        "distill": lambda: Distillation(frozen(mesh, device), weight=0.5, temperature=1.5),
        "uncertainty": lambda: Uncertainty(frozen(mesh, device)),
    }[options.pop("objective", None)]()
    settings, alpha = options.pop("settings", {}), options.pop("alpha", 0.3)
    options.pop("reference", None)
    options.pop("masked", None)
    selection = SelectionOptions(eslm_alpha=alpha, **options)
    state = SelectionState(alpha=selection.initial_alpha, iteration=3)
    group = mesh.dp_group if mesh.dp_size > 1 else None
    policy = build_policy(selection, state, Peers(mesh.dp_rank, mesh.dp_size, group), seed=1)
    recorder = Recorder()
    model = build_gpt(
        SHAPE,
        mesh,
        policy,
        recorder,
        objective,
        ModelSettings(head_kernel="torch", **settings),
        seed=1,
        init_std=0.3,
    )
    return model.to(device), recorder


Outcome = tuple[float, dict[str, torch.Tensor | None], SelectionRecord, torch.Tensor]


def micro_step(
    mesh: Mesh, options: dict[str, Any], device: torch.device, cuda: PretendCuda | None, seq: int
) -> tuple[Outcome, Seen | None]:
    model, recorder = build(mesh, device, options)
    greats, rho1 = (options.get("selection") == name for name in ("greats", "rho1"))
    live = options.get("reference", False)
    masked = options.get("masked", True)
    read = make_batch(seq, mesh.dp_rank, reference=rho1 and not live, masked=masked)
    valid = make_batch(seq, 9, rows=3, masked=False)
    if greats:
        valid = Batch(*(x.to(device) for x in valid))
    if live:
        model.policy.reference = Losses(frozen(mesh, device))
    if cuda is not None:
        *tensors, counts = read
        read = Batch(*DeviceCopies(device)(x.pin_memory() for x in tensors), counts)
    model.train()
    with cuda.watch() if cuda is not None else contextlib.nullcontext() as seen:
        if greats:
            products = gradient_products(model, read, valid)
            model.policy.choose(products, 0.1, read)  # type: ignore[attr-defined]
        loss = model(*read)
        loss.backward()
    (record,) = recorder.take()
    gradients = {
        name: None if p.grad is None else p.grad.cpu() for name, p in model.named_parameters()
    }
    gradients = {n: g.elem if isinstance(g, Pretend) else g for n, g in gradients.items()}
    model.eval()
    with torch.no_grad():
        evaluated = model(*read).cpu()
    return (loss.item(), gradients, record.cpu(), evaluated), seen


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(torch.nan_to_num(a.float(), -7.0), torch.nan_to_num(b.float(), -7.0))


def check(mesh: Mesh, name: str, layout: str) -> str | None:
    """What is wrong with a case; None where nothing is."""
    options, most = CASES[name].options, CASES[name].waits.get(layout, 0)
    if layout == "sp":
        options = {
            **options,
            "settings": {**options.get("settings", {}), "sequence_parallel": True},
        }
    seq = 14 if layout in ("tp", "sp") else 15
    cpu, _ = micro_step(mesh, options, torch.device("cpu"), None, seq)
    try:
        with PretendCuda(ROOT) as cuda:
            gpu, seen = micro_step(mesh, options, CUDA0, cuda, seq)
    except DeviceMix as mix:
        return f"{name}: {mix}"
    equal = cpu[0] == gpu[0] and all(same(cpu[1][n], gpu[1][n]) for n in cpu[1])
    equal &= same(cpu[2].instance_kept_M, gpu[2].instance_kept_M)
    equal &= same(cpu[2].token_kept_MT, gpu[2].token_kept_MT) and same(cpu[3], gpu[3])
    if not equal:
        return f"{name}: differs from the CPU"
    assert seen is not None
    if seen.num_syncs > most:
        return f"{name}: {seen.num_syncs} waits of the host, {most} at most\n{seen.report()}"
    return None


@pytest.mark.parametrize("layout", ALL)
def test_no_mix_of_devices_and_few_waits(layout: str) -> None:
    names = [name for name, case in CASES.items() if layout in case.layouts]

    def on_rank(rank: int) -> list[str]:
        mesh = build_mesh(tp=2 if layout in ("tp", "sp") else 1)
        return [wrong for name in names if (wrong := check(mesh, name, layout)) is not None]

    for wrong in run_ranks(1 if layout == "one" else 2, on_rank):
        assert not wrong, "\n".join(wrong)


def test_a_tensor_on_the_wrong_device_is_found() -> None:
    with PretendCuda(ROOT), pytest.raises(DeviceMix, match="test_pretend"):
        torch.ones(3, device=CUDA0) + torch.ones(3)


def test_waits_are_counted_by_line() -> None:
    with PretendCuda(ROOT) as cuda, cuda.watch() as seen:
        x = torch.ones(3, device=CUDA0)
        assert x.sum().item() == 3.0
        x.nonzero()
        torch.tensor([1.0], device=CUDA0)
    assert seen.num_syncs == 3, seen.report()


def test_copies_are_made_in_a_stream_that_the_computation_waits_for() -> None:
    with PretendCuda(ROOT) as cuda, cuda.watch() as seen:
        copies, host = DeviceCopies(CUDA0), torch.arange(3).pin_memory()
        first, second = copies([host, host])
        assert first.device == CUDA0 and first.stream is second.stream is not cuda.stream
        (first + second).add_(first)
        (third,) = copies([host])
        assert third[1:].add(1).elem.tolist() == [2, 3]
        third.recorded.clear()
        with pytest.raises(StreamRace, match="record_stream"):
            third + 1
        first.launched = first.stream.clock + 1
        with pytest.raises(StreamRace, match="does not wait"):
            first + 1
    assert seen.num_syncs == 0, seen.report()
    assert DeviceCopies(torch.device("cpu"))([host])[0] is host
