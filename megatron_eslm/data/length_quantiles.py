"""How long the documents of a pair are."""

from __future__ import annotations

import numpy as np

_QUANTILES = {"min": 0.0, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def length_quantiles(lengths_D: np.ndarray) -> dict[str, int]:
    """Quantiles of the documents' tokens, each the length of some document.

    Args:
        lengths_D: integers, at least one.
    """
    values = np.quantile(lengths_D, list(_QUANTILES.values()), method="inverted_cdf")
    return {name: int(value) for name, value in zip(_QUANTILES, values, strict=True)}
