"""What error curves say of a plan. Costs nothing once the curves are made."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def error_sums(curves: list[Float[np.ndarray, " level"]], at: list[int]) -> dict[str, float]:
    """Errors of the groups at a plan's levels, negative so that higher is better.

    Args:
        curves: Per step its error curve, as a share of the output's second moment.
        at: Per step the plan's level on that curve.
    """
    errors = np.array([curve[level] for curve, level in zip(curves, at, strict=True)])
    return {"neg_sum": -float(errors.sum()), "neg_max": -float(errors.max())}
