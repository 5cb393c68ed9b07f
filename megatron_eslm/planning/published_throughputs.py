"""Published throughputs of plain training, used to fit the cost model's efficiencies.

MosaicML, llm-foundry, scripts/train/benchmarking/README.md: MPT models on machines of eight GPUs,
bf16, FSDP (which shards like ZeRO 3), no activation checkpointing, unfused head. Shapes are from
its scripts/train/yamls. The code differs from ours, but the models are comparable.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_eslm.config.run import parse_run
from megatron_eslm.planning.cost import step_cost
from megatron_eslm.planning.hardware import EAGER_LOGIT_BYTES, Machine
from megatron_eslm.planning.request import GPT2_VOCAB_SIZE
from megatron_eslm.planning.setting import Setting


@dataclass(frozen=True, kw_only=True)
class Published:
    """One row of that table."""

    model: str
    shape: tuple[int, int, int]
    """Blocks, width, heads."""
    gpu: str
    gpus: int
    seq_length: int
    micro_batch_size: int
    accumulation: int
    tokens_per_second: float
    """Per GPU."""


def _lines(
    model: str, shape: tuple[int, int, int], *lines: tuple[str, int, int, int, int, float]
) -> list[Published]:
    return [
        Published(
            model=model,
            shape=shape,
            gpu=gpu,
            gpus=gpus,
            seq_length=length,
            micro_batch_size=rows,
            accumulation=steps,
            tokens_per_second=tokens,
        )
        for gpu, gpus, length, rows, steps, tokens in lines
    ]


PUBLISHED = [
    *_lines("125m", (12, 768, 12), ("a100-80g", 8, 1024, 64, 2, 156_468)),
    *_lines("350m", (24, 1024, 16), ("a100-80g", 8, 1024, 64, 2, 64_813)),
    *_lines(
        "1b",
        (24, 2048, 16),
        ("a100-80g", 8, 1024, 18, 4, 22_112),
        ("h100-80g", 8, 1024, 18, 4, 48_910),
        ("h100-80g", 32, 2048, 20, 1, 45_130),
    ),
    *_lines(
        "3b",
        (32, 2560, 20),
        ("a100-80g", 8, 1024, 20, 6, 11_580),
        ("h100-80g", 8, 1024, 20, 6, 27_046),
        ("h100-80g", 32, 2048, 6, 3, 23_021),
    ),
    *_lines(
        "7b",
        (32, 4096, 32),
        ("a100-80g", 8, 2048, 6, 2, 4_641),
        ("h100-80g", 8, 2048, 6, 1, 10_643),
    ),
    *_lines(
        "13b",
        (40, 5120, 40),
        ("a100-80g", 8, 2048, 2, 3, 2_262),
        ("h100-80g", 8, 2048, 2, 1, 4_792),
        ("h100-80g", 64, 2048, 2, 1, 4_800),
    ),
]


def predicted(line: Published, machine: Machine) -> float:
    """Tokens per second and GPU that the cost model predicts for a row."""
    blocks, width, heads = line.shape
    words = {
        "--num-layers": blocks,
        "--hidden-size": width,
        "--num-attention-heads": heads,
        "--seq-length": line.seq_length,
        "--micro-batch-size": line.micro_batch_size,
        "--global-batch-size": line.micro_batch_size * line.accumulation * line.gpus,
        "--zero-stage": 3,
        "--selection": "clm",
        "--lr": 1e-4,
        "--train-iters": 1000,
    }
    flags = [word for name, value in words.items() for word in (name, str(value))]
    run = parse_run(["--data-path", "data", "--bf16", *flags], line.gpus)
    unfused = dataclasses.replace(machine, logit_bytes=EAGER_LOGIT_BYTES)
    setting = Setting.of(run, GPT2_VOCAB_SIZE)
    return setting.work.tokens / step_cost(setting, unfused).seconds / line.gpus
