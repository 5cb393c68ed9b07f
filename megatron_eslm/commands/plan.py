"""Predict memory, communication and step time of layouts on machines that you do not have.

    megatron-eslm plan --model-size 1.5B --gpus 32 --gpu a100-80g \\
        --interconnect infiniband-hdr --alpha 0.1

Prints the best of all layouts that train and fit, and everything about the first. --table prints
the tables of docs/scaling.md instead. Nothing is measured: docs/scaling.md says what is assumed.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from megatron_eslm.command_line import command, not_among
from megatron_eslm.config.flags import parse_groups
from megatron_eslm.errors import ConfigError
from megatron_eslm.limits import ONE_OR_MORE, Flag
from megatron_eslm.planning.hardware import (
    ACCELERATORS,
    DEFAULT_NETWORK,
    INTRA_LINKS,
    NETWORKS,
    Overrides,
    assumptions,
    machine_of,
)
from megatron_eslm.planning.plan_report import plans_values, report
from megatron_eslm.planning.request import Request
from megatron_eslm.planning.search import Pins, search
from megatron_eslm.planning.tables import TABLES


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """The machines."""

    gpu: Annotated[str, Flag(metavar="|".join(ACCELERATORS))] = "a100-80g"
    """Accelerator."""

    interconnect: Annotated[str, Flag(metavar="|".join(NETWORKS))] = DEFAULT_NETWORK
    """Between machines."""

    intra_link: Annotated[str, Flag(metavar="|".join(INTRA_LINKS))] = "nvlink"
    """Within a machine."""


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What is printed."""

    top: Annotated[int, ONE_OR_MORE] = 5
    """Layouts to print."""

    json: bool = False
    """Print values instead of text."""

    table: Annotated[str, Flag(metavar="|".join(TABLES))] | None = None
    """Print a table of docs/scaling.md instead."""

    def __post_init__(self) -> None:
        if self.table is not None and self.table not in TABLES:
            raise ConfigError(f"--table: {not_among(self.table, TABLES)}")


GROUPS = {
    "request": Request,
    "machine": MachineOptions,
    "output": OutputOptions,
    "pins": Pins,
    "overrides": Overrides,
}


@command
def main(argv: Sequence[str]) -> int:
    """Return 0, or 2 if the input cannot be used."""
    parsed = parse_groups(GROUPS, argv, __doc__, config_file=False)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    print(_text(**{name: parsed[name] for name in GROUPS}))
    return 0


def _text(
    request: Request,
    machine: MachineOptions,
    output: OutputOptions,
    pins: Pins,
    overrides: Overrides,
) -> str:
    host = machine_of(
        machine.gpu, machine.interconnect, intra=machine.intra_link, overrides=overrides
    )
    if output.table is not None:
        return TABLES[output.table](request, host)
    plans = search(request, host, pins)
    if not output.json:
        return report(plans, request, host, top=output.top)
    values: dict[str, Any] = {
        "machine": host.name,
        "plans": plans_values(plans[: output.top], request, host),
        "assumed": assumptions(host),
    }
    return json.dumps(values)


if __name__ == "__main__":
    sys.exit(main())
