"""Stages of which a model's file does not tell, and models without a head to begin with."""

import warnings

import keras
import numpy as np
import pytest

from keras_tl import FrozenBackbone, Stage, UnfreezeAtConvergence
from tests.shared import as_bytes, regression_data

X, Y = regression_data()
pytestmark = pytest.mark.eager


def untold(norm=False):
    """A compiled model with a plain backbone of which all trains, as a loaded KerasHub task."""
    layers = [keras.layers.Dense(4, name="a"), keras.layers.Dense(4, name="b")]
    if norm:
        layers.append(keras.layers.BatchNormalization(name="norm"))
    base = keras.Sequential([keras.Input((4,)), *layers], name="base")
    model = keras.Sequential([keras.Input((4,)), base, keras.layers.Dense(1, name="head")])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


def without_head(wrap):
    base = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(4, name="a"), keras.layers.Dense(1, name="b")]
    )
    model = keras.Sequential([keras.Input((4,)), FrozenBackbone(base) if wrap else base])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model, base


def training(model):
    return [
        weight.path.split("/")[-2] for weight in model.trainable_weights if weight.name == "kernel"
    ]


def fit(model, callback, **settings):
    history = model.fit(
        X, Y, validation_data=(X, Y), epochs=2, callbacks=[callback], verbose=0, **settings
    )
    return history.history


@pytest.mark.parametrize("norm", [True, False])
def test_fit_goes_on_in_the_stage_that_was_entered(norm):
    model = untold(norm)
    callback = UnfreezeAtConvergence(0.01, backbone="base", verbose=0)

    callback.enter_stage(model)

    assert training(model) == ["a", "b", "head"]
    history = fit(model, callback)
    assert history["stage"] == [1, 1]
    assert history["learning_rate"] == pytest.approx([0.01] * 2)


def test_enters_the_stages_of_a_schedule_with_their_groups():
    model = untold()
    stages = [
        Stage("b", 0.05, head_learning_rate=0.02),
        Stage("all", 0.01, head_learning_rate=0.02),
    ]
    callback = UnfreezeAtConvergence(stages=stages, backbone="base", verbose=0)
    callback.enter_stage(model, 2)
    assert training(model) == ["a", "b", "head"]
    assert [float(one.learning_rate) for one in model.optimizer.groups.values()] == pytest.approx(
        [0.02, 0.05, 0.01]
    )
    callback.enter_stage(model, 1)
    assert training(model) == ["b", "head"]
    assert fit(model, callback)["stage"] == [1, 1]


def test_statistics_stay_constant_without_the_callback_too():
    model = untold(norm=True)
    UnfreezeAtConvergence(0.01, backbone="base", verbose=0).enter_stage(model)
    norm = model.get_layer("base").get_layer("norm")
    before = as_bytes(norm.weights)
    model.fit(X, Y, verbose=0)
    assert as_bytes(norm.weights) == before


def test_a_model_that_was_not_entered_starts_frozen():
    model = untold()
    UnfreezeAtConvergence(0.01, backbone="base", verbose=0).enter_stage(untold())
    callback = UnfreezeAtConvergence(0.01, backbone="base", max_frozen_epochs=1, verbose=0)
    callback.enter_stage(untold())
    assert fit(model, callback)["stage"] == [0, 1]


@pytest.mark.parametrize(
    ("stage", "words"), [(0, "from 1 to 1.*stage=0"), (2, "from 1 to 1"), ("1", "stage='1'")]
)
def test_refuses_a_stage_that_there_is_not(stage, words):
    with pytest.raises(ValueError, match=words):
        UnfreezeAtConvergence(backbone="base").enter_stage(untold(), stage)


def test_what_fails_leaves_the_model_as_it_was():
    model = untold(norm=True)
    model.get_layer("base").get_layer("a").trainable = False
    before, optimizer = training(model), model.optimizer
    stages = [Stage("b", 0.05), Stage(99, 0.01)]
    with pytest.raises(ValueError, match="has 2 layers with weights"):
        UnfreezeAtConvergence(stages=stages, backbone="base").enter_stage(model, 2)
    assert (training(model), model.optimizer) == (before, optimizer)


def test_a_model_that_is_not_built_is_refused():
    model = keras.Sequential([keras.layers.Dense(3, name="base"), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="is not built.*Call it on a batch first"):
        UnfreezeAtConvergence(backbone="base").enter_stage(model)


@pytest.mark.parametrize("wrap", [True, False])
def test_a_model_without_a_head_is_told_to_begin_with_a_stage(wrap):
    model, base = without_head(wrap)
    callback = UnfreezeAtConvergence(0.01, backbone=None if wrap else base, verbose=0)
    before = training(model)
    weights = as_bytes(model.weights)

    with pytest.raises(ValueError, match=r"Stage 0 would train nothing.*`enter_stage\(model, 1\)`"):
        fit(model, callback)

    assert training(model) == before
    assert as_bytes(model.weights) == weights
    callback.enter_stage(model)
    assert fit(model, callback)["stage"] == [1, 1]
    assert np.all([a != b for a, b in zip(weights, as_bytes(model.weights))])


@pytest.mark.parametrize("wrap", [True, False])
def test_weights_that_were_saved_in_a_stage_load_with_their_optimizer(wrap, tmp_path):
    def fresh():
        base = untold(norm=True).get_layer("base")
        model = keras.Sequential([FrozenBackbone(base) if wrap else base, keras.layers.Dense(1)])
        model.build((None, 4))
        model.compile("adam", "mse")
        return model, UnfreezeAtConvergence(0.01, backbone="base", max_frozen_epochs=1, verbose=0)

    trained, callback = fresh()
    fit(trained, callback)
    trained.save_weights(tmp_path / "trained.weights.h5")
    loaded, callback = fresh()

    callback.enter_stage(loaded)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded.load_weights(tmp_path / "trained.weights.h5")

    for its, ours in (
        (trained.weights, loaded.weights),
        (trained.optimizer.variables, loaded.optimizer.variables),
    ):
        assert [value for _, value in as_bytes(its)] == [value for _, value in as_bytes(ours)]
    assert fit(loaded, callback)["stage"] == [1, 1]


def unfrozen(learning_rate):
    """A model of which all trains, compiled anew after the switch as by hand."""
    model = untold(norm=True)
    fit(model, UnfreezeAtConvergence(0.01, backbone="base", max_frozen_epochs=1, verbose=0))
    model.compile(keras.optimizers.SGD(learning_rate), "mse")
    return model


def test_a_rate_above_the_one_asked_for_is_warned_of_and_mended_by_entering_the_stage():
    model = unfrozen(0.1)
    callback = UnfreezeAtConvergence(0.01, backbone="base", verbose=0)
    words = r"continues fine-tuning at 0.1, .* and not at 0.01, .*`enter_stage\(model, 1\)`"
    with pytest.warns(UserWarning, match=words):
        history = fit(model, callback)
    assert history["learning_rate"] == pytest.approx([0.1] * 2)

    callback.enter_stage(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        history = fit(model, callback)
    assert history["learning_rate"] == pytest.approx([0.01] * 2)


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 0.1},
        {"learning_rate": 0.5},  # A callback such as ReduceLROnPlateau may have lowered it since.
        {"learning_rate": "auto"},
        {"learning_rate": 0.01, "head_learning_rate": 0.1},
    ],
)
def test_a_rate_that_nothing_says_is_too_high_is_not_warned_of(settings):
    model = unfrozen(0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(model, UnfreezeAtConvergence(backbone="base", verbose=0, **settings))
