"""Paths of layers and weights that hold for every copy of a backbone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import keras

from keras_tl.backbone.selecting import Backbone
from keras_tl.internals.layers import name_without_count, own_trainable_weights, sublayers


def layer_paths(backbone: Backbone) -> dict[str, keras.Layer]:
    """Returns the layers at every depth by their paths in the backbone, each layer once.

    Automatic names, which count up in a process, count from the start among the layers of one
    parent: a model that is made again from its configuration has the same paths.

    Args:
        backbone: A layer, whose own path is empty, or a list of layers.

    Example:

    >>> backbone = keras.Sequential([keras.layers.Dense(2), keras.layers.ReLU()])
    >>> list(layer_paths(backbone))
    ['', 'dense', 're_lu']
    """
    found: dict[int, tuple[str, keras.Layer]] = {}

    def visit(layer: keras.Layer, path: str) -> None:
        if id(layer) not in found:
            found[id(layer)] = (path, layer)
            prefix = f"{path}/" if path else ""
            for name, sublayer in _named(sublayers(layer)):
                visit(sublayer, prefix + name)

    for name, root in [("", backbone)] if isinstance(backbone, keras.Layer) else _named(backbone):
        visit(root, name)
    return dict(found.values())


def weight_paths(backbone: Backbone) -> dict[str, keras.Variable]:
    """Returns the weights that layers made to be trained by their paths in the backbone."""
    return {
        f"{path}/{name}" if path else name: weight
        for path, layer in layer_paths(backbone).items()
        for name, weight in _named(own_trainable_weights(layer))
    }


def _named(siblings: Sequence | Iterable) -> list[tuple[str, keras.Layer | keras.Variable]]:
    """Pairs of a name that no other sibling has, and the sibling."""
    taken: set[str] = set()
    named = []
    for one in siblings:
        name = stem = name_without_count(one)
        count = 0
        while name in taken:
            count += 1
            name = f"{stem}_{count}"
        taken.add(name)
        named.append((name, one))
    return named
