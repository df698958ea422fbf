"""The picture of a run in stages."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import keras

from keras_tl.callbacks import UnfreezeAtConvergence
from keras_tl.visualization.axes import COLORS, GRAY, new_or_given
from keras_tl.visualization.epochs import LoggedEpochs

_REASONS = {"early_stopping": "EarlyStopping", "max_frozen_epochs": "max. epochs"}


def plot_stages(
    history: keras.callbacks.History | UnfreezeAtConvergence | Mapping[str, Sequence[float]],
    *,
    metrics: Sequence[str] | None = None,
    validation_freq: int | Collection[int] | None = None,
    ax: Any = None,
) -> Any:
    """Draws how a run in stages went: metrics, stages, switches, and learning rates.

    Each stage is shaded and named, a switch is a line with its reason, the epoch whose weights
    remained is starred, and the learning rates (of each parameter group) are dotted, on a second,
    logarithmic axis.

    Args:
        history: The `History` that `fit` or `fine_tune` returned, or its `history` dictionary,
            whose epochs are counted from 1; or, for the reasons of switches, the epoch that was
            restored, and the epochs of whatever was not measured in each, the
            `UnfreezeAtConvergence` after `fit`.
        metrics: List of strings. The quantities in the logs to draw. Defaults to `None`: the
            monitored one (`"val_loss"` or `"loss"` of a `History`), in training and validation.
        validation_freq: Int or list of ints, as in `fit`: in which epochs there was validation. A
            `History` does not know, and `UnfreezeAtConvergence` does. Defaults to `None`: the only
            int that fits the number of values, with a warning if it is not 1.
        ax: A matplotlib `Axes` to draw on. Defaults to one of a new figure.

    Returns:
        The matplotlib `Figure`.

    Raises:
        ValueError: If there is nothing to draw, a metric is not in the logs, or it is not known of
            which epochs its values are.

    Example:

    >>> logs = {"loss": [3.0, 2.0, 1.0], "stage": [0, 0, 1], "learning_rate": [1e-3, 1e-3, 1e-5]}
    >>> plot_stages(logs).axes[0].get_ylabel()
    'loss'

    References:

    - Okabe and Ito, 2008, "Color Universal Design (CUD): How to make figures and presentations that
      are friendly to Colorblind people"
    """
    callback = history if isinstance(history, UnfreezeAtConvergence) else None
    logs, numbers = _logs_of(history)
    recorded = {} if callback is None else callback.logged_epochs
    epochs = LoggedEpochs(logs, numbers, recorded, validation_freq)
    shown = _metrics_to_show(logs, metrics, callback)
    ax = new_or_given(ax)
    _shade_stages(ax, logs, epochs)
    for number, name in enumerate(shown):
        x = epochs.of(name)
        style = "-" if name.startswith("val_") else "--"
        ax.plot(x, logs[name], style, color=COLORS[number % len(COLORS)], marker=".", label=name)
    if callback is not None:
        _mark_switches(ax, callback, epochs)
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
    given = history
    if isinstance(history, UnfreezeAtConvergence):
        history = history.history
    logs = history.history if isinstance(history, keras.callbacks.History) else history
    if not isinstance(logs, Mapping) or not logs:
        unused = ", with which no `fit` has run" if given is not history else ""
        raise ValueError(
            "`plot_stages` draws the `History` that `fit` returned, its `history` dictionary, or "
            f"the `UnfreezeAtConvergence` after `fit`. Received: {given!r}{unused}."
        )
    count = max(len(values) for values in logs.values())
    if not isinstance(history, keras.callbacks.History):
        return logs, list(range(1, count + 1))
    if len(history.epoch) < count:
        raise ValueError(
            f"The `History` has values of {count} epochs and knows {len(history.epoch)} of them: "
            "it was among the `callbacks` of several fits. Pass its `history` dictionary, whose "
            "epochs are counted from 1, or use a new one for each `fit`."
        )
    return logs, [epoch + 1 for epoch in history.epoch]


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


def _shade_stages(ax: Any, logs: Mapping[str, Sequence[float]], epochs: LoggedEpochs) -> None:
    stages = list(zip(logs["stage"], epochs.of("stage"))) if "stage" in logs else []
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
        ax.set_xlim(epochs.all[0] - 0.5, epochs.all[-1] + 0.5)


def _above(ax: Any) -> Any:
    """Coordinates with epochs along the x axis, and the height of the axes along the y axis."""
    return ax.get_xaxis_transform()


def _mark_switches(ax: Any, callback: UnfreezeAtConvergence, epochs: LoggedEpochs) -> None:
    for transition in callback.transitions:
        x = transition.epoch + 0.5
        if not epochs.all[0] < x < epochs.all[-1]:  # Of a run that was interrupted, and resumed.
            continue
        reason = _REASONS.get(transition.reason, transition.reason)
        ax.axvline(x, color=GRAY, linewidth=1.5)
        ax.text(
            x, 0.98, f" {reason}", rotation=90, ha="right", va="top", transform=_above(ax), size=9
        )


def _mark_best(
    ax: Any,
    callback: UnfreezeAtConvergence,
    logs: Mapping[str, Sequence[float]],
    epochs: LoggedEpochs,
) -> None:
    if callback.best_epoch is None or callback.monitor not in logs:
        return
    measured = dict(zip(epochs.of(callback.monitor), logs[callback.monitor]))
    value = measured.get(callback.best_epoch + 1)
    if value is not None:
        star = {"marker": "*", "markersize": 14, "color": COLORS[5], "linestyle": "none"}
        ax.plot([callback.best_epoch + 1], [value], label="best, restored", zorder=3, **star)


def _draw_learning_rates(
    ax: Any, logs: Mapping[str, Sequence[float]], epochs: LoggedEpochs, first_color: int
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
        lines += second.step(epochs.of(name), rates, where="mid", label=label, **look)
    return lines
