"""The picture of what of a model trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_tl.backbone.freezing import count_params
from keras_tl.backbone.selecting import named_layers
from keras_tl.internals.layers import own_state, own_trainable_weights
from keras_tl.optimizers.groups import rates_of
from keras_tl.visualization.axes import COLORS, GRAY, new_or_given


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
    ax = new_or_given(ax, size=(9.0, 2.6))
    rates = [rate for _, _, rate in pieces if rate]
    scale = _color_scale(rates)
    total = sum(size for _, size, _ in pieces)
    left = 0.0
    for name, size, rate in pieces:
        look = {"facecolor": "none", "edgecolor": GRAY, "hatch": "////"}
        if rate is not None:
            color = scale.to_rgba(rate) if rates else COLORS[0]
            look = {"facecolor": color, "edgecolor": GRAY}
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
    return ax.figure


def _pieces_of(model: keras.Model) -> list[tuple[str, int, float | None]]:
    """Returns the name, size and learning rate of each piece of the strip, None if it is frozen.

    A layer is one piece, or two if a part of its weights is frozen. The rate is 0 where it is not
    known, in a model that is not compiled.
    """
    trainable = model.trainable_weights
    rate_of = dict(zip(map(id, trainable), _rates(model, trainable), strict=True))
    seen: set[int] = set()
    pieces = []
    for name, layer in named_layers(model):
        weights = own_trainable_weights(layer) + own_state(layer)
        fresh = [weight for weight in weights if id(weight) not in seen]
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
    return rates_of(optimizer, weights)


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
