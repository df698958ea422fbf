"""The picture of a run in stages."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_tl.callbacks import UnfreezeAtConvergence
from keras_tl.visualization.axes import COLORS, GRAY, new_or_given

_REASONS = {"early_stopping": "EarlyStopping", "max_frozen_epochs": "max. epochs"}


def plot_stages(
    history: keras.callbacks.History | UnfreezeAtConvergence | Mapping[str, Sequence[float]],
    *,
    metrics: Sequence[str] | None = None,
    ax: Any = None,
) -> Any:
    """Draws how a run in stages went: metrics, stages, switches, and learning rates.

    Each stage is shaded and named, a switch is a line with its reason, the epoch whose weights
    remained is starred, and the learning rates (of each parameter group) are dotted, on a second,
    logarithmic axis.

    Args:
        history: The `History` that `fit` or `fine_tune` returned, or its `history` dictionary; or,
            for the reasons of switches and the epoch that was restored, the
            `UnfreezeAtConvergence` after `fit`.
        metrics: List of strings. The quantities in the logs to draw. Defaults to `None`: the
            monitored one (`"val_loss"` or `"loss"` of a `History`), in training and validation.
        ax: A matplotlib `Axes` to draw on. Defaults to one of a new figure.

    Returns:
        The matplotlib `Figure`.

    Raises:
        ValueError: If there is nothing to draw, or a metric is not in the logs.

    Example:

    >>> logs = {"loss": [3.0, 2.0, 1.0], "stage": [0, 0, 1], "learning_rate": [1e-3, 1e-3, 1e-5]}
    >>> plot_stages(logs).axes[0].get_ylabel()
    'loss'

    References:

    - Okabe and Ito, 2008, "Color Universal Design (CUD): How to make figures and presentations that
      are friendly to Colorblind people"
    """
    callback = history if isinstance(history, UnfreezeAtConvergence) else None
    logs, epochs = _logs_of(history)
    shown = _metrics_to_show(logs, metrics, callback)
    ax = new_or_given(ax)
    _shade_stages(ax, logs, epochs)
    for number, name in enumerate(shown):
        x = _epochs_of(logs[name], epochs)
        style = "-" if name.startswith("val_") else "--"
        ax.plot(x, logs[name], style, color=COLORS[number % len(COLORS)], marker=".", label=name)
    if callback is not None:
        _mark_switches(ax, callback)
        _mark_best(ax, callback, logs, epochs)
    ax.set_xlabel("epoch")
    ax.set_ylabel(shown[0].removeprefix("val_") if len(_plain_names(shown)) == 1 else "value")
    ax.xaxis.get_major_locator().set_params(integer=True)
    rates = _draw_learning_rates(ax, logs, epochs, first_color=len(shown))
    handles = [*ax.get_legend_handles_labels()[0], *rates]
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, -0.14), ncols=3, frameon=False)
    return ax.figure


def _logs_of(history: Any) -> tuple[Mapping[str, Sequence[float]], list[int]]:
    """Returns the logs and the epochs that they are of, counted from 1."""
    if isinstance(history, UnfreezeAtConvergence):
        history = getattr(history.model, "history", None) if history.model else None
    logs = history.history if isinstance(history, keras.callbacks.History) else history
    if not isinstance(logs, Mapping) or not logs:
        raise ValueError(
            "`plot_stages` draws the `History` that `fit` returned, its `history` dictionary, or "
            f"the `UnfreezeAtConvergence` after `fit`. Received: {history!r}."
        )
    count = max(len(values) for values in logs.values())
    first = history.epoch[0] if isinstance(history, keras.callbacks.History) else 0
    return logs, list(range(first + 1, first + 1 + count))


def _metrics_to_show(
    logs: Mapping[str, Sequence[float]],
    given: Sequence[str] | None,
    callback: UnfreezeAtConvergence | None,
) -> list[str]:
    if given is None:
        monitor = callback.monitor if callback is not None else "val_loss"
        plain = monitor.removeprefix("val_")
        given = [name for name in (plain, f"val_{plain}") if name in logs] or [monitor]
    given = [given] if isinstance(given, str) else list(given)
    unknown = [name for name in given if name not in logs]
    if unknown or not given:
        raise ValueError(
            f"`metrics` must name quantities in the logs, which are {', '.join(logs)}. Received: "
            f"{given!r}."
        )
    return given


def _plain_names(names: Sequence[str]) -> set[str]:
    return {name.removeprefix("val_") for name in names}


def _epochs_of(values: Sequence[float], epochs: Sequence[int]) -> Sequence[int]:
    """Returns the epochs of values that need not be there for each (`validation_freq`)."""
    every = len(epochs) // len(values)
    return epochs[every - 1 :: every][: len(values)]


def _shade_stages(ax: Any, logs: Mapping[str, Sequence[float]], epochs: Sequence[int]) -> None:
    stages = list(zip(logs.get("stage", ()), epochs))
    several = bool(stages) and max(stage for stage, _ in stages) > 1
    for stage, members in itertools.groupby(stages, key=lambda pair: pair[0]):
        of_stage = [epoch for _, epoch in members]
        begin, end = of_stage[0] - 0.5, of_stage[-1] + 0.5
        ax.axvspan(begin, end, color=GRAY, alpha=0.22 if stage % 2 == 0 else 0.08, linewidth=0)
        name = f"stage {stage}" if several and stage else "fine-tuning" if stage else "frozen"
        ax.text(
            (begin + end) / 2, 1.01, name, ha="center", va="bottom", transform=_above(ax), size=9
        )
    if stages:
        ax.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)


def _above(ax: Any) -> Any:
    """Coordinates with epochs along the x axis, and the height of the axes along the y axis."""
    return ax.get_xaxis_transform()


def _mark_switches(ax: Any, callback: UnfreezeAtConvergence) -> None:
    for transition in callback.transitions:
        x = transition.epoch + 0.5
        reason = _REASONS.get(transition.reason, transition.reason)
        ax.axvline(x, color=GRAY, linewidth=1.5)
        ax.text(
            x, 0.98, f" {reason}", rotation=90, ha="right", va="top", transform=_above(ax), size=9
        )


def _mark_best(
    ax: Any,
    callback: UnfreezeAtConvergence,
    logs: Mapping[str, Sequence[float]],
    epochs: Sequence[int],
) -> None:
    if callback.best_epoch is None or callback.monitor not in logs:
        return
    values = logs[callback.monitor]
    value = dict(zip(_epochs_of(values, epochs), values)).get(callback.best_epoch + 1)
    if value is not None:
        star = {"marker": "*", "markersize": 14, "color": COLORS[5], "linestyle": "none"}
        ax.plot([callback.best_epoch + 1], [value], label="best, restored", zorder=3, **star)


def _draw_learning_rates(
    ax: Any, logs: Mapping[str, Sequence[float]], epochs: Sequence[int], first_color: int
) -> list[Any]:
    """Draws the learning rates on a second axis, and returns them for the legend."""
    groups = [name for name in logs if name.startswith("learning_rate_")]
    names = groups or [name for name in logs if name == "learning_rate"]
    if not names:
        return []
    second = ax.twinx()
    second.set_yscale("log")
    second.set_ylabel("learning rate")
    lines = []
    for number, name in enumerate(names):
        rates = [rate or math.nan for rate in logs[name]]
        # Where rates are the same, the dots of one fall between those of the others.
        dots = (2 * number, (2, max(2, 2 * (len(names) - 1))))
        color = COLORS[(number + first_color) % len(COLORS)]
        look = {"color": color, "linestyle": dots, "linewidth": 2}
        label = name.replace("_", " ")
        lines += second.step(epochs[: len(rates)], rates, where="mid", label=label, **look)
    return lines
