"""Which layouts are found: those that the rules allow and that fit, as training takes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from megatron_eslm.config.run import parse_run
from megatron_eslm.cost.memory import estimate_memory
from megatron_eslm.cost.of_run import step_work
from megatron_eslm.errors import ConfigError
from megatron_eslm.model.arithmetic import num_params
from megatron_eslm.planning.hardware import GIB, Machine, Overrides, assumptions, machine_of
from megatron_eslm.planning.request import GPT2_VOCAB_SIZE, SIZES, Layout, Request, with_layout
from megatron_eslm.planning.search import Pins, divisors, layouts, plan_layout, search
from tests.test_examples import bytes_a_gpu

A100 = machine_of("a100-80g", "infiniband-hdr")


@pytest.mark.parametrize(
    "request_",
    [
        Request(model_size="1.5B", gpus=8, global_batch_size=32),
        Request(model_size="124M", gpus=12, selection="rho1", global_batch_size=48),
        Request(model_size="6.7B", gpus=16, selection="random", global_batch_size=32),
    ],
    ids=lambda r: r.model_size,
)
def test_all_plans_are_runs(request_: Request) -> None:
    plans = search(request_, A100)
    seconds = [plan.seconds_of_a_token for plan in plans]
    assert seconds == sorted(seconds) and len(plans) > 10
    for plan in plans:
        layout, setting = plan.layout, plan.cost.setting
        run = parse_run([*request_.flags, *layout.flags], request_.gpus)
        assert layout.tp * layout.pp * layout.dp == request_.gpus
        assert (run.dp_size, run.gradient_accumulation_steps) == (
            layout.dp,
            setting.run.gradient_accumulation_steps,
        )
        assert step_work(run) == setting.work
        assert setting.memory.total <= A100.budget_bytes
        if layout.dp == 1 or layout.pp > 1:
            assert bytes_a_gpu(run) == setting.memory.total
            memory = estimate_memory(run, setting.shape, setting.plan, setting.flops)
            assert memory == setting.memory


def test_what_the_rules_refuse_is_not_there() -> None:
    request = Request(model_size="1.5B", gpus=8, global_batch_size=32)
    found = {plan.layout for plan in search(request, A100)}
    tried = set(layouts(request, A100, Pins()))
    assert {layout.tp for layout in tried} == {1, 2, 4, 8}
    assert {layout.tp for layout in found} == {1}  # 25 heads
    assert not any(layout.pp > 1 and layout.zero_stage > 1 for layout in found)
    assert not any(layout.zero_stage == 0 for layout in found)  # bf16
    refused = Layout(tp=1, pp=2, dp=4, micro_batch_size=4, zero_stage=2, checkpoint_interval=0)
    with pytest.raises(ConfigError, match="--zero-stage 2 needs"):
        plan_layout(request, refused, A100)
    for layout in tried - found:
        refusal = None
        try:
            run = with_layout(request.options(), layout)
        except ConfigError as error:
            refusal = error
        if refusal is None:
            assert bytes_a_gpu(run) > A100.budget_bytes
        else:
            with pytest.raises(ConfigError):
                parse_run([*request.flags, *layout.flags], 8)


def test_not_the_step_that_drops_most_by_rounding() -> None:
    request = Request(model_size="124M", gpus=1, global_batch_size=32, eslm_scope="global")
    plans = search(request, A100, Pins(zero_stage=1, activation_checkpoint_interval=0))
    quickest = min(plans, key=lambda plan: plan.cost.seconds)
    assert quickest.cost.setting.work.tokens_trained < plans[0].cost.setting.work.tokens_trained


def test_pins() -> None:
    request = Request(model_size="124M", gpus=8, global_batch_size=64)
    pins = Pins(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        micro_batch_size=4,
        zero_stage=1,
        activation_checkpoint_interval=1,
    )
    (plan,) = search(request, A100, pins)
    assert plan.layout == Layout(
        tp=2, pp=2, dp=2, micro_batch_size=4, zero_stage=1, checkpoint_interval=1
    )
    assert "sequence-parallel" in " ".join(plan.layout.flags)


def test_larger_shapes_are_what_they_are_called() -> None:
    for name, params in (("6.7B", 6.7e9), ("13B", 12.9e9)):
        one = Layout(tp=1, pp=1, dp=1, micro_batch_size=1, zero_stage=1, checkpoint_interval=0)
        run = with_layout(Request(model_size=name, gpus=1).options(), one)
        assert num_params(run.shape(GPT2_VOCAB_SIZE)) == pytest.approx(params, rel=0.01)
        assert run.model.seq_length == 2048
    assert SIZES["1.5B"].global_batch_size == 160


def small(**change: float) -> Machine:
    return dataclasses.replace(A100, **change)


REFUSALS: dict[str, tuple[Callable[[], object], str]] = {
    "gpu": (
        lambda: machine_of("v100", "infiniband-hdr"),
        "--gpu v100 is not one of a100-40g, a100-80g.*--peak-tflops",
    ),
    "interconnect": (
        lambda: machine_of("a100-80g", "token-ring"),
        "--interconnect token-ring is not one of infiniband-hdr",
    ),
    "link": (lambda: machine_of("a100-80g", "infiniband-hdr", intra="usb"), "--intra-link usb"),
    "override": (lambda: Overrides(peak_tflops=0.0), "--peak-tflops 0 must be above 0"),
    "nan": (lambda: Overrides(memory_gib=float("nan")), "--memory-gib nan"),
    "efficiency": (
        lambda: Overrides(efficiency=70.0),
        "--efficiency 70 is outside \\(0, 1\\]: a share",
    ),
    "size": (lambda: Request(model_size="2B", gpus=8), "--model-size 2B is not one of 124M"),
    "selection": (
        lambda: Request(model_size="124M", gpus=8, selection="greats"),
        "--selection greats .* clm, eslm, random, rho1",
    ),
    "gpus": (lambda: Request(model_size="124M", gpus=0), "--gpus 0 must be 1 or more"),
    "alpha": (
        lambda: search(Request(model_size="124M", gpus=1, alpha=1.0), A100),
        "--eslm-alpha 1 is outside",
    ),
    "groups": (
        lambda: search(
            Request(model_size="124M", gpus=6), A100, Pins(tensor_model_parallel_size=4)
        ),
        "6 processes cannot be divided .* change the number of processes",
    ),
    "batch": (
        lambda: search(Request(model_size="124M", gpus=31), A100),
        "--global-batch-size 480 cannot be divided over --gpus 31 .* Use 30 GPUs.* of 31",
    ),
    "rules": (
        lambda: search(
            Request(model_size="1.5B", gpus=2), A100, Pins(tensor_model_parallel_size=2)
        ),
        "--num-attention-heads 25 is not a multiple",
    ),
    "memory": (
        lambda: search(Request(model_size="13B", gpus=2), A100),
        "--model-size 13B does not fit on --gpus 2: .* needs .* GiB per GPU, but a100-80g.* leaves "
        "72.0 of 80 GiB. Use more GPUs",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    call, message = REFUSALS[name]
    with pytest.raises(ConfigError, match=message):
        call()


def test_overrides() -> None:
    o = Overrides(
        peak_tflops=100.0,
        memory_gib=10.0,
        efficiency=0.5,
        intra_gb_per_s=1.0,
        inter_gb_per_s=2.0,
        latency_us=50.0,
    )
    machine = machine_of("h100-80g", "ethernet-100g", overrides=o)
    assert (machine.peak_flops, machine.efficiency) == (1e14, 0.5)
    assert (machine.memory_bytes, machine.intra_bandwidth) == (10 * GIB, 1e9)
    assert machine.node_bandwidth == 2e9
    assert [p.hop_inter for p in machine.protocols] == pytest.approx([50e-6, 50e-6])
    assert "50% of the peak" in assumptions(machine)[0]
    assert machine_of("h100-80g", "infiniband-ndr").node_bandwidth == 8 * 50e9


def test_divisors() -> None:
    assert divisors(12) == [1, 2, 3, 4, 6, 12] and divisors(12, 5) == [1, 2, 3, 4]
