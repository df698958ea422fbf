"""Pictures, with matplotlib (the extra `plot`).

Colors are told apart by those who cannot tell red from green (Okabe and Ito, 2008), and nothing is
told by color alone. Text, frames and backgrounds are those of the style in force, light or dark.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_tl import internals
from keras_tl.callbacks import UnfreezeAtConvergence
from keras_tl.freezing import count_params
from keras_tl.optimizers import GroupOptimizer
from keras_tl.selecting import named_layers

_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_MARKS = {
    "valley": (_COLORS[0], "o"),
    "steepest": (_COLORS[1], "s"),
    "minimum": (_COLORS[2], "^"),
}
_GRAY = "0.55"  # Seen on white and on black.
_REASONS = {"early_stopping": "EarlyStopping", "max_frozen_epochs": "max. epochs"}


def plot_learning_rate_range(found: Any, ax: Any = None) -> Any:
    """Draws the loss over the learning rate, and the suggestions.

    Args:
        found: The `LearningRateRange` that `find_learning_rate` returned.
        ax: A matplotlib `Axes` to draw on. Defaults to one of a new figure.

    Returns:
        The matplotlib `Figure`.
    """
    ax = _axes(ax)
    ax.plot(found.learning_rates, found.losses, color=_GRAY, alpha=0.6, label="loss of the batch")
    ax.plot(found.learning_rates, found.smoothed_losses, color=_COLORS[5], label="smoothed")
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
    ax = _axes(ax)
    _shade_stages(ax, logs, epochs)
    for number, name in enumerate(shown):
        x = _epochs_of(logs[name], epochs)
        style = "-" if name.startswith("val_") else "--"
        ax.plot(x, logs[name], style, color=_COLORS[number % len(_COLORS)], marker=".", label=name)
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


def plot_trainable(model: keras.Model, *, ax: Any = None) -> Any:
    """Draws a strip of the model's layers: what trains how fast, and what is frozen.

    From input to output; a layer is as wide as it has parameters. Frozen parameters are gray and
    hatched, those that train have the color of their learning rate.

    Args:
        model: A built model, compiled or not.
        ax: A matplotlib `Axes` to draw on. Defaults to one of a new figure.

    Returns:
        The matplotlib `Figure`.

    Raises:
        ValueError: If the model has no weights.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3), keras.layers.Dense(1)])
    >>> model.layers[0].trainable = False
    >>> figure = plot_trainable(model)

    References:

    - Okabe and Ito, 2008, "Color Universal Design (CUD): How to make figures and presentations that
      are friendly to Colorblind people"
    """
    pieces = _pieces_of(model)
    if not pieces:
        raise ValueError(f'The model "{model.name}" has no weights to draw; build it first.')
    own_figure = ax is None
    ax = _axes(ax, height=2.4)
    rates = [rate for _, _, rate in pieces if rate]
    scale = _color_scale(rates)
    total = sum(size for _, size, _ in pieces)
    left = 0.0
    for name, size, rate in pieces:
        look = {"facecolor": "none", "edgecolor": _GRAY, "hatch": "////"}
        if rate is not None:
            color = scale.to_rgba(rate) if rates else _COLORS[0]
            look = {"facecolor": color, "edgecolor": _GRAY}
        ax.barh(0, size, left=left, height=1.0, linewidth=0.5, **look)
        if size > total / 25:
            _name_piece(ax, name, left + size / 2, size / total)
        left += size
    trained = sum(size for _, size, rate in pieces if rate is not None)
    ax.set_title(f"{model.name}: {trained:,} of {total:,} parameters train")
    ax.set_xlim(0, total)
    ax.set_ylim(-0.5, 0.5)
    ax.set_yticks([])
    ax.set_xlabel("parameters, from input to output; hatched: frozen")
    ax.xaxis.set_major_formatter(_in_short)
    if rates:
        _color_bar(ax, scale, sorted(set(rates)))
    if own_figure:
        ax.figure.set_size_inches(9, 2.6)
    return ax.figure


# Parts of `plot_stages`.


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
        ax.axvspan(begin, end, color=_GRAY, alpha=0.22 if stage % 2 == 0 else 0.08, linewidth=0)
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
        ax.axvline(x, color=_GRAY, linewidth=1.5)
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
        star = {"marker": "*", "markersize": 14, "color": _COLORS[5], "linestyle": "none"}
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
        color = _COLORS[(number + first_color) % len(_COLORS)]
        look = {"color": color, "linestyle": dots, "linewidth": 2}
        label = name.replace("_", " ")
        lines += second.step(epochs[: len(rates)], rates, where="mid", label=label, **look)
    return lines


# Parts of `plot_trainable`.


def _pieces_of(model: keras.Model) -> list[tuple[str, int, float | None]]:
    """Returns the name, size and learning rate of each piece of the strip, None if it is frozen.

    A layer is one piece, or two if a part of its weights is frozen. The rate is NaN where it is not
    known, in a model that is not compiled.
    """
    trainable = model.trainable_weights
    rate_of = dict(zip(map(id, trainable), _rates(model, trainable), strict=True))
    seen: set[int] = set()
    pieces = []
    for name, layer in named_layers(model):
        if internals.sublayers(layer):
            continue
        fresh = [w for w in layer.weights if id(w) not in seen and "seed" not in w.name]
        seen.update(map(id, fresh))
        for rate, members in _by_rate(fresh, rate_of).items():
            pieces.append((name.split("/")[-1], count_params(members), rate))
    return [piece for piece in pieces if piece[1]]


def _by_rate(
    weights: Sequence[keras.Variable], rate_of: Mapping[int, float]
) -> dict[float | None, list[keras.Variable]]:
    groups: dict[float | None, list[keras.Variable]] = {}
    for weight in weights:
        groups.setdefault(rate_of.get(id(weight)), []).append(weight)
    return groups


def _rates(model: keras.Model, weights: Sequence[keras.Variable]) -> list[float]:
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        return [0.0] * len(weights)
    optimizer = internals.without_loss_scale(optimizer)
    if isinstance(optimizer, GroupOptimizer):
        return optimizer.rates(weights)
    return [float(keras.ops.convert_to_numpy(optimizer.learning_rate))] * len(weights)


def _color_scale(rates: Sequence[float]) -> Any:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    low, high = (min(rates), max(rates)) if rates else (1.0, 1.0)
    if low == high:
        low, high = low / 3, high * 3
    return ScalarMappable(LogNorm(low, high), cmap="cividis")


def _color_bar(ax: Any, scale: Any, rates: Sequence[float]) -> None:
    bar = ax.figure.colorbar(scale, ax=ax, pad=0.02)
    bar.set_label("learning rate")
    if len(rates) <= 5:
        bar.set_ticks(rates, labels=[f"{rate:.2g}" for rate in rates], minor=False)
        bar.minorticks_off()


def _name_piece(ax: Any, name: str, x: float, share: float) -> None:
    turned = 90 if share < 0.02 * len(name) else 0
    box = {"facecolor": ax.get_facecolor(), "alpha": 0.8, "edgecolor": "none", "pad": 1.5}
    ax.text(x, 0, name, ha="center", va="center", rotation=turned, size=8, bbox=box)


def _in_short(value: float, _: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _nearest(rates: tuple[float, ...], losses: tuple[float, ...], rate: float) -> float:
    return min(zip(rates, losses), key=lambda pair: abs(pair[0] - rate))[1]


def _axes(ax: Any, height: float = 4.0) -> Any:
    if ax is not None:
        return ax
    try:
        # For notebooks, which show figures only once this is imported.
        import matplotlib.pyplot  # noqa: F401
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Pictures need matplotlib. Install it, or `keras_tl[plot]`: "
            "`python -m pip install matplotlib`."
        ) from error
    return Figure(figsize=(8, height), layout="constrained").add_subplot()
