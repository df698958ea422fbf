"""The picture of a learning-rate range test."""

from __future__ import annotations

from typing import Any

from keras_tl.visualization.axes import COLORS, GRAY, new_or_given

_MARKS = {"valley": (COLORS[0], "o"), "steepest": (COLORS[1], "s"), "minimum": (COLORS[2], "^")}


def plot_learning_rate_range(found: Any, ax: Any = None) -> Any:
    """Draws the loss over the learning rate, and the suggestions.

    Args:
        found: The `LearningRateRange` that `find_learning_rate` returned.
        ax: A matplotlib `Axes` to draw on. Defaults to one of a new figure.

    Returns:
        The matplotlib `Figure`.
    """
    ax = new_or_given(ax)
    ax.plot(found.learning_rates, found.losses, color=GRAY, alpha=0.6, label="loss of the batch")
    ax.plot(found.learning_rates, found.smoothed_losses, color=COLORS[5], label="smoothed")
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
