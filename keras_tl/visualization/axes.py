"""What pictures are drawn on, and with.

Colors are told apart by those who cannot tell red from green (Okabe and Ito, 2008), and nothing is
told by color alone. Text, frames and backgrounds are those of the style in force, light or dark.
"""

from __future__ import annotations

from typing import Any

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
GRAY = "0.55"  # Seen on white and on black.


def new_or_given(ax: Any, size: tuple[float, float] = (8.0, 4.0)) -> Any:
    """Returns the matplotlib `Axes` to draw on: those given, or those of a new figure.

    Args:
        ax: `Axes` or None.
        size: Tuple of two floats. The width and height of a new figure, in inches.

    Raises:
        ImportError: If there is no matplotlib.
    """
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "Pictures need matplotlib. Install it, or `keras_tl[plot]`: "
            "`python -m pip install matplotlib`."
        ) from error
    figure = pyplot.figure(figsize=size, layout="constrained")
    # A notebook shows the figures that are open at the end of a cell, and the one that is returned.
    pyplot.close(figure)
    return figure.add_subplot()
