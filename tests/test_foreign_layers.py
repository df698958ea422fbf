"""Backbones that are not made of Keras' layers: a torch module, a SavedModel, a function of JAX."""

import os

import keras
import numpy as np
import pytest

from keras_tl import (
    FeatureCache,
    FreezeGuard,
    FrozenBackbone,
    FrozenWeightsChangedError,
    UnfreezeAtConvergence,
)
from keras_tl.internals import unlisted_state as module
from keras_tl.internals.unlisted_state import unlisted_state
from tests.shared import Recorder, Scripted

pytestmark = pytest.mark.covers("backbone: TorchModuleWrapper, TFSMLayer, JaxLayer")

BACKEND = keras.backend.backend()
FEATURES, UNITS = 4, 6
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(2.0, 2.0, (32, FEATURES)).astype("float32")
Y = X[:, :1] - X[:, 1:2]


def torch_module(folder):
    """A `TorchModuleWrapper`, whose statistics Keras does not list."""
    import torch

    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Linear(FEATURES, UNITS),
        torch.nn.BatchNorm1d(UNITS),
        torch.nn.ReLU(),
    ).to(keras.src.backend.torch.core.get_device())
    layer = keras.layers.TorchModuleWrapper(module, output_shape=(None, UNITS))
    held = module.state_dict()
    learnt = ["0.weight", "0.bias", "1.weight", "1.bias"]

    def values():
        found = {name: value.detach().cpu().numpy().copy() for name, value in held.items()}
        return [{name: found.pop(name) for name in learnt}, found]

    return layer, values


def exported(folder):
    """Writes a SavedModel, once, with an endpoint for inference and one for training."""
    import tensorflow as tf

    path = str(folder / "saved_model")
    if os.path.exists(path):
        return path

    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(UNITS), keras.layers.BatchNormalization(momentum=0.9)]
    model = keras.Sequential([keras.Input((FEATURES,)), *layers])
    archive = keras.export.ExportArchive()
    archive.track(model)
    shape = [tf.TensorSpec((None, FEATURES))]
    archive.add_endpoint("serve", lambda x: model(x, training=False), shape)
    archive.add_endpoint("train", lambda x: model(x, training=True), shape)
    archive.write_out(path, verbose=0)
    return path


def values_of(*some):
    """Returns a function for the values that train, and for those that do not."""
    some = [list(variables) for variables in some]  # Which train changes.

    def values():
        numpy = [[np.array(one.numpy()) for one in variables] for variables in some]
        names = [[f"{n} {one.name}" for n, one in enumerate(variables)] for variables in some]
        return [dict(zip(*pair, strict=True)) for pair in zip(names, numpy, strict=True)]

    return values


def saved_model(folder):
    """A `TFSMLayer`, whose variables are Keras' weights."""
    path = exported(folder)
    layer = keras.layers.TFSMLayer(path, call_endpoint="serve", call_training_endpoint="train")
    return layer, values_of(layer.trainable_variables, layer.non_trainable_variables)


def layer_with_a_saved_model(folder):
    """A layer of one's own that loads a SavedModel: Keras knows none of its variables."""
    import tensorflow as tf

    class Loaded(keras.Layer):
        def __init__(self, path):
            super().__init__()
            self.loaded = tf.saved_model.load(path)

        def call(self, x, training=False):
            return self.loaded.train(x) if training else self.loaded.serve(x)

    layer = Loaded(exported(folder))
    return layer, values_of([], layer.loaded.variables)


def function_of_jax(folder):
    """A `JaxLayer` with a state."""
    import jax

    def call(params, state, inputs, training):
        x = inputs @ params["kernel"]
        mean = jax.numpy.mean(x, axis=0) if training else state["mean"]
        state = {"mean": 0.9 * state["mean"] + 0.1 * mean} if training else state
        return jax.nn.relu(x - mean), state

    kernel = np.random.default_rng(1).normal(size=(FEATURES, UNITS)).astype("float32")
    state = {"mean": np.zeros(UNITS, "float32")}
    layer = keras.layers.JaxLayer(call, params={"kernel": kernel}, state=state)
    return layer, values_of(layer.trainable_variables, layer.non_trainable_variables)


