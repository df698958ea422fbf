"""Blocks of a backbone, read from names or from the graph."""

import keras
import pytest

from keras_tl import FrozenBackbone, Stage, layerwise_learning_rates
from keras_tl.backbone.blocks import split_by_depth, split_into_blocks
from keras_tl.internals.graphs import bottlenecks
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


@pytest.mark.parametrize(
    ("names", "blocks"),
    [
        (["conv_stem", "blocks_0_0_conv_dw", "blocks_0_1_conv_dw", "blocks_1_0_conv"], 4),
        (["blocks_0_attn_qkv", "blocks_0_mlp", "blocks_1_attn_qkv", "blocks_1_mlp"], 2),
        (["stages_0_blocks_0_a", "stages_0_blocks_0_b", "stages_1_blocks_0_a"], 2),
        (["layers_0_dense", "layers_10_dense"], 2),
        (["blocks_0_layers_0_a", "blocks_0_layers_1_a", "blocks_1_a", "blocks_1_layers_0_a"], 2),
        (["layer1_0_conv1", "layer1_0_conv2", "layer1_1_conv1", "layer2_0_conv1"], 3),
        (["layer1_1_conv", "layer1_2_conv", "layer2_1_conv"], 2),  # No stages: none has a block 0.
    ],
)
def test_naming_schemes_in_the_plural(names, blocks):
    backbone = keras.Sequential([keras.Input((4,)), *[LAYERS.Dense(4, name=n) for n in names]])
    assert len(split_into_blocks(backbone)) == blocks


def test_operations_that_are_no_layers_end_a_block():
    inputs = keras.Input((3, 4))
    x = LAYERS.Dense(4)(inputs)[:, 0]
    for _ in range(2):
        x = x + LAYERS.Dense(4)(keras.ops.tanh(LAYERS.Dense(4)(x)))
    backbone = keras.Model(inputs, LAYERS.Dense(2)(x))
    assert [len(block) for block in split_into_blocks(backbone).values()] == [1, 2, 2, 1]


def test_what_no_weights_have_gone_into_may_pass_by_a_block():
    tokens = keras.Input((5,), dtype="int32")
    mask = keras.ops.cast(keras.ops.not_equal(tokens, 0), "float32")[..., None]
    x = LAYERS.Embedding(7, 4)(tokens)
    for _ in range(3):
        x = LAYERS.Dense(4)(x) * mask
    assert len(split_into_blocks(keras.Model(tokens, x))) == 4


class Block(keras.layers.Layer):
    """A block of an encoder: attention and a Dense."""

    def build(self, input_shape):
        self.attention = LAYERS.MultiHeadAttention(1, 2)
        self.attention.build(input_shape, input_shape)
        self.dense = LAYERS.Dense(4)
        self.dense.build(input_shape)

    def call(self, x):
        return self.dense(self.attention(x, x))


class Encoder(keras.layers.Layer):
    """Blocks that are one layer of the graph, with a weight of their own."""

    def build(self, input_shape):
        self.position = self.add_weight(shape=input_shape[1:], name="position")
        self.parts = [Block(name=f"part{one}") for one in "abc"]
        for part in self.parts:
            part.build(input_shape)
        self.norm = LAYERS.LayerNormalization(name="norm")
        self.norm.build(input_shape)

    def call(self, x):
        x = x + self.position
        for part in self.parts:
            x = part(x)
        return self.norm(x)


def transformer():
    inputs = keras.Input((5, 4))
    x = LAYERS.Dense(4, name="patches")(inputs)
    return keras.Model(inputs, Encoder(name="encoder")(x), name="vit")


def test_layer_that_holds_many_blocks_is_opened():
    backbone = transformer()
    assert split_into_blocks(backbone) == {
        "patches": ["patches"],
        "encoder/parta": ["encoder/parta"],
        "encoder/partb": ["encoder/partb"],
        "encoder/partc": ["encoder/partc", "encoder/norm"],
    }
    rates = layerwise_learning_rates(backbone, 1.0, decay=0.5)
    assert [rates.of(w) for w in backbone.get_layer("encoder").parts[1].weights] == [0.5] * 10
    assert rates.of(backbone.get_layer("encoder").position) == 0.25
    assert Stage.by_depth(backbone, 2, 1e-4)[0].layers == [
        *("encoder/partb", "encoder/partc", "encoder/norm"),
    ]


class ConvNorm(keras.layers.Layer):
    """A convolution and its normalization, of which a stem has several."""

    def build(self, input_shape):
        self.dense = LAYERS.Dense(4)
        self.dense.build(input_shape)
        self.norm = LAYERS.BatchNormalization()
        self.norm.build((*input_shape[:-1], 4))

    def call(self, x):
        return self.norm(self.dense(x))


class Stem(keras.layers.Layer):
    def build(self, input_shape):
        self.parts = [ConvNorm(name=f"part{one}") for one in "ab"]
        for part in self.parts:
            part.build(input_shape)

    def call(self, x):
        return self.parts[1](self.parts[0](x))


def test_a_stem_is_one_block_and_layers_that_are_blocks_are_so_in_a_stage_too():
    inputs = keras.Input((5, 4))
    x = Stem(name="stem")(inputs)
    for name in ("block_0_0", "block_1_0", "block_1_1"):
        x = Block(name=name)(x)
    x = ConvNorm(name="block_2_0")(x)
    blocks = ["stem", "block_0_0", "block_1_0", "block_1_1", "block_2"]
    assert list(split_into_blocks(keras.Model(inputs, x))) == blocks


@pytest.mark.parametrize(
    "layer",
    [LAYERS.MultiHeadAttention(2, 3), LAYERS.Bidirectional(LAYERS.LSTM(3)), Block()],
    ids=lambda layer: type(layer).__name__,
)
def test_layer_that_is_one_block_is_not_opened(layer):
    inputs = keras.Input((5, 4))
    attends = isinstance(layer, LAYERS.MultiHeadAttention)
    outputs = layer(inputs, inputs) if attends else layer(inputs)
    backbone = keras.Model(inputs, LAYERS.Dense(2, name="last")(outputs))
    assert [len(block) for block in split_into_blocks(backbone).values()] == [1, 1]


def test_many_layers_in_one_block_do_not_pass_in_silence():
    inputs = keras.Input((4,))
    backbone = keras.Model(inputs, LAYERS.add([LAYERS.Dense(4)(inputs) for _ in range(3)]))
    assert len(split_into_blocks(backbone)) == 1
    with pytest.warns(UserWarning, match="3 of the 3 layers.*one block.*a dictionary of learning"):
        layerwise_learning_rates(backbone, 1e-4, decay=0.5)
    layerwise_learning_rates(backbone, 1e-4, decay=1.0)  # Wants one rate, and says nothing.
    with pytest.raises(ValueError, match="has 1 blocks.*or stages that name layers"):
        Stage.by_depth(backbone, 2, 1e-4)


def test_stages_by_depth_leave_out_what_was_frozen_by_hand():
    base = residual(NAMED)
    for name in ("stem", "block2_a", "block2_b"):
        base.get_layer(name).trainable = False
    wrapper = FrozenBackbone(base)
    with pytest.raises(ValueError, match="has 1 blocks"):
        Stage.by_depth(wrapper, 2, 1e-4)


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
    assert bottlenecks(subclassed) is None
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
