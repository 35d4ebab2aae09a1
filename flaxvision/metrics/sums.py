"""Arithmetic of metric sums: dicts of float sums with their `"weight"`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def add(total: Mapping[str, Any] | None, sums: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the sums of one more batch; `total=None` starts.

    On the host the addition is in float64, so that a long evaluation loses no example to rounding.
    """
    sums = {k: np.float64(v) for k, v in sums.items()}
    return sums if total is None else {k: total[k] + v for k, v in sums.items()}


def divide(sums: Mapping[str, Any]) -> dict[str, float]:
    """Turns sums into means.

    Args:
        sums: Sums by name, with `"weight"`, the number of real examples in them.

    Returns:
        The means by name, without the weight.

    Raises:
        ValueError: The weight is missing or zero.
    """
    weight = float(sums.get("weight", 0.0))
    if not weight > 0:
        raise ValueError(f"metric sums need a positive 'weight'; got {dict(sums)}")
    return {k: float(v) / weight for k, v in sums.items() if k != "weight"}
