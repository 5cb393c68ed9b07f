"""The policies that `--selection` can name: ours, and those that your program has registered."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_eslm.selection.policy import SelectionPolicy

POLICIES: dict[str, type[SelectionPolicy]] = {}
"""By name; `selection.policy.register` fills it."""
