"""What a command line resolves to: the paper's presets, the demo, the batch triple, the rules."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from megatron_eslm.config.run import RunConfig, parse_flags, parse_run, resolve
from megatron_eslm.engine.learning_rate import learning_rate
from megatron_eslm.errors import ConfigError
from megatron_eslm.model.arithmetic import num_params
from megatron_eslm.model.shape import ModelShape
from megatron_eslm.training.progress_report import run_summary

from ..argv import later_wins

SMALL = [
    *("--num-layers", "3", "--hidden-size", "32", "--num-attention-heads", "2"),
    *("--seq-length", "32", "--lr", "1e-3", "--micro-batch-size", "4"),
    *("--train-iters", "10", "--data-path", "x"),
]


def small(*flags: str, world: int = 1) -> RunConfig:
    return parse_run(later_wins([*SMALL, *flags]), world)


def message(*flags: str, world: int = 1, base: list[str] = SMALL) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_run(later_wins([*base, *flags]), world)
    text = str(caught.value)
    assert "\n" not in text
    return text


# Tables 4 and 5 of the paper.
@pytest.mark.parametrize(
    ("size", "layers", "heads", "width", "batch", "lr", "params"),
    [
        ("124M", 12, 12, 768, 12, 6e-4, 124e6),
        ("350M", 24, 16, 1024, 8, 6e-4, 355e6),
        ("774M", 36, 20, 1280, 8, 1e-4, 774e6),
        ("1.5B", 48, 25, 1600, 4, 1e-4, 1.558e9),
    ],
)
def test_presets_are_the_papers(
    size: str, layers: int, heads: int, width: int, batch: int, lr: float, params: float
) -> None:
    run = parse_run(["--data-path", "x", "--model-size", size], 1)
    assert not run.demo
    m, t, o = run.model, run.training, run.optimizer
    assert (m.num_layers, m.num_attention_heads, m.hidden_size) == (layers, heads, width)
    assert (m.seq_length, m.hidden_dropout, m.attention_dropout) == (1024, 0.0, 0.0)
    assert (t.micro_batch_size, t.global_batch_size) == (batch, 40 * batch)
    assert run.gradient_accumulation_steps == 40
    assert (t.eval_interval, t.eval_iters) == (1000, 200)
    assert t.train_iters == (40_000 if size == "124M" else 30_000)
    assert run.selection.eslm_adapt_interval == 1000
    assert (o.lr, o.min_lr, o.lr_warmup_iters, o.lr_decay_iters) == (lr, 6e-5, 2000, 200_000)
    assert (o.adam_beta1, o.adam_beta2, o.weight_decay, o.clip_grad) == (0.9, 0.95, 0.1, 1.0)
    assert (run.selection.selection, run.selection.eslm_alpha) == ("eslm", 0.1)
    shape = run.shape(50_257)
    assert (shape.vocab_size, shape.padded_vocab_size) == (50_257, 50_304)
    assert shape.ffn_hidden_size == 4 * width
    assert num_params(shape) == pytest.approx(params, rel=5e-3)


def test_forty_micro_steps_are_shared_over_the_ranks() -> None:
    run = parse_run(["--data-path", "x", "--model-size", "124M"], 8)
    assert run.training.global_batch_size == 480
    assert (run.gradient_accumulation_steps, run.dp_size) == (5, 8)
    assert run.deepspeed["train_batch_size"] == 480
    assert run.deepspeed["gradient_accumulation_steps"] == 5


def test_flags_win_over_the_preset() -> None:
    run = parse_run(
        [
            "--data-path",
            "x",
            "--model-size",
            "124M",
            "--num-layers",
            "2",
            "--lr",
            "1e-5",
            "--micro-batch-size",
            "3",
        ],
        1,
    )
    assert (run.model.num_layers, run.model.hidden_size) == (2, 768)
    assert (run.training.micro_batch_size, run.training.global_batch_size) == (3, 120)
    # The preset's lowest learning rate would lie above the highest.
    assert run.optimizer.min_lr == pytest.approx(1e-6)


@pytest.mark.parametrize("world", [1, 2])
def test_without_data_path_a_small_model_trains_on_the_demo_corpus(world: int) -> None:
    run = parse_run(["--eslm-alpha", "0.1", "--eslm-proxy-layers", "1"], world)
    assert run.demo and run.model.num_layers == 4
    # The same global micro-batch however many ranks there are.
    assert run.training.global_batch_size == 20
    assert run.training.micro_batch_size == 20 // world
    assert run.gradient_accumulation_steps == 1
    assert run.training.train_iters == 300


@pytest.mark.parametrize(("world", "rows"), [(2, 2), (4, 1), (8, 1)])
def test_the_demo_fills_a_pipeline(world: int, rows: int) -> None:
    run = parse_run(["--pipeline-model-parallel-size", "2"], world)
    assert (run.training.micro_batch_size, run.gradient_accumulation_steps) == (rows, 10)
    assert run.selection.eslm_scope == "step"


def test_a_bare_run_takes_defaults_from_its_own_flags() -> None:
    run = small("--train-iters", "100", world=2)
    assert (run.training.global_batch_size, run.gradient_accumulation_steps) == (8, 1)
    assert (run.optimizer.min_lr, run.optimizer.lr_warmup_iters) == (pytest.approx(1e-4), 5)
    assert (run.optimizer.lr_decay_iters, run.training.eval_interval) == (100, 10)
    assert (run.engine.zero_stage, run.dtype) == (0, torch.float32)
    assert run.model.ffn_hidden_size == run.shape(257).ffn_hidden_size == 128


def test_half_precision_takes_zero_1_and_float32_accumulation() -> None:
    run = small("--bf16")
    assert (run.engine.zero_stage, run.dtype) == (1, torch.bfloat16)
    assert run.deepspeed["bf16"]["enabled"] and not run.deepspeed["fp16"]["enabled"]
    assert run.deepspeed["data_types"]["grad_accum_dtype"] == "fp32"
    assert small("--bf16", "--zero-stage", "2").engine.zero_stage == 2
    assert run.to_dict()["engine"]["bf16"] is True


def test_batch_triple() -> None:
    run = small("--global-batch-size", "24", world=3)
    assert run.gradient_accumulation_steps == 2
    text = message("--global-batch-size", "20", world=3)
    assert "--global-batch-size 20" in text and "--micro-batch-size 4 x 3" in text
    assert "= 12; change one of them" in text


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        # ModelOptions
        ("--num-layers 0", ["--num-layers 0 must be 1 or more"]),
        ("--hidden-size -1", ["--hidden-size -1 must be 1 or more"]),
        ("--num-attention-heads 0", ["--num-attention-heads 0 must be 1 or more"]),
        ("--ffn-hidden-size 0", ["--ffn-hidden-size 0 must be 1 or more"]),
        ("--seq-length 1", ["--seq-length 1 must be 2 or more"]),
        ("--make-vocab-size-divisible-by 0", ["--make-vocab-size-divisible-by 0 must be 1"]),
        ("--hidden-dropout 1", ["--hidden-dropout 1 is outside [0, 1)"]),
        ("--attention-dropout -0.1", ["--attention-dropout -0.1 is outside [0, 1)"]),
        # SelectionOptions
        ("--eslm-alpha 1", ["--eslm-alpha 1 is outside [0, 1)"]),
        ("--eslm-alpha -0.1", ["--eslm-alpha -0.1 is outside [0, 1)"]),
        ("--eslm-alpha nan", ["--eslm-alpha: nan is not a finite number"]),
        ("--eslm-proxy-layers 0", ["--eslm-proxy-layers 0 must be 1 or more"]),
        ("--eslm-proxy-stride 0", ["--eslm-proxy-stride 0 must be 1 or more"]),
        ("--max-nonfinite-steps 0", ["--max-nonfinite-steps 0 must be 1 or more"]),
        ("--selection rho", ["--selection: 'rho' is not one of clm, eslm,", "Did you mean rho1?"]),
        # DataOptions
        ("--num-workers -1", ["--num-workers -1 must be 0 or more"]),
        ("--max-epochs 0", ["--max-epochs 0 must be above 0"]),
        # TrainingOptions
        ("--train-iters 0", ["--train-iters 0 must be 1 or more"]),
        ("--micro-batch-size 0", ["--micro-batch-size 0 must be 1 or more"]),
        ("--global-batch-size -8", ["--global-batch-size -8 must be 1 or more"]),
        (
            "--rampup-batch-size 4 4",
            ["--rampup-batch-size 4 4 must be three numbers", "16 16 100000"],
        ),
        ("--rampup-batch-size 4 0 9", ["--rampup-batch-size 0 must be 1 or more"]),
        ("--rampup-batch-size 4 4 x", ["--rampup-batch-size", "'x' is not a whole number"]),
        (
            "--global-batch-size 16 --rampup-batch-size 6 2 9",
            ["batches of 6 sequences", "--micro-batch-size 4 x 1 data-parallel ranks = 4"],
        ),
        ("--skip-samples 5:9 9-12", ["--skip-samples 9-12 is not a range", "1000:1200"]),
        ("--skip-samples 9:5", ["--skip-samples 9:5 is empty"]),
        ("--log-interval 0", ["--log-interval 0 must be 1 or more"]),
        ("--eval-interval 0", ["--eval-interval 0 must be 1 or more"]),
        ("--eval-iters -1", ["--eval-iters -1 must be 0 or more"]),
        ("--exit-interval 0", ["--exit-interval 0 must be 1 or more"]),
        ("--seed -1", ["--seed -1 is outside [0, 4294967296)"]),
        # OptimizerOptions
        ("--lr -1", ["--lr -1 must be 0 or more"]),
        ("--lr inf", ["--lr: inf is not a finite number"]),
        ("--min-lr -1", ["--min-lr -1 must be 0 or more"]),
        ("--lr-warmup-iters -1", ["--lr-warmup-iters -1 must be 0 or more"]),
        ("--lr-decay-iters -1", ["--lr-decay-iters -1 must be 0 or more"]),
        ("--weight-decay -1", ["--weight-decay -1 must be 0 or more"]),
        ("--adam-eps 0", ["--adam-eps 0 must be above 0"]),
        ("--clip-grad -1", ["--clip-grad -1 must be 0 or more"]),
        ("--adam-beta1 1", ["--adam-beta1 1 is outside [0, 1)"]),
        ("--adam-beta2 -0.5", ["--adam-beta2 -0.5 is outside [0, 1)"]),
        ("--min-lr 1", ["--min-lr 1 is above --lr 0.001"]),
        (
            "--lr-warmup-iters 10 --lr-decay-iters 10",
            ["--lr-warmup-iters 10", "--lr-decay-iters 10", "change one"],
        ),
        ("--exit-duration-minutes 0", ["--exit-duration-minutes 0 is outside (0, 1000000]"]),
        ("--exit-duration-minutes nan", ["--exit-duration-minutes: nan is not a finite number"]),
        ("--exit-signal KILL", ["--exit-signal KILL is not one of USR1, USR2, HUP, XCPU"]),
        # EngineOptions
        ("--bf16 --fp16", ["--bf16 and --fp16 exclude each other"]),
        ("--zero-stage 4", ["--zero-stage 4 is not one of 0, 1, 2, 3"]),
        (
            "--distributed-timeout-minutes 0",
            ["--distributed-timeout-minutes 0 is outside (0, 1000000]"],
        ),
        (
            "--rendezvous-timeout-minutes 0",
            ["--rendezvous-timeout-minutes 0 is outside (0, 1000000]"],
        ),
        (
            "--rendezvous-timeout-minutes inf",
            ["--rendezvous-timeout-minutes: inf is not a finite number"],
        ),
        ("--cpu-offload", ["--cpu-offload", "--zero-stage 0", "Use --zero-stage 1, 2 or 3"]),
        ("--cpu-offload --zero-stage 0", ["--cpu-offload", "--zero-stage 0"]),
        (
            "--tensor-model-parallel-size 0",
            ["--tensor-model-parallel-size 0", "must be 1 or more"],
        ),
        # CheckpointOptions, ReportOptions
        ("--save-interval 0", ["--save-interval 0 must be 1 or more"]),
        ("--reset-optimizer", ["--reset-optimizer needs a checkpoint", "Give --load"]),
        ("--keep-last -1", ["--keep-last -1 must be 0 or more"]),
        ("--peak-tflops 0", ["--peak-tflops 0 must be above 0"]),
        ("--finetune", ["--finetune starts from the weights", "--load is not set. Give --load"]),
        (
            "--finetune --load a --save ./a",
            ["--finetune starts a new run from --load a", "--save ./a", "Save to another folder"],
        ),
        # Across components
        (
            "--num-attention-heads 5",
            ["--hidden-size 32 is not a multiple of --num-attention-heads 5", "change one"],
        ),
        ("--eslm-proxy-layers 3", ["--eslm-proxy-layers 3", "smaller than --num-layers 3"]),
        ("--eslm-proxy-stride 33", ["--eslm-proxy-stride 33", "--seq-length 32"]),
        ("--eslm-alhpa 0.1", ["There is no option --eslm-alhpa", "Did you mean --eslm-alpha?"]),
    ],
)
def test_what_cannot_be_is_refused_by_name(flags: str, parts: list[str]) -> None:
    text = message(*flags.split())
    for part in parts:
        assert part in text


def test_a_deep_proxy_is_no_matter_where_nothing_uses_it() -> None:
    for flags in (["--selection", "clm"], ["--selection", "random"], ["--eslm-level", "token"]):
        assert small("--eslm-proxy-layers", "3", *flags).model.num_layers == 3


ASKED = ("--num-layers", "--hidden-size", "--num-attention-heads", "--seq-length",
         "--micro-batch-size", "--train-iters", "--lr")  # fmt: skip
SIZES = "--model-size 124M|350M|774M|1.5B|llama-125M|llama-350M|llama-1B|llama-3B|llama-8B"


def without(flags: tuple[str, ...]) -> list[str]:
    pairs = zip(SMALL[::2], SMALL[1::2], strict=True)
    return [word for pair in pairs if pair[0] not in flags for word in pair]


@pytest.mark.parametrize("flag", ASKED)
def test_what_nothing_determines_is_asked_for(flag: str) -> None:
    text = message(base=without((flag,)))
    assert text.startswith(f"{flag} is not set and follows from nothing else. Give it, or {SIZES}")


def test_all_that_is_missing_is_named_at_once() -> None:
    text = message(base=["--data-path", "x"])
    listed = f"{', '.join(ASKED[:-1])} and {ASKED[-1]}"
    assert text == (
        f"{listed} are not set and follow from nothing else. Give them, or {SIZES}, or --load a "
        "checkpoint of that shape."
    )
    text = message(base=without(("--train-iters", "--lr")))
    assert text == (
        f"--train-iters and --lr are not set and follow from nothing else. Give them, or {SIZES}."
    )


STORED = ModelShape(
    num_layers=5,
    hidden_size=48,
    num_attention_heads=3,
    ffn_hidden_size=100,
    max_position_embeddings=24,
    vocab_size=257,
    padded_vocab_size=384,
    layernorm_epsilon=1e-6,
)
"""Of a checkpoint."""


@pytest.mark.parametrize(
    ("words", "unlike"),
    [
        ("--data-path x --micro-batch-size 4 --train-iters 10 --lr 1e-3", {}),
        ("", {}),  # the demo's own shape gives way
        ("--model-size 124M --ffn-hidden-size 96", None),
        ("--num-layers 7 --layernorm-epsilon 1e-5", {"num_layers": 7, "layernorm_epsilon": 1e-5}),
    ],
)
def test_a_checkpoint_brings_the_shape_that_is_not_given(words: str, unlike: dict | None) -> None:
    found = resolve(world_size=1, stored=STORED, **parse_flags(words.split())).shape(257)
    if unlike is None:
        assert (found.num_layers, found.ffn_hidden_size) == (12, 96)
        assert (found.max_position_embeddings, found.layernorm_epsilon) == (1024, 1e-6)
    else:
        assert found == dataclasses.replace(STORED, **unlike)


def test_a_shape_that_is_the_default_is_not_told_apart_from_it() -> None:
    """Runs are compared by the flags that they set: one that is continued is the same run."""
    plain = dataclasses.replace(STORED, ffn_hidden_size=192, layernorm_epsilon=1e-5)
    run = resolve(world_size=1, stored=plain, **parse_flags([]))
    assert "ffn_hidden_size" not in run_summary(run) and run.shape(257) == plain
    other = resolve(world_size=1, stored=STORED, **parse_flags([]))
    assert run_summary(other)["ffn_hidden_size"] == STORED.ffn_hidden_size != 192


@pytest.mark.parametrize("size", [[], ["--model-size", "124M"]], ids=["own", "preset"])
@pytest.mark.parametrize("decay", [None, 0, 1, 2, 30, 300_000])
@pytest.mark.parametrize("warmup", [None, 0, 1, 10, 250_000])
@pytest.mark.parametrize("iters", [None, 1, 2, 19, 20, 400])
def test_what_nobody_gave_of_the_schedule_fits(
    iters: int | None, warmup: int | None, decay: int | None, size: list[str]
) -> None:
    if iters is None and not size:
        iters = 10
    given = {"train-iters": iters, "lr-warmup-iters": warmup, "lr-decay-iters": decay}
    flags = [w for name, n in given.items() if n is not None for w in (f"--{name}", str(n))]
    base = ["--data-path", "x", *size] if size else without(("--train-iters",))
    if warmup is not None and decay is not None and warmup >= max(1, decay):
        assert f"--lr-warmup-iters {warmup} must end before" in message(*flags, base=base)
        return
    o = parse_run([*base, *flags], 1).optimizer
    assert warmup in (None, o.lr_warmup_iters) and decay in (None, o.lr_decay_iters)
    assert o.lr_warmup_iters < o.lr_decay_iters or o.lr_warmup_iters == 0
    rates = [learning_rate(o, iteration) for iteration in (0, 1, 5, iters or 0)]
    assert all(0 < rate <= o.lr for rate in rates)


@pytest.mark.parametrize(
    ("flags", "schedule"),
    [
        ("--train-iters 1", (0, 1)),
        ("--train-iters 19", (1, 19)),
        ("--train-iters 100", (5, 100)),
        ("--train-iters 100 --lr-decay-iters 40", (2, 40)),
        ("--train-iters 100 --lr-decay-iters 400", (5, 400)),
        ("--train-iters 10 --lr-warmup-iters 10", (10, 11)),
        ("--model-size 124M --lr-decay-iters 1000", (50, 1000)),
        ("--model-size 124M --train-iters 100", (2000, 200_000)),
    ],
)
def test_schedules(flags: str, schedule: tuple[int, int]) -> None:
    words = flags.split()
    o = parse_run([*without((*words, *(ASKED if "124M" in words else ()))), *words], 1).optimizer
    assert (o.lr_warmup_iters, o.lr_decay_iters) == schedule


@pytest.mark.parametrize(
    ("flags", "schedule"),
    [
        ("--train-iters 100", (5, 100, 10)),
        ("--train-iters 1", (0, 1, 1)),
        ("--train-iters 100 --lr-wsd-decay-iters 30", (5, 100, 30)),
        ("--train-iters 100 --lr-wsd-decay-iters 98", (2, 100, 98)),
        ("--train-iters 100 --lr-decay-iters 400", (5, 400, 40)),
        # The preset's 200,000 steps of decay are the cosine's.
        ("--model-size 124M --train-iters 40000", (2000, 40_000, 4000)),
    ],
)
def test_schedules_of_wsd(flags: str, schedule: tuple[int, int, int]) -> None:
    words = [*flags.split(), "--lr-decay-style", "WSD"]
    o = parse_run([*without((*words, *(ASKED if "124M" in words else ()))), *words], 1).optimizer
    assert (o.lr_warmup_iters, o.lr_decay_iters, o.lr_wsd_decay_iters) == schedule


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--lr-wsd-decay-iters 5", "--lr-wsd-decay-iters 5 has no meaning with"),
        ("--lr-wsd-decay-style linear", "--lr-wsd-decay-style linear has no meaning with"),
        ("--lr-decay-style constant --lr-decay-iters 9", "--lr-decay-iters 9 has no meaning with"),
        (
            "--lr-decay-style WSD --lr-wsd-decay-iters 96 --lr-warmup-iters 5 --lr-decay-iters 100",
            "--lr-wsd-decay-iters 96 is longer than the 95 steps between",
        ),
    ],
)
def test_decays_that_cannot_be(flags: str, says: str) -> None:
    assert says in message(*flags.split())


def test_fp16_where_the_processor_cannot() -> None:
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().is_fp16_supported():
        assert small("--fp16").dtype == torch.float16
    else:
        assert "--fp16 is not supported by this processor; use --bf16" in message("--fp16")


def test_a_warm_up_longer_than_the_run_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        parse_run(["--data-path", "x", "--model-size", "124M", "--train-iters", "100"], 1)
    assert "--train-iters 100 ends before the warm-up of --lr-warmup-iters 2000" in caplog.text
