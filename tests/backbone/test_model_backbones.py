"""What `backbone=` takes: layers, names in the model, functions of the model."""

import keras
import pytest

from keras_tl import (
    FeatureCache,
    FrozenBackbone,
    find_learning_rate,
    fine_tune,
)
from keras_tl.backbone.model_backbones import Backbones
from tests.conftest import regression_data

X, Y = regression_data()


def build(wrap=False):
    block = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, name="dense")], name="block")
    base = keras.Sequential([keras.Input((4,)), block, keras.layers.Dense(4)], name="base")
    layers = [FrozenBackbone(base, name="frozen") if wrap else base, keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    model.compile("adam", "mse")
    return model, base


@pytest.mark.parametrize(
    "backbone",
    ["base", ["base"], lambda model: model.get_layer("base"), lambda model: "base"],
)
def test_finds_a_backbone_by_its_name_or_by_a_function(backbone):
    model, base = build()
    assert Backbones(model, backbone).plain == [base]


@pytest.mark.parametrize("name", ["block", "base/block"])
def test_finds_nested_layers(name):
    model, base = build()
    assert Backbones(model, name).plain == [base.get_layer("block")]


@pytest.mark.parametrize("name", ["frozen", "base", "frozen/base"])
def test_finds_the_wrapper_by_its_name_and_by_that_of_what_it_wraps(name):
    model, _ = build(wrap=True)
    backbones = Backbones(model, name)
    assert (backbones.wrapped, backbones.plain) == ([model.get_layer("frozen")], [])


def test_a_name_of_no_layer_is_an_error_with_close_ones():
    with pytest.raises(ValueError, match='`backbone="bass"`.*matches no layer. Did you mean base'):
        Backbones(build()[0], "bass")


def test_a_name_of_several_layers_is_an_error_with_their_paths():
    twins = [
        keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, name="twin")], name=name)
        for name in ("a", "b")
    ]
    model = keras.Sequential([keras.Input((4,)), *twins])
    with pytest.raises(ValueError, match="names several layers: a/twin, b/twin"):
        Backbones(model, "twin")
    assert Backbones(model, "b/twin").plain == [twins[1].layers[0]]


@pytest.mark.parametrize("backbone", [3, [], [3], lambda model: None])
def test_refuses_anything_else(backbone):
    with pytest.raises(ValueError, match="`backbone` must be a Keras layer.*function from the"):
        Backbones(build()[0], backbone)


@pytest.mark.eager
def test_names_serve_wherever_a_backbone_is_taken():
    model, base = build()
    base.trainable = False
    model.compile("adam", "mse")
    features = FeatureCache(model, backbone="base")(X, Y, verbose=0)
    assert next(iter(features))[0].shape[-1] == 4
    find_learning_rate(model, X, Y, backbone="base", layers="all", steps=10, verbose=0)
    settings = {"epochs": 2, "max_frozen_epochs": 1, "verbose": 0}
    history = fine_tune(model, X, Y, backbone=lambda model: model.layers[0], **settings)
    assert history.history["stage"] == [0, 1]
