"""Intervals over seeds: Student's t for the mean of a few values."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Student's t at .975 for 1 to 30 degrees of freedom; for more, the last is a little too wide."""


def half_width(values: Sequence[float | int]) -> float | None:
    """Half of the 95 % t-interval of a mean; None for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    return QUANTILES[min(n - 1, len(QUANTILES)) - 1] * float(np.std(values, ddof=1)) / math.sqrt(n)


def interval(values: Sequence[float | int], *, form: str = ".2f") -> str:
    """The 95 % t-interval of a mean and the number of values."""
    mean, half = float(np.mean(values)), half_width(values)
    ends = "" if half is None else f"{mean - half:{form}} to {mean + half:{form}}, "
    return f"{ends}n = {len(values)}"
