"""Pictures of what the depth does: frames in, a matplotlib Figure out."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from .power_figures import power, power_curves


def linearisation_curves(frame: pd.DataFrame) -> Figure:
    """The distance of a residual block from its linearisation, against the number of blocks, with the exponents.

    frame: from `linearisations.linearisation`. Raises ValueError for a frame without rows.
    """
    return power_curves(frame, "depth", "distance", "number of residual blocks", "distance from the linearisation")


def slope_over_depth(own: pd.DataFrame) -> tuple[float, float]:
    """(mean, standard error over the seeds) of the slope of log distance over log depth, of one table's rows with a finite
    distance."""
    return power(own, "depth", "distance")
