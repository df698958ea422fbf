"""The blocks that a backbone is made of, such as residual blocks, read from its layers' names."""

from __future__ import annotations

import re

import keras

from keras_tl import internals
from keras_tl.freezing import count_params
from keras_tl.selecting import (
    Backbone,
    describe,
    flatten_layers,
    is_batchnorm,
    layer_units,
    named_layers,
)

# block3_conv1, conv4_block2_1_conv, block2a_expand_conv, stage_0_block_1_conv, encoder_layer_3.
_NAMED = re.compile(
    r".*(?:block|stage|layer|cell|expanded_conv)_?\d+[a-z]?(?=_|/|$)", re.IGNORECASE
)


def split_into_blocks(backbone: Backbone) -> dict[str, list[str]]:
    """Returns the blocks of a backbone, as lists of the names of their layers with weights.

    Blocks are read from names such as `block3_conv1` or `conv4_block2_1_conv`; layers in between
    belong to the block before them. If there are no such names, a block begins where all goes
    through one layer of a Functional model, or else at each layer; normalization layers belong to
    the block before them.

    Args:
        backbone: A layer, a model, or a list of layers, that is built.

    Returns:
        Dictionary from a block's name to the names of its layers, both from input to output. Layers
        are named as in a selection: nested ones `outer/inner`.

    Raises:
        ValueError: If no layer has weights to train.

    Example:

    >>> backbone = keras.applications.ResNet50(include_top=False, weights=None)
    >>> list(split_into_blocks(backbone))[:3]
    ['conv1_conv', 'conv2_block1', 'conv2_block2']
    """
    named = _units_with_weights(backbone)
    if not any(_trains(layer) for layer in named.values()):
        raise ValueError(
            f"The backbone {describe(backbone)} has no weights to train, or is not built: call it "
            "on a batch first."
        )
    begins = _names_of_blocks(named) if has_named_blocks(backbone) else _cuts(backbone, named)
    blocks: dict[str, list[str]] = {}
    trains: dict[str, bool] = {}
    block = ""
    for name, layer in named.items():
        # A block without weights to train goes with the one after it.
        if not block or (trains[block] and begins[name]):
            block = begins[name] or name
        blocks.setdefault(block, []).append(name)
        trains[block] = trains.get(block, False) or _trains(layer)
    return blocks


def _names_of_blocks(named: dict[str, keras.Layer]) -> dict[str, str]:
    """The block that each layer's name tells of, or an empty string."""
    matches = {name: _NAMED.match(name) for name in named}
    return {name: match[0] if match else "" for name, match in matches.items()}


def _cuts(backbone: Backbone, named: dict[str, keras.Layer]) -> dict[str, str]:
    """The layers with weights that begin a block: after a layer that everything goes through."""
    names = {id(layer): name for name, layer in named.items()}
    roots = [backbone] if isinstance(backbone, keras.Layer) else backbone
    cuts = {id(layer) for root in roots for layer in _passed_by_all(root)}
    begins = {}
    passed = True
    for layer in layer_units(backbone):
        if id(layer) in names:
            name = names[id(layer)]
            begins[name] = name if passed and _trains(layer) else ""
            passed = passed and not begins[name]
        passed = passed or id(layer) in cuts
    return begins


def _passed_by_all(layer: keras.Layer) -> list[keras.Layer]:
    graph = internals.bottlenecks(layer) if isinstance(layer, keras.Model) else None
    if graph is None:
        return layer_units(layer)
    return [unit for one in graph for unit in (_passed_by_all(one) if one is not layer else [])]


def has_named_blocks(backbone: Backbone) -> bool:
    """Whether the names of the backbone's layers tell of at least two blocks."""
    matches = [_NAMED.match(name) for name in _units_with_weights(backbone)]
    return len({match[0] for match in matches if match}) > 1


def split_by_depth(backbone: Backbone, n: int) -> list[list[str]]:
    """Returns the names of a backbone's layers in n parts, made of whole blocks.

    Args:
        backbone: A layer, a model, or a list of layers, that is built.
        n: Int, at least 1. How many parts.

    Returns:
        List of n lists of names, the part nearest the output first. The parts have about as many
        blocks, or about as many parameters where no names tell of blocks.

    Raises:
        ValueError: If the backbone has fewer than n blocks.
    """
    blocks = list(split_into_blocks(backbone).values())[::-1]
    if not 1 <= n <= len(blocks):
        raise ValueError(
            f"`n={n}` parts: the backbone {describe(backbone)} has {len(blocks)} blocks. Pass an "
            f"int from 1 to {len(blocks)}."
        )
    sizes = [1.0] * len(blocks)
    if not has_named_blocks(backbone):
        layers = _units_with_weights(backbone)
        sizes = [
            float(count_params(weight for name in block for weight in layers[name].weights))
            for block in blocks
        ]
    parts: list[list[str]] = []
    left = sum(sizes)
    start = 0
    for parts_left in range(n, 0, -1):
        end, taken = start, 0.0
        # At least one block, at least one for each part after it, and else up to its share.
        while len(blocks) - end >= parts_left and (
            end == start or taken + sizes[end] / 2 < left / parts_left
        ):
            taken += sizes[end]
            end += 1
        end = len(blocks) if parts_left == 1 else end
        parts.append([name for block in blocks[start:end][::-1] for name in block])
        left, start = left - taken, end
    return parts


def _units_with_weights(backbone: Backbone) -> dict[str, keras.Layer]:
    """The layers as a user counts them that have weights, by name, from input to output."""
    units = {id(layer) for layer in layer_units(backbone)}
    found: dict[int, tuple[str, keras.Layer]] = {}
    for name, layer in named_layers(backbone):
        if id(layer) in units and layer.weights:
            found.setdefault(id(layer), (name, layer))
    return dict(found.values())


def _trains(layer: keras.Layer) -> bool:
    """Whether there is more to train in it than the scale of a normalization."""
    return any(
        internals.own_trainable_weights(part)
        for part in flatten_layers(layer)
        if not isinstance(part, _NORMALIZATIONS) and not is_batchnorm(part)
    )


_NORMALIZATIONS = (
    keras.layers.LayerNormalization,
    keras.layers.GroupNormalization,
    keras.layers.RMSNormalization,
    keras.layers.UnitNormalization,
)
