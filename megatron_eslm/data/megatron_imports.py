"""Import megatron-core's data modules lazily (they take seconds) and without their warnings."""

from __future__ import annotations

import importlib
import logging
import warnings
from types import ModuleType


def _quiet_import(name: str) -> ModuleType:
    with warnings.catch_warnings():
        # Apex and TransformerEngine are optional; the doctor reports them.
        warnings.simplefilter("ignore")
        logging.getLogger("megatron").setLevel(logging.WARNING)
        return importlib.import_module(name)


def indexed_dataset() -> ModuleType:
    """`megatron.core.datasets.indexed_dataset`."""
    return _quiet_import("megatron.core.datasets.indexed_dataset")


def gpt_dataset() -> ModuleType:
    """`megatron.core.datasets.gpt_dataset`."""
    return _quiet_import("megatron.core.datasets.gpt_dataset")