LISTED = {"torch": [], "tensorflow": [saved_model], "jax": [function_of_jax]}[BACKEND]
UNLISTED = {
    "torch": [torch_module],
    "tensorflow": [layer_with_a_saved_model],
    "jax": [],
}[BACKEND]
THAT_TRAIN = {"torch": UNLISTED}.get(BACKEND, LISTED)
by_kind = pytest.mark.parametrize("make", [*LISTED, *UNLISTED])
unlisted = pytest.mark.parametrize("make", UNLISTED)
that_train = pytest.mark.parametrize("make", THAT_TRAIN)


def on(backbone):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((FEATURES,))
    model = keras.Model(inputs, keras.layers.Dense(1)(backbone(inputs)))
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    return model


def on_frozen(make, folder):
    """Returns a model on a layer that is frozen as by hand, and the function for its values."""
    layer, values = make(folder)
    layer.trainable = False
    return on(layer), values


def fit(model, *callbacks, epochs=4, **settings):
    data = {"validation_data": (X, Y), "batch_size": 16, "verbose": 0}
    return model.fit(X, Y, epochs=epochs, callbacks=list(callbacks), **data, **settings)


def same(first, second):
    return [name for name in first if first[name].tobytes() != second[name].tobytes()] == []


@that_train
def test_a_frozen_backbone_holds_what_is_no_layer_of_keras(make, tmp_path):
    layer, values = make(tmp_path)
    model = on(FrozenBackbone(layer))
    before = values()
    recorder = Recorder(lambda model: values())
    unfreezer = UnfreezeAtConvergence(
        1e-2, max_frozen_epochs=2, restore_best_weights=False, verbose=0
    )
    fit(model, unfreezer, FreezeGuard(verbose=0), recorder)
    _, (learnt, state), _, (learnt_last, state_last) = recorder.records
    assert same(before[0], learnt) and same(before[1], state)
    assert not same(learnt, learnt_last)
    assert same(state, state_last)


@by_kind
def test_a_guard_sees_statistics_that_move_although_they_are_frozen(make, tmp_path):
    model, values = on_frozen(make, tmp_path)
    before = values()[1]
    with pytest.raises(FrozenWeightsChangedError, match="torch module with BatchNorm") as error:
        fit(model, FreezeGuard(verbose=0), epochs=1)
    after = values()[1]
    moved = [name for name in before if not np.array_equal(before[name], after[name])]
    assert len(error.value.changes) == len(moved) > 0


@by_kind
def test_a_guard_gives_such_statistics_back(make, tmp_path):
    model, values = on_frozen(make, tmp_path)
    before = values()[1]
    with pytest.warns(UserWarning, match="They were restored"):
        fit(model, FreezeGuard(action="restore", verbose=0), epochs=1)
    assert same(before, values()[1])


@unlisted
def test_a_guard_leaves_such_a_layer_out(make, tmp_path):
    layer, _ = make(tmp_path)
    layer.trainable = False
    fit(on(layer), FreezeGuard(exclude=layer, verbose=0), epochs=1)


@that_train
def test_the_best_weights_are_those_of_the_best_epoch(make, tmp_path):
    layer, values = make(tmp_path)
    model = on(layer)  # Without a FrozenBackbone, so that its statistics move.
    unfreezer = UnfreezeAtConvergence(
        5e-3, backbone=layer, max_frozen_epochs=1, monitor="score", mode="min", verbose=0
    )
    recorder = Recorder(lambda model: values())
    fit(model, Scripted("score", [5, 4, 1, 3, 2]), unfreezer, recorder, epochs=5)
    best, last = recorder.records[2], recorder.records[4]
    for kind, now in enumerate(values()):
        assert same(now, best[kind]) and not same(now, last[kind])


@unlisted
def test_only_inference_mode_always_holds_what_keras_does_not_list(make, tmp_path):
    layer, _ = make(tmp_path)
    with pytest.raises(ValueError, match='Use `inference_mode="always"`') as error:
        FrozenBackbone(layer, inference_mode="batchnorm")
    assert unlisted_state(layer)[0].path in str(error.value)


