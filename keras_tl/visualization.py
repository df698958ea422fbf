"""Pictures, with matplotlib (the extra `plot`)."""

from __future__ import annotations

from typing import Any

# Told apart by those who cannot tell red from green (Okabe and Ito, 2008), and by their markers.
_MARKS = {"valley": ("#0072B2", "o"), "steepest": ("#E69F00", "s"), "minimum": ("#009E73", "^")}


def plot_learning_rate_range(found: Any, ax: Any = None) -> Any:
    """Draws the loss over the learning rate, and the suggestions.

    Args:
        found: The `LearningRateRange` that `find_learning_rate` returned.
        ax: A matplotlib `Axes` to draw on. Defaults to one of a new figure.

    Returns:
        The matplotlib `Figure`.
    """
    ax = _axes(ax)
    ax.plot(found.learning_rates, found.losses, color="gray", alpha=0.4, label="loss of the batch")
    ax.plot(found.learning_rates, found.smoothed_losses, label="smoothed")
    for name, rate in found.suggestions.items():
        if rate is not None:
            color, marker = _MARKS[name]
            loss = _nearest(found.learning_rates, found.smoothed_losses, rate)
            ax.plot([rate], [loss], marker, color=color, markersize=9, label=f"{name}: {rate:.2g}")
    ax.set_xscale("log")
    ax.set_xlabel("learning rate")
    ax.set_ylabel("loss")
    low, high = min(found.smoothed_losses), max(found.smoothed_losses)
    ax.set_ylim(low - 0.1 * (high - low or 1.0), high + 0.1 * (high - low or 1.0))
    ax.legend()
    return ax.figure


def _nearest(rates: tuple[float, ...], losses: tuple[float, ...], rate: float) -> float:
    return min(zip(rates, losses), key=lambda pair: abs(pair[0] - rate))[1]


def _axes(ax: Any) -> Any:
    if ax is not None:
        return ax
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Pictures need matplotlib. Install it, or `keras_tl[plot]`: "
            "`python -m pip install matplotlib`."
        ) from error
    return Figure(figsize=(7, 4), layout="constrained").add_subplot()
