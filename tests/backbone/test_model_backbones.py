"""What `backbone=` takes: layers, names in the model, functions of the model."""

import operator
import pickle

import keras
import pytest

from keras_tl import (
    FeatureCache,
    FrozenBackbone,
    UnfreezeAtConvergence,
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
    [
        "base",
        ["base"],
        lambda model: model.get_layer("base"),
        lambda model, name="base": name,
        lambda *models: "base",
        operator.methodcaller("get_layer", "base"),
    ],
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


def test_a_file_is_no_name_of_a_layer():
    with pytest.raises(ValueError, match=r"matches no layer\..* It has .*No file is read here"):
        Backbones(build()[0], "weights/other.keras")


@pytest.mark.parametrize("made", [FrozenBackbone, keras.applications.Xception, lambda: "base"])
def test_what_makes_a_model_anew_is_not_called(made):
    with pytest.raises(ValueError, match=r"Received: backbone=<.*>\. That does not take the model"):
        Backbones(build()[0], made)


def flat():
    """A model of which the head is one layer, and what comes before it is not nested."""
    layers = [
        keras.layers.Dense(4, name="a"),
        keras.layers.ReLU(name="b"),
        keras.layers.Dense(4, name="c"),
        keras.layers.ReLU(name="d"),
    ]
    inputs = x = keras.Input((4,))
    for layer in layers:
        x = layer(x)
    model = keras.Model(inputs, keras.layers.Dense(1, name="head")(x))
    model.compile("adam", "mse")
    return model


def test_a_list_of_layers_may_hold_some_without_weights():
    model = flat()
    backbones = Backbones(model, model.layers[:-1])
    assert backbones.plain == model.layers[1:-1]
    assert backbones.names == '"a" to "d" (4 layers)'
    backbones.freeze()
    assert [weight.path for weight in model.trainable_weights] == ["head/kernel", "head/bias"]


@pytest.mark.parametrize("wrong", [slice(0, 1), slice(2, 3), slice(0, 0), slice(0, None, 2)])
def test_a_list_of_layers_needs_weights(wrong):
    model = flat()
    with pytest.raises(ValueError, match="`backbone`"):
        Backbones(model, model.layers[wrong])


def test_a_layer_without_weights_must_be_in_the_model():
    model, other = flat(), flat()
    with pytest.raises(ValueError, match='`backbone` "b" is not part of the model'):
        Backbones(model, [model.layers[1], other.layers[2]])


@pytest.mark.eager
def test_all_before_the_head_of_a_flat_model_serves_wherever_a_backbone_is_taken():
    model = flat()
    callback = UnfreezeAtConvergence(
        1e-4, backbone=model.layers[:-1], max_frozen_epochs=1, verbose=0
    )
    history = model.fit(X, Y, validation_data=(X, Y), epochs=2, callbacks=[callback], verbose=0)
    assert history.history["stage"] == [0, 1]
    by_name = pickle.loads(pickle.dumps(callback))
    assert by_name.backbone == ["a", "b", "c", "d"]
    fresh = flat()
    history = fresh.fit(X, Y, validation_data=(X, Y), epochs=2, callbacks=[by_name], verbose=0)
    assert history.history["stage"] == [0, 1]
    frozen = flat()
    for layer in frozen.layers[:-1]:
        layer.trainable = False
    assert [one.name for one in FeatureCache(frozen, backbone=frozen.layers[:-1]).head.layers] == [
        "d",
        "head",
    ]


def test_the_whole_model_leaves_no_head_to_train():
    model = flat()
    callback = UnfreezeAtConvergence(1e-4, backbone=model)
    with pytest.raises(ValueError, match=r"is the whole model.*`backbone=model.layers\[:-1\]`"):
        model.fit(X, Y, callbacks=[callback], verbose=0)


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
