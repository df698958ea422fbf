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
from tests.shared import regression_data

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
    with pytest.raises(ValueError, match='`backbone="bass"`.*no layer. Did you mean "base"'):
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


class Task(keras.Model):
    """A model that says which of its layers is its backbone."""

    def __init__(self, backbone, head=None):
        super().__init__()
        self.backbone = backbone
        self.head = head or keras.layers.Dense(1)

    def call(self, x):
        return self.head(self.backbone(x))


@pytest.mark.parametrize("kind", ["functional", "subclassed"])
def test_finds_what_a_model_calls_its_backbone(kind):
    base = build()[1]
    if kind == "functional":
        inputs = keras.Input((4,))
        model = keras.Model(inputs, keras.layers.Dense(1)(base(inputs)))
        model.backbone = base
    else:
        model = Task(base)
        model(X)
    assert Backbones(model, None).plain == [base]


def test_prefers_a_wrapper_to_what_a_model_calls_its_backbone():
    base, wrapper = build()[1], FrozenBackbone(build()[1])
    backbones = Backbones(Task(base, wrapper), None)
    assert (backbones.wrapped, backbones.plain) == ([wrapper], [])


@pytest.mark.parametrize("backbone", ["a name", keras.layers.Dense, None])
def test_a_backbone_that_is_no_layer_of_the_model_is_none(backbone):
    model, _ = build()
    model.backbone = backbone
    with pytest.raises(ValueError, match="has no FrozenBackbone.*its attribute `backbone`"):
        Backbones(model, None)


@pytest.mark.eager
def test_the_backbone_of_a_task_is_found_wherever_one_is_taken():
    model, base = build()
    model.backbone = base
    base.trainable = False
    model.compile("adam", "mse")
    assert FeatureCache(model).head.input_shape == (None, 4)
    with pytest.raises(ValueError, match="matches no layer of the backbone"):
        find_learning_rate(model, X, Y, layers="nix")
    settings = {"epochs": 2, "max_frozen_epochs": 1, "verbose": 0}
    assert fine_tune(model, X, Y, **settings).history["stage"] == [0, 1]
