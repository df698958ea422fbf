"""The blocks that a backbone is made of, such as residual blocks, read from its layers' names."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import keras

from keras_tl.backbone.freezing import count_params
from keras_tl.backbone.hand_frozen import is_held
from keras_tl.backbone.selecting import (
    Backbone,
    describe,
    flatten_layers,
    is_batchnorm,
    named_layers,
    roots,
    top_layers,
)
from keras_tl.internals.graphs import bottlenecks, operations_in_graph
from keras_tl.internals.layers import own_trainable_weights, sublayers

# block3_conv1, conv4_block2_1_conv, block2a_expand_conv, stage_0_block_1_conv, encoder_layer_3.
# In the plural, as timm has it, two numbers are of a stage and a block: blocks_0_1_conv.
_NAMED = re.compile(
    r".*(?:(?:block|stage|layer|cell|expanded_conv)_?\d+[a-z]?(?=_|/|$)"
    r"|(?:blocks|stages|layers)_\d+(?:_\d+)?(?=_|/|$)"
    r"|(?:encoder|decoder)_\d+(?=/|$))",
    re.IGNORECASE,
)
# As torchvision has it: layer1_0_conv1 is in the first block of a stage.
_OF_STAGE = re.compile(r".*layer\d+_\d+(?=_[a-z])", re.IGNORECASE)
# Layers in a block are no blocks: stages_0_blocks_1_layers_2.
_IN_BLOCK = re.compile(r"(?<=blocks_)(\d+)_layers_\d+$", re.IGNORECASE)


def split_into_blocks(
    backbone: Backbone, left_out: Iterable[keras.Layer] = ()
) -> dict[str, list[str]]:
    """Returns the blocks of a backbone, as lists of the names of their layers with weights.

    Blocks are read from names such as `block3_conv1` or `conv4_block2_1_conv`; layers in between
    belong to the block before them. If there are no such names, a block starts where all goes
    through one layer of a Functional model, or else at each layer; normalization layers belong to
    the block before them. A layer that holds many of one kind, such as the encoder of a vision
    transformer, is opened.

    Args:
        backbone: A layer, a model, or a list of layers, that is built.
        left_out: Layers that are in no block.

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
    named = _units_with_weights(backbone, left_out)
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
    if not trains[block] and len(blocks) > 1:
        last = blocks.pop(block)
        blocks[next(reversed(blocks))] += last
    return blocks


def _names_of_blocks(named: dict[str, keras.Layer]) -> dict[str, str]:
    """The block that each layer's name tells of, or an empty string."""
    of_stages = any(re.match(r".*layer\d+_0_", name, re.IGNORECASE) for name in named)
    found = {}
    for name, layer in named.items():
        match = (of_stages and _OF_STAGE.match(name)) or _NAMED.match(name)
        block = _IN_BLOCK.sub(r"\1", match[0]) if match else ""
        # A layer that is a block, the second of a stage: block_1_2.
        numbered = match and re.fullmatch(r"_\d+", name[match.end() :])
        found[name] = name if numbered and _is_made_of_parts(layer) else block
    return found


def _is_made_of_parts(layer: keras.Layer) -> bool:
    return sum(_trains(part) for part in sublayers(layer)) > 1


def _cuts(backbone: Backbone, named: dict[str, keras.Layer]) -> dict[str, str]:
    """The layers with weights that start a block: after what everything goes through."""
    names = {id(layer): name for name, layer in named.items()}
    cuts = {id(one) for root in roots(backbone) for one in _passed_by_all(root)}
    begins = {}
    passed = True
    for one in _in_order(backbone):
        if id(one) in names:
            name = names[id(one)]
            begins[name] = name if passed and _trains(one) else ""
            passed = passed and not begins[name]
        passed = passed or id(one) in cuts
    return begins


def _passed_by_all(operation: Any) -> list[Any]:
    """The units, and the operations that are no layers, through which everything goes."""
    is_model = isinstance(operation, keras.Model)
    graph = bottlenecks(operation) if is_model else None
    if graph is None:
        return _in_order(operation)
    return [one for inner in graph for one in _passed_by_all(inner)]


def _in_order(backbone: Backbone | Any) -> list[Any]:
    """The units of a backbone, and the operations between them that are no layers (`x + y`)."""
    if isinstance(backbone, Sequence):
        return [one for root in backbone for one in _in_order(root)]
    if isinstance(backbone, keras.Model):
        return [one for inner in _operations(backbone) for one in _in_order(inner)]
    if isinstance(backbone, keras.Layer) and _is_stack(backbone):
        return [one for inner in sublayers(backbone) for one in _in_order(inner)]
    return [backbone]


