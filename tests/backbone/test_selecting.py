import re

import keras
import pytest

from keras_tl.backbone import selecting
from tests.models import make_layer


@pytest.fixture
def backbone():
    """Layers a, norm, drop, inner/b, inner/norm, lstm (with a cell) and c, from input to output."""
    dense = keras.layers.Dense
    inner = keras.Sequential(
        [
            keras.Input((4,)),
            dense(4, name="b"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Reshape((2, 2), name="flat"),
        ],
        name="inner",
    )
    inputs = keras.Input((4,))
    x = dense(4, name="a")(inputs)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.Dropout(0.5, name="drop")(x)
    x = keras.layers.LSTM(4, name="lstm")(inner(x))
    return keras.Model(inputs, dense(4, name="c")(x), name="base")


def names(layers):
    return [layer.name for layer in layers]


def test_names_are_paths_from_input_to_output(backbone):
    assert [name for name, _ in selecting.named_layers(backbone)] == [
        *("a", "norm", "drop"),
        *("inner", "inner/b", "inner/norm", "inner/flat"),
        *("lstm", "lstm/lstm_cell", "c"),
    ]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ("all", ["base"]),
        (1, ["c"]),
        (2, ["lstm", "c"]),
        (3, ["b", "lstm", "c"]),
        (4, ["a", "b", "lstm", "c"]),
        ("inner/.*", ["b", "norm", "flat"]),
        ("inner", ["inner"]),
        (re.compile("[ac]"), ["a", "c"]),
        (["c", "inner/b"], ["b", "c"]),
        (lambda layer: isinstance(layer, keras.layers.LSTM), ["lstm"]),
    ],
)
def test_selects(backbone, selection, expected):
    assert names(selecting.select_layers(backbone, selection)) == expected


def test_int_counts_batchnorm_when_it_trains(backbone):
    selected = selecting.select_layers(backbone, 3, count_batchnorm=True)
    assert names(selected) == ["norm", "lstm", "c"]


def test_list_of_layers_is_a_backbone(backbone):
    layers = [backbone.get_layer("a"), backbone.get_layer("inner")]
    assert names(selecting.select_layers(layers, "inner/b|a")) == ["a", "b"]


def test_single_layer_is_a_backbone():
    layer = keras.layers.Dense(2, name="only")
    layer.build((None, 3))
    assert names(selecting.select_layers(layer, 1)) == ["only"]
    assert names(selecting.select_layers(layer, "only")) == ["only"]


def test_shared_layer_is_selected_once():
    layer = make_layer("shared")
    layer.build((None, 4))
    assert len(selecting.select_layers(layer, "dense.*")) == 1


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        ("inner/bb", 'matches no layer of the backbone "base". Did you mean "inner/b"'),
        (["a", "cc"], '`layers="cc"` matches no layer'),
        (lambda layer: False, "selects no layer"),
        ([], "selects no layer"),
        ("(", "is not a regular expression"),
        (0, "must be at least 1"),
        (-3, "must be at least 1"),
        (True, "is not a selection"),
        (2.0, "is not a selection"),
        (None, "is not a selection"),
        (["a", 3], "is not a selection"),
        (99, '`layers=99`: the backbone "base" has 4 layers with weights to train. Pass an int'),
    ],
)
def test_refuses_and_says_what_is_allowed(backbone, selection, words):
    with pytest.raises(ValueError, match=re.escape(words)) as raised:
        selecting.select_layers(backbone, selection)
    assert 'Pass "all", an int' in str(raised.value)


@pytest.mark.parametrize("several", [False, True])
def test_refuses_layers_in_place_of_their_names(backbone, several):
    layer = backbone.get_layer("c")
    with pytest.raises(ValueError, match=re.escape("pass `layers=['c']`; nested layers")):
        selecting.select_layers(backbone, [layer] if several else layer)


def test_int_passes_over_layers_that_are_not_counted(backbone):
    cell = backbone.get_layer("lstm").cell
    assert names(selecting.select_layers(backbone, 2, not_counted=[cell])) == ["b", "c"]
    with pytest.raises(ValueError, match="has 3 layers with weights"):
        selecting.select_layers(backbone, 4, not_counted=[cell])
