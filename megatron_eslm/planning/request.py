"""Request of a plan, and the run that it describes.

config/run.py resolves the run from flags of pretrain_gpt.py, so a plan describes what would be
trained, under the same rules.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from megatron_eslm.config.flags import parse_groups
from megatron_eslm.config.run import GROUPS, RunConfig, resolve
from megatron_eslm.config.scope import fill_scope
from megatron_eslm.errors import ConfigError
from megatron_eslm.limits import ONE_OR_MORE, Flag, check_fields
from megatron_eslm.model.presets import PRESETS
from megatron_eslm.selection.selection_options import Scope

GPT2_VOCAB_SIZE = 50_257

Options = dict[str, Any]
"""Option objects by group, and the names of given flags (config/flags.py)."""

SELECTIONS = ("clm", "eslm", "random", "rho1")
"""What can be planned for."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model to plan for, with its batch size."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    seq_length: int
    global_batch_size: int
    """Sequences per step, as in the paper or GPT-3."""


SIZES: dict[str, Size] = {
    **{
        name: Size(
            num_layers=preset.num_layers,
            hidden_size=preset.hidden_size,
            num_attention_heads=preset.num_attention_heads,
            seq_length=preset.seq_length,
            global_batch_size=preset.micro_batch_size * preset.gradient_accumulation_steps,
        )
        for name, preset in PRESETS.items()
    },
    # Brown et al. 2020 (GPT-3), table 2.1: batches of 2M tokens. Its 13B model has a width of
    # 5,140, which is not 40 heads of 128; later models use 5,120. For planning only.
    "6.7B": Size(
        num_layers=32,
        hidden_size=4096,
        num_attention_heads=32,
        seq_length=2048,
        global_batch_size=1024,
    ),
    "13B": Size(
        num_layers=40,
        hidden_size=5120,
        num_attention_heads=40,
        seq_length=2048,
        global_batch_size=1024,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to distribute a run over its devices."""

    tp: int
    pp: int
    dp: int
    micro_batch_size: int
    zero_stage: int
    checkpoint_interval: int
    """--activation-checkpoint-interval."""

    @property
    def flags(self) -> list[str]:
        """The layout as flags of pretrain_gpt.py."""
        words = [
            *("--tensor-model-parallel-size", str(self.tp)),
            *("--pipeline-model-parallel-size", str(self.pp)),
            *("--micro-batch-size", str(self.micro_batch_size)),
            *("--zero-stage", str(self.zero_stage)),
            *("--activation-checkpoint-interval", str(self.checkpoint_interval)),
        ]
        return [*words, *(["--sequence-parallel"] if self.tp > 1 else [])]

    def __str__(self) -> str:
        checkpoints = ", checkpoints" if self.checkpoint_interval else ""
        return (
            f"TP {self.tp} x PP {self.pp} x DP {self.dp}, micro-batch {self.micro_batch_size}, "
            f"ZeRO {self.zero_stage}{checkpoints}"
        )


@dataclass(frozen=True, kw_only=True)
class Request:
    """A model, its selection, and the number of devices."""

    model_size: Annotated[str, Flag(metavar="|".join(SIZES))] = "1.5B"
    """What is trained; the last two are shapes to plan for only."""

    gpus: Annotated[int, ONE_OR_MORE] = 8
    """How many."""

    selection: Annotated[str, Flag(metavar="|".join(SELECTIONS))] = "eslm"
    """How; rho1 with losses of the reference model that were scored beforehand."""

    alpha: float = 0.1
    """Share to drop."""

    eslm_scope: Scope | None = None
    """What thresholds are taken over; default: as the batch of each layout has it."""

    eslm_proxy_layers: int = 1
    """Blocks of the early exit."""

    eslm_proxy_stride: int = 1
    """Every how many positions it scores."""

    global_batch_size: Annotated[int, ONE_OR_MORE] | None = None
    """Sequences an optimizer step; default: the model's own."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.model_size not in SIZES:
            raise ConfigError(
                f"--model-size {self.model_size} is not one of {', '.join(SIZES)}; the last two "
                "are for planning only, pretrain_gpt.py takes them as --num-layers and so on."
            )
        if self.selection not in SELECTIONS:
            raise ConfigError(
                f"--selection {self.selection} cannot be planned; use one of "
                f"{', '.join(SELECTIONS)}, the one with the most similar passes."
            )

    @property
    def size(self) -> Size:
        """Size of the model."""
        return SIZES[self.model_size]

    @property
    def batch(self) -> int:
        """Sequences per optimizer step."""
        return self.global_batch_size or self.size.global_batch_size

    def with_selection(self, selection: str) -> Request:
        """The same request with another policy."""
        return dataclasses.replace(self, selection=selection)

    @property
    def flags(self) -> list[str]:
        """Flags of pretrain_gpt.py, without the layout."""
        size = self.size
        words = ["--data-path", "data", "--bf16", "--selection", self.selection]
        if self.model_size in PRESETS:
            words += ["--model-size", self.model_size]
        else:
            words += ["--num-layers", str(size.num_layers), "--hidden-size", str(size.hidden_size)]
            words += ["--num-attention-heads", str(size.num_attention_heads)]
            words += ["--seq-length", str(size.seq_length), "--lr", "1e-4"]
            words += ["--train-iters", "100000"]
        if self.selection != "clm":
            words += ["--eslm-alpha", str(self.alpha)]
            words += ["--eslm-scope", self.eslm_scope] if self.eslm_scope is not None else []
        if self.selection == "eslm":
            words += ["--eslm-proxy-layers", str(self.eslm_proxy_layers)]
            words += ["--eslm-proxy-stride", str(self.eslm_proxy_stride)]
        if self.selection == "rho1":
            words += ["--reference-losses", "reference"]
        return [*words, "--global-batch-size", str(self.batch)]

    def options(self) -> Options:
        """The flags as option objects, for `with_layout`."""
        return parse_groups(GROUPS, self.flags, "")


def with_layout(options: Options, layout: Layout) -> RunConfig:
    """Resolve the run in one layout, as pretrain_gpt.py would.

    Raises:
        ConfigError: the rules of config/ refuse the layout.
    """
    engine = dataclasses.replace(
        options["engine"],
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.tp > 1,
        pipeline_model_parallel_size=layout.pp,
        zero_stage=layout.zero_stage,
    )
    model = dataclasses.replace(
        options["model"], activation_checkpoint_interval=layout.checkpoint_interval
    )
    training = dataclasses.replace(options["training"], micro_batch_size=layout.micro_batch_size)
    changed = {"engine": engine, "model": model, "training": training}
    given = options["given"] | {"zero_stage", "micro_batch_size"}
    with _quietly():
        world = layout.tp * layout.pp * layout.dp
        return resolve(**{**options, **changed, "given": given}, world_size=world)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Silence warnings about layouts that are only considered."""
    loggers = [logging.getLogger(rule.__module__) for rule in (resolve, fill_scope)]
    for logger in loggers:
        logger.addFilter(_drop)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_drop)


def _drop(record: logging.LogRecord) -> bool:
    return False