class Interrupt(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 3:
            raise KeyboardInterrupt


@that_train
def test_a_run_resumes_with_all_of_its_state(make, tmp_path):
    def run(name, *callbacks):
        layer, values = make(tmp_path)
        model = on(layer)
        unfreezer = UnfreezeAtConvergence(
            5e-3,
            backbone=layer,
            max_frozen_epochs=2,
            restore_best_weights=False,
            verbose=0,
            backup_dir=os.fspath(tmp_path / name),
        )
        try:
            fit(model, unfreezer, *callbacks, epochs=5, shuffle=False)
        except KeyboardInterrupt:
            pass
        return values()[1]

    whole = run("whole")
    cut = run("cut", Interrupt())
    resumed = run("cut")
    pairs = zip(whole.values(), cut.values(), strict=True)
    assert not any(np.allclose(one, other, rtol=1e-5) for one, other in pairs)
    for value, found in zip(whole.values(), resumed.values(), strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-5)


@unlisted
def test_features_are_stale_where_such_statistics_differ(make, tmp_path):
    layer, _ = make(tmp_path)
    model = on(FrozenBackbone(layer))
    cache = FeatureCache(model, cache_dir=tmp_path / "features")
    cache(X, Y, verbose=0, name="data")
    mean = next(one for one in unlisted_state(layer) if "mean" in one.name)
    mean.assign(mean + 1.0)
    with pytest.raises(ValueError, match=mean.path):
        FeatureCache(model, cache_dir=tmp_path / "features")(X, Y, verbose=0, name="data")


@unlisted
def test_what_is_not_listed_is_one_variable_as_long_as_its_layer_lives(make, tmp_path):
    layer, values = make(tmp_path)
    found = unlisted_state(layer)
    assert [id(one) for one in unlisted_state(layer)] == [id(one) for one in found]
    mean = next(one for one in found if "mean" in one.name)
    assert mean.path.startswith(f"{layer.name}/")
    mean.assign(np.full(UNITS, 7.0, "float32"))
    (of_layer,) = [value for name, value in values()[1].items() if "mean" in name]
    np.testing.assert_array_equal(of_layer, 7.0)


@pytest.mark.skipif(BACKEND != "torch", reason="buffers are torch's")
def test_a_buffer_that_is_replaced_is_seen():
    import torch

    class Counts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))
            self.linear = torch.nn.Linear(FEATURES, UNITS)

        def forward(self, x):
            if self.training:
                self.seen = self.seen + 1.0
            return self.linear(x)

    layer = keras.layers.TorchModuleWrapper(Counts(), output_shape=(None, UNITS))
    layer.trainable = False
    with pytest.raises(FrozenWeightsChangedError, match="seen"):
        fit(on(layer), FreezeGuard(verbose=0), epochs=1)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the variables are TensorFlow's")
def test_lists_that_tensorflow_refuses_to_look_into_are_looked_into():
    import tensorflow as tf

    class Holds(keras.Layer):
        def __init__(self):
            super().__init__()
            self.held = tf.Module()
            self.held.row = [tf.Variable(1.0), tf.Variable(2.0), "word", None]
            self.held.row.pop(0)
            self.held.by_name = {"one": tf.Variable(3.0), "again": self.held.row}

        def call(self, x):
            return x

    found = unlisted_state(Holds())
    assert sorted(float(one.numpy()) for one in found) == [2.0, 3.0]


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the variables are TensorFlow's")
def test_lists_and_dictionaries_of_a_layer_are_looked_into():
    import tensorflow as tf

    class Holds(keras.Layer):
        def __init__(self):
            super().__init__()
            self.row = [tf.Variable(1.0), "word", self.add_weight(name="listed")]
            self.by_name = {"one": tf.Variable(2.0), "more": [(tf.Variable(3.0),), None]}

        def call(self, x):
            return x

    found = unlisted_state(Holds())
    assert sorted(float(one.numpy()) for one in found) == [1.0, 2.0, 3.0]


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the variables are TensorFlow's")
def test_a_vocabulary_is_not_gone_through(monkeypatch):
    class Holds(keras.Layer):
        def __init__(self):
            super().__init__()
            self.vocabulary = {f"word {number}": number for number in range(1000)}
            self.words = list(self.vocabulary)

    layer, seen, look = Holds(), [], module._held_by
    monkeypatch.setattr(module, "_held_by", lambda one: seen.append(one) or look(one))
    assert unlisted_state(layer) == []
    assert len(seen) < 100