def _operations(model: keras.Model) -> list[Any]:
    operations = operations_in_graph(model)
    return sublayers(model) if operations is None else operations


def _is_stack(layer: keras.Layer) -> bool:
    """Whether most of a layer is several layers of one class that are made of layers themselves.

    An encoder is; attention (of plain layers), `Bidirectional` (of one cell each), a stem (of
    convolutions with their normalization) and a transformer block (of two attentions and as many
    weights besides) are not.
    """
    alike: dict[type, list[keras.Layer]] = {}
    for sublayer in sublayers(layer):
        if _is_made_of_parts(sublayer):
            alike.setdefault(type(sublayer), []).append(sublayer)
    share = 2 / 3 * count_params(layer.weights)
    return any(
        len(some) > 1 and sum(count_params(one.weights) for one in some) > share
        for some in alike.values()
    )


def has_named_blocks(backbone: Backbone) -> bool:
    """Whether the names of the backbone's layers tell of at least two blocks."""
    blocks = _names_of_blocks(_units_with_weights(backbone)).values()
    return len({block for block in blocks if block}) > 1


def split_by_depth(
    backbone: Backbone, n: int, left_out: Iterable[keras.Layer] = ()
) -> list[list[str]]:
    """Returns the names of a backbone's layers in n parts, made of whole blocks.

    Args:
        backbone: A layer, a model, or a list of layers, that is built.
        n: Int, at least 1. How many parts.
        left_out: Layers that are in no part.

    Returns:
        List of n lists of names, the part nearest the output first. The parts have about as many
        blocks, or about as many parameters where no names tell of blocks.

    Raises:
        ValueError: If the backbone has fewer than n blocks.
    """
    blocks = list(split_into_blocks(backbone, left_out).values())[::-1]
    if not 1 <= n <= len(blocks):
        raise ValueError(
            f"`n={n}` parts: the backbone {describe(backbone)} has {len(blocks)} blocks. Pass an "
            f"int from 1 to {len(blocks)}, or stages that name layers: "
            "`[Stage(['c', 'd'], 1e-4), Stage('all', 1e-5)]`."
        )
    if n > 1:
        warn_of_one_block(backbone, "Pass stages that name layers")
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


def _units_with_weights(
    backbone: Backbone, left_out: Iterable[keras.Layer] = ()
) -> dict[str, keras.Layer]:
    """The layers as a user counts them that have weights, by name, from input to output."""
    units = {id(one) for one in _in_order(top_layers(backbone))}
    found: dict[int, tuple[str, keras.Layer]] = {}
    for name, layer in named_layers(backbone):
        if id(layer) in units and layer.weights and not is_held(layer, left_out):
            found.setdefault(id(layer), (name, layer))
    return dict(found.values())


def warn_of_one_block(backbone: Backbone, instead: str) -> None:
    """Warns if nearly all of a backbone of several layers is one block.

    Args:
        backbone: A layer, a model, or a list of layers, that is built.
        instead: String. What to do, as the start of a sentence that ends in "by themselves".
    """
    named = dict(named_layers(backbone))
    sizes = {
        block: sum(_trains_itself(part) for part in flatten_layers([named[one] for one in names]))
        for block, names in split_into_blocks(backbone).items()
    }
    largest, layers = max(sizes, key=sizes.__getitem__), sum(sizes.values())
    alone = len(sizes) == 1 and layers > 2
    if alone or (layers > 20 and sizes[largest] > 0.9 * layers):
        warnings.warn(
            f"{sizes[largest]} of the {layers} layers of the backbone {describe(backbone)} that "
            f"train are one block, {largest!r}: neither their names nor their structure tell where "
            f"others begin. {instead} by themselves.",
            stacklevel=4,
        )


def _trains(layer: keras.Layer) -> bool:
    """Whether there is more to train in it than the scale of a normalization."""
    return any(_trains_itself(part) for part in flatten_layers(layer))


def _trains_itself(layer: keras.Layer) -> bool:
    normalizes = isinstance(layer, _NORMALIZATIONS) or is_batchnorm(layer)
    return bool(own_trainable_weights(layer)) and not normalizes


_NORMALIZATIONS = (
    keras.layers.LayerNormalization,
    keras.layers.GroupNormalization,
    keras.layers.RMSNormalization,
    keras.layers.UnitNormalization,
)
