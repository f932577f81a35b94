"""Pictures of what the depth does: frames in, a matplotlib Figure out."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from .power_figures import power_curves


def linearisation_curves(frame: pd.DataFrame) -> Figure:
    """The distance of a residual block from its linearisation, against the number of blocks, with the exponents.

    frame: from `linearisations.linearisation`. Raises ValueError for a frame without rows.
    """
    return power_curves(frame, "depth", "distance", "number of residual blocks", "distance from the linearisation")
