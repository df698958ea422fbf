"""Blocks of a backbone, read from names or from the graph."""

import keras
import pytest

from keras_tl import FrozenBackbone, Stage, internals
from keras_tl.blocks import split_by_depth, split_into_blocks
from tests import models

LAYERS = keras.layers


def residual(names=None):
    """Two residual blocks, each of two Dense and a BatchNormalization, and a stem."""
    names = iter(names or [None] * 7)
    inputs = keras.Input((4,))
    x = LAYERS.Dense(4, name=next(names))(inputs)
    for _ in range(2):
        y = LAYERS.Dense(4, name=next(names))(x)
        y = LAYERS.BatchNormalization(name=next(names))(y)
        y = LAYERS.Dense(4, name=next(names))(y)
        x = LAYERS.add([x, y])
    return keras.Model(inputs, x)


NAMED = ["stem", "block1_a", "block1_norm", "block1_b", "block2_a", "block2_norm", "block2_b"]


def test_blocks_are_read_from_names():
    assert split_into_blocks(residual(NAMED)) == {
        "stem": ["stem"],
        "block1": NAMED[1:4],
        "block2": NAMED[4:7],
    }


@pytest.mark.parametrize(
    ("names", "blocks"),
    [
        (["block1_conv1", "block1_conv2", "block2_conv1"], ["block1", "block2"]),
        (["conv1_conv", "conv2_block1_1_conv", "conv2_block2_1_conv"], None),
        (["block_1_expand", "block_1_project", "block_2_expand"], ["block_1", "block_2"]),
        (["block1a_dw", "block1b_dw", "top_conv"], ["block1a", "block1b"]),
        (["net_stage_0_block_1_mlp", "net_stage_1_block_0_mlp"], None),
        (["encoder_layer_0", "encoder_layer_1"], ["encoder_layer_0", "encoder_layer_1"]),
    ],
)
def test_naming_schemes(names, blocks):
    backbone = keras.Sequential([keras.Input((4,)), *[LAYERS.Dense(4, name=n) for n in names]])
    found = split_into_blocks(backbone)
    assert [name for block in found.values() for name in block] == names
    expected = (
        blocks
        or {
            3: ["conv1_conv", "conv2_block1", "conv2_block2"],
            2: ["net_stage_0_block_1", "net_stage_1_block_0"],
        }[len(names)]
    )
    assert list(found) == expected


def test_without_names_a_block_ends_where_everything_goes_through_one_layer():
    backbone = residual()
    blocks = list(split_into_blocks(backbone).values())
    assert [len(block) for block in blocks] == [1, 3, 3]
    assert [name for block in blocks for name in block] == [
        layer.name for layer in backbone.layers if layer.weights
    ]


def test_a_block_without_weights_to_train_goes_with_the_one_after_it():
    layers = [
        LAYERS.BatchNormalization(name="block1_norm"),
        LAYERS.Dense(4, name="block2_a"),
        LAYERS.Dense(4, name="block3_a"),
    ]
    assert split_into_blocks(keras.Sequential([keras.Input((4,)), *layers])) == {
        "block1": ["block1_norm", "block2_a"],
        "block3": ["block3_a"],
    }


def test_bottlenecks_of_nested_models_and_of_no_graph():
    outer = keras.Sequential([keras.Input((4,)), residual(), residual()])
    assert [len(block) for block in split_into_blocks(outer).values()] == [1, 3, 3, 1, 3, 3]
    subclassed = models.Subclassed(["dense", "batchnorm", "dense"])
    subclassed(keras.ops.ones((1, 4)))
    assert internals.bottlenecks(subclassed) is None
    assert [len(block) for block in split_into_blocks(subclassed).values()] == [2, 1]


def test_parts_have_about_as_many_blocks():
    names = [f"block{index}_dense" for index in range(1, 8)]
    backbone = keras.Sequential([keras.Input((4,)), *[LAYERS.Dense(4, name=n) for n in names]])
    for n in range(1, 8):
        parts = split_by_depth(backbone, n)
        assert [name for part in parts[::-1] for name in part] == names
        sizes = [len(part) for part in parts]
        assert len(sizes) == n
        assert max(sizes) - min(sizes) <= 1


def test_parts_without_names_have_about_as_many_parameters():
    widths = [4, 4, 4, 4, 40]
    layers = [LAYERS.Dense(width) for width in widths]
    backbone = keras.Sequential([keras.Input((4,)), *layers])
    parts = split_by_depth(backbone, 2)
    assert parts == [[layers[-1].name], [layer.name for layer in layers[:-1]]]


def test_a_backbone_without_weights_to_train():
    with pytest.raises(ValueError, match="no weights to train, or is not built"):
        split_into_blocks(keras.Sequential([keras.Input((4,)), LAYERS.BatchNormalization()]))


@pytest.mark.parametrize("n", [0, 4])
def test_more_parts_than_blocks(n):
    with pytest.raises(ValueError, match="has 3 blocks. Pass an int from 1 to 3"):
        split_by_depth(residual(NAMED), n)


def test_stages_by_depth_take_whole_blocks():
    backbone = FrozenBackbone(residual(NAMED))
    stages = Stage.by_depth(backbone, 3, 1e-3, decay=0.5, epochs=2)
    assert [stage.layers for stage in stages] == [NAMED[4:], NAMED[1:], "all"]
    assert [stage.learning_rate for stage in stages] == [1e-3, 5e-4, 2.5e-4]
    assert all(stage.epochs == 2 for stage in stages)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ResNet50", "Xception", "InceptionV3", "EfficientNetB0"])
def test_no_edge_of_a_real_network_leaves_a_block_in_the_middle(name):
    # Whatever is computed in a block reaches later blocks only through its last layers.
    backbone = getattr(keras.applications, name)(weights=None, include_top=False)
    block_of = {
        layer: index
        for index, block in enumerate(split_into_blocks(backbone).values())
        for layer in block
    }
    for layer in backbone.layers:
        for node in layer._inbound_nodes:
            for parent in node.parent_nodes:
                ends = block_of.get(parent.operation.name), block_of.get(layer.name)
                if None not in ends:
                    assert ends[1] - ends[0] in (0, 1)
