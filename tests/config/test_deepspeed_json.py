"""A user's DeepSpeed JSON: what it decides, where it must agree, what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_eslm.config.deepspeed_json import blamed_on
from megatron_eslm.config.run import RunConfig, parse_run
from megatron_eslm.errors import ConfigError

BASE = [
    *("--num-layers", "3", "--hidden-size", "32", "--num-attention-heads", "2"),
    *("--seq-length", "32", "--lr", "1e-3", "--train-iters", "10", "--data-path", "x"),
]

Parse = Callable[..., RunConfig]


@pytest.fixture
def parse(tmp_path: Path) -> Parse:
    def parse(content: Any, *flags: str, world: int = 1) -> RunConfig:
        file = tmp_path / "ds.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return parse_run([*BASE, "--deepspeed_config", str(file), *flags], world)

    return parse


def refused(parse: Parse, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(*args, **kwargs)
    return str(caught.value)


def test_the_file_fills_what_no_flag_says(parse: Parse) -> None:
    run = parse(
        {
            "_comment": "dropped",
            "train_micro_batch_size_per_gpu": 2,
            "train_batch_size": 8,
            "gradient_clipping": 0.5,
            "bf16": {"enabled": True, "check_grad_overflow": False},
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 1.0}},
            "csv_monitor": {"enabled": True, "output_path": "out"},
        },
        world=2,
    )
    assert (run.training.micro_batch_size, run.training.global_batch_size) == (2, 8)
    assert run.gradient_accumulation_steps == 2
    assert run.optimizer.clip_grad == 0.5
    assert run.engine.bf16 and run.engine.zero_stage == 2 and run.engine.cpu_offload
    full = run.deepspeed
    assert full["gradient_accumulation_steps"] == 2 and full["gradient_clipping"] == 0.5
    assert full["bf16"]["enabled"] and not full["bf16"]["check_grad_overflow"]
    assert full["timers"] == {"throughput": {"enabled": False}}
    assert full["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "ratio": 1.0}
    assert full["csv_monitor"]["enabled"] and "_comment" not in full


def test_auto_leaves_it_to_the_flags(parse: Parse) -> None:
    run = parse(
        {
            "train_micro_batch_size_per_gpu": "auto",
            "train_batch_size": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "zero_optimization": {"stage": "auto"},
        },
        *("--micro-batch-size", "4", "--global-batch-size", "8", "--bf16", "--zero-stage", "3"),
    )
    assert "auto" not in json.dumps(run.deepspeed)
    assert run.deepspeed["zero_optimization"]["stage"] == 3
    assert run.deepspeed["train_batch_size"] == 8
    assert run.deepspeed["gradient_accumulation_steps"] == 2


def test_saying_the_same_twice_is_fine(parse: Parse) -> None:
    content = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 1}}
    run = parse(content, "--micro-batch-size", "4", "--zero-stage", "1")
    assert run.engine.zero_stage == 1


def test_the_file_alone_can_give_the_number_of_micro_steps(parse: Parse) -> None:
    content = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4}
    run = parse(content, world=2)
    assert (run.training.global_batch_size, run.gradient_accumulation_steps) == (16, 4)


@pytest.mark.parametrize(
    ("content", "flags", "parts"),
    [
        (
            {"train_micro_batch_size_per_gpu": 2},
            ["--micro-batch-size", "4"],
            ["--micro-batch-size says 4", "train_micro_batch_size_per_gpu = 2"],
        ),
        (
            {"train_batch_size": 16},
            ["--global-batch-size", "8", "--micro-batch-size", "4"],
            ["--global-batch-size says 8", "train_batch_size = 16"],
        ),
        (
            {"gradient_clipping": 0.5},
            ["--clip-grad", "1"],
            ["--clip-grad says 1.0", "gradient_clipping = 0.5"],
        ),
        (
            {"bf16": {"enabled": False}},
            ["--bf16"],
            ["--bf16 says True", "bf16.enabled = False"],
        ),
        (
            {"zero_optimization": {"stage": 2}},
            ["--zero-stage", "1"],
            ["--zero-stage says 1", "zero_optimization.stage = 2"],
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            ["--no-cpu-offload"],
            ["--cpu-offload says False", "zero_optimization.offload_optimizer = True"],
        ),
    ],
)
def test_a_conflict_names_both_sides(
    parse: Parse, content: dict, flags: list[str], parts: list[str]
) -> None:
    text = refused(parse, content, *flags)
    for part in (*parts, "ds.json", 'Remove one of them or set the key to "auto"'):
        assert part in text


def zero(**more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 2, **more}}


NVME = {"device": "nvme", "nvme_path": "/x"}

REFUSED: list[tuple[Any, str]] = [
    # No JSON, or not as it should be.
    ('{"bf16": ', "is not JSON: .* line 1"),
    ('{"bf16": {}, "bf16": {}}', "the key 'bf16' is given twice"),
    ("[1]", "must hold one JSON object"),
    ('{"zero_optimization": ' * 100_000, "nested too deep"),
    # Unknown keys, which DeepSpeed would pass over.
    (
        {"zero_optimisation": {"stage": 2}},
        r"there is no key zero_optimisation. Did you mean zero_optimization\?",
    ),
    ({"whatever": 1}, r"there is no key whatever\.$"),
    (zero(stagee=2), r"no key zero_optimization\.stagee. Did you mean stage\?"),
    (zero(offload_optimizer={"devise": "cpu"}), "offload_optimizer.devise. Did you mean device"),
    (zero(stage3_prefetch_bucket_sise=1), "Did you mean stage3_prefetch_bucket_size"),
    ({"flops_profiler": {"enable": True}}, "flops_profiler.enable. Did you mean enabled"),
    ({"timers": {"throughput": {"enable": True}}}, "timers.throughput.enable. Did you mean"),
    # Sections that would compete with flags.
    ({"optimizer": {"type": "Adam"}}, "optimizer would compete with --lr.* Remove it"),
    ({"scheduler": {"type": "WarmupLR"}}, "scheduler would compete with --lr.* Remove it"),
    ({"pipeline": {}}, "pipeline would compete with .*--pipeline-split"),
    ({"tensor_parallel": {"autotp_size": 2}}, "compete with --tensor-model-parallel-size"),
    ({"torch_autocast": {"enabled": True}}, "torch_autocast would compete with --bf16"),
    # What DeepSpeed has no more, and what would have no effect or is not supported.
    ({"amp": {"enabled": True}}, "amp is no longer in DeepSpeed. Remove it"),
    ({"elasticity": {"enabled": True}}, "elasticity is no longer in DeepSpeed"),
    ({"sparse_gradients": True}, "sparse_gradients is no longer in DeepSpeed"),
    ({"compression_training": {}}, "compression_training is no longer in DeepSpeed"),
    ({"eigenvalue": {"enabled": True}}, "eigenvalue is no longer in DeepSpeed"),
    ({"progressive_layer_drop": {}}, "progressive_layer_drop is no longer in DeepSpeed"),
    ({"curriculum_learning": {"enabled": True}}, "DeepSpeed does not load the data"),
    ({"data_efficiency": {"enabled": True}}, "DeepSpeed does not load the data"),
    (zero(mics_shard_size=2), "mics_shard_size is no longer in DeepSpeed"),
    (zero(offload_optimizer=NVME), r'offload_optimizer.device keeps .*use \{"device": "cpu"\}'),
    (zero(offload_param=NVME), "offload_param.device keeps state that checkpoints"),
    (zero(offload_optimizer={"device": "cpu", "ratio": 0.5}), "ratio keeps state that"),
    (zero(cpu_offload=True), 'cpu_offload has a new form: "offload_optimizer"'),
    (zero(compute_grad_norm=False), "compute_grad_norm is needed"),
    (zero(zero_quantized_gradients=True), "zero_quantized_gradients is not supported"),
    (zero(stage3_gather_16bit_weights_on_model_save=True), "checkpoints are not DeepSpeed's"),
    ({"activation_checkpointing": "x"}, "use --activation-checkpoint-interval"),
    (
        {"managed_gradient_accumulation": False},
        "managed_gradient_accumulation would conflict with the training loop",
    ),
    ({"gradient_allreduce_op": "sum"}, "would change the loss"),
    # Values that DeepSpeed would not take, or take for something else.
    ({"bf16": True}, r'bf16 must be an object, as in "bf16": \{\.\.\.\}'),
    ({"zero_optimization": 2}, "zero_optimization must be an object"),
    ({"csv_monitor": "x"}, "csv_monitor must be an object"),
    ({"bf16": {"enabled": 1}}, "bf16.enabled 1: input should be a valid boolean"),
    ({"fp16": {"loss_scale": "x"}}, 'loss_scale "x": fp16.loss_scale must be a number'),
    ({"fp16": {"initial_scale_power": 10**9}}, "initial_scale_power 1000000000: input should be"),
    ({"train_batch_size": "eight"}, 'train_batch_size "eight": input should be a valid integer'),
    ({"train_batch_size": 8.5}, "train_batch_size 8.5: input should be a valid integer"),
    ({"train_micro_batch_size_per_gpu": 0}, "_per_gpu 0: input should be greater than or equal"),
    ({"gradient_clipping": True}, "gradient_clipping true: input should be a valid number"),
    ('{"gradient_clipping": NaN}', "gradient_clipping NaN: input should be a finite number"),
    (zero(reduce_bucket_size=0), "reduce_bucket_size 0: input should be greater than 0"),
    (zero(reduce_bucket_size=-5, allgather_bucket_size=-1), "reduce_bucket_size -5: .*; zero_"),
    (zero(leaf_module=3), "leaf_module configuration must be a mapping"),
    ({"zero_optimization": {"stage": 5}}, "stage 5: input should be 0, 1, 2 or 3"),
    ({"zero_optimization": {"stage": "2"}}, 'stage "2": input should be 0, 1, 2 or 3'),
    ({"communication_data_type": "fp8"}, 'communication_data_type "fp8": input should be'),
    ({"data_types": {"grad_accum_dtype": "fp64"}}, 'grad_accum_dtype "fp64": input should be'),
    ({"data_types": {"param_dtype": "bf16"}}, "param_dtype follows from --bf16 and --fp16"),
    ({"gradient_predivide_factor": 0}, "gradient_predivide_factor 0: input should be greater"),
    ({**zero(), "gradient_predivide_factor": 2}, "no meaning in ZeRO stage 2"),
    ({"wall_clock_breakdown": "x"}, 'wall_clock_breakdown "x": input should be a valid boolean'),
    ({"steps_per_print": "x"}, 'steps_per_print "x": input should be a valid integer'),
    ({"steps_per_print": "auto"}, 'steps_per_print "auto": input should be a valid integer'),
    ({"comet": {"enabled": True}}, "comet is enabled, but the package comet_ml is not installed"),
    # Sections that do not go together, in DeepSpeed's own words.
    (
        {"bf16": {"enabled": True, "bf16_optimizer_states": True}},
        "is refused by DeepSpeed: bf16_optimizer_states requires",
    ),
]


@pytest.mark.parametrize(("content", "message"), REFUSED, ids=lambda value: repr(value)[:50])
def test_files_that_cannot_be_used(parse: Parse, content: Any, message: str) -> None:
    """Named with file and key before anything is built; nothing is passed over."""
    text = refused(parse, content, "--micro-batch-size", "4")
    assert text.startswith("--deepspeed_config ") and "ds.json" in text and "\n" not in text
    assert re.search(message, text), text


def test_what_asks_for_nothing_is_let_through(parse: Parse) -> None:
    content = zero(
        offload_optimizer={"device": "none", "ratio": 1.0},
        offload_param=None,
        compute_grad_norm=True,
        zero_quantized_weights=False,
        reduce_bucket_size=5e8,
        allgather_bucket_size="auto",
    )
    more = {"gradient_allreduce_op": "mean", "wandb": {"enabled": False}, "_mine": {"a": 1}}
    run = parse({**content, **more}, "--micro-batch-size", "4")
    assert run.engine.zero_stage == 2 and not run.engine.cpu_offload


def test_what_the_file_sets_is_checked_as_a_flag_would_be(parse: Parse) -> None:
    base = ("--micro-batch-size", "4")
    both = {"bf16": {"enabled": True}, "fp16": {"enabled": True}}
    assert "--bf16 and --fp16 exclude each other" in refused(parse, both, *base)
    offload = {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}
    assert "--cpu-offload" in refused(parse, offload, *base)
    assert "--bf16 and --fp16" in refused(parse, {"fp16": {"enabled": True}}, "--bf16", *base)


@pytest.mark.parametrize(
    "error",
    [
        AssertionError("Master weights\nneed offload"),
        ImportError("no wandb"),
        NotImplementedError("unsupported mix"),
        FileNotFoundError(2, "No such file or directory", "/proc/x"),
        type("ZeRORuntimeException", (Exception,), {})("no such optimizer"),
    ],
    ids=repr,
)
def test_what_deepspeed_refuses_later_is_owed_to_the_file(error: Exception) -> None:
    with pytest.raises(ConfigError) as caught, blamed_on("d.json"):
        raise error
    text = str(caught.value)
    assert "--deepspeed_config d.json: " in text and "\n" not in text
    assert str(error).split()[-1] in text
    with pytest.raises(type(error)), blamed_on(None):
        raise error


def test_what_is_not_about_the_file_is_not_owed_to_it() -> None:
    for error in (RuntimeError("out of memory"), ConfigError("--cpu-offload needs a compiler")):
        with pytest.raises(type(error), match=f"^{error}$"), blamed_on("d.json"):
            raise error


def test_micro_steps_that_do_not_fit(parse: Parse) -> None:
    text = refused(
        parse,
        {"gradient_accumulation_steps": 3},
        *("--micro-batch-size", "4", "--global-batch-size", "8"),
    )
    assert "gradient_accumulation_steps = 3" in text and "--global-batch-size 8 makes it 2" in text


def test_a_file_that_is_missing_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--deepspeed_config none\.json cannot be read: No such"):
        parse_run([*BASE, "--deepspeed_config", "none.json"], 1)
    (tmp_path / "bad.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ConfigError, match=r"bad\.json is not UTF-8 text"):
        parse_run([*BASE, "--deepspeed_config", str(tmp_path / "bad.json")], 1)


@pytest.mark.parametrize(
    "file", sorted(Path(__file__).parents[2].glob("ds_configs/*.json")), ids=lambda p: p.stem
)
def test_the_files_that_come_along_resolve(file: Path) -> None:
    flags = ["--micro-batch-size", "4", "--deepspeed_config", str(file)]
    assert parse_run([*BASE, *flags], 1).deepspeed["train_batch_size"] == 4


def test_flags_turn_on_monitors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = parse_run(["--tensorboard-dir", "events"], 1).deepspeed["tensorboard"]
    assert found == {"enabled": True, "output_path": "events", "job_name": ""}
    file = tmp_path / "ds.json"
    file.write_text('{"tensorboard": {"enabled": true, "output_path": "there"}}')
    with pytest.raises(ConfigError, match="section tensorboard of --deepspeed_config"):
        parse_run(["--tensorboard-dir", "events", "--deepspeed_config", str(file)], 1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--wandb-project needs wandb"):
        parse_run(["--wandb-project", "mine"], 1)
    with pytest.raises(ConfigError, match="--eval-tasks-limit has no effect without"):
        parse_run(["--eval-tasks-limit", "5"], 1)
