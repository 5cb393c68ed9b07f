"""Running means of validation losses, so that one lucky evaluation reaches no target."""

from __future__ import annotations

import dataclasses

from megatron_eslm.reports.groups import Group
from megatron_eslm.reports.runs import Record, Run


def averaged(group: Group, window: int) -> Group:
    """A group whose validation losses are means over an evaluation and those before it.

    Args:
        group: the group.
        window: evaluations in a mean, fewer where a run has not had as many yet; 1 or more.
    """
    return Group(group.label, [_averaged(run, window) for run in group.runs])


def _averaged(run: Run, window: int) -> Run:
    losses: list[float] = []
    records: list[Record] = []
    for record in run.records:
        if record.get("valid_loss") is not None:
            losses = [*losses, record["valid_loss"]][-window:]
            record = {**record, "valid_loss": sum(losses) / len(losses)}
        records.append(record)
    return dataclasses.replace(run, records=records)
