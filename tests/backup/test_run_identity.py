"""A backup knows its run: another run does not go on from it, the same one always does."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_tl import (
    FrozenBackbone,
    GroupOptimizer,
    Stage,
    UnfreezeAtConvergence,
    layerwise_learning_rates,
)
from keras_tl.backup import run_identity
from keras_tl.backup.configurations import plain
from keras_tl.backup.run_identity import doubt, why_another_run
from keras_tl.optimizers.groups import group_optimizer
from tests.shared import regression_data

X, Y = regression_data(48)
VALIDATION = (X[:8] + 1, Y[:8])


class Stop(RuntimeError):
    """Ends `fit` before its first step."""


class StopAtOnce(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        raise Stop


def build(
    seed=0, dropout=0.1, activation="relu", rate=0.02, lora=False, learnt=None, **compile_arguments
):
    keras.utils.set_random_seed(seed)
    layers = [keras.layers.Dense(4, activation=activation), keras.layers.Dense(4)]
    base = keras.Sequential([keras.Input((4,)), *layers, keras.layers.BatchNormalization()])
    if learnt is not None:
        # As a checkpoint that is loaded.
        base.layers[0].bias.assign(learnt * np.arange(4.0))
    if lora:
        layers[0].enable_lora(2)
    head = [keras.layers.Dropout(dropout), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((4,)), FrozenBackbone(base), *head])
    arguments = {"optimizer": keras.optimizers.Adam(rate), "loss": "mse", **compile_arguments}
    model.compile(**arguments)
    return model


def identity(model, folder, callback=None, x=X, y=Y, validation=VALIDATION, **fit_arguments):
    """Returns what the backup of such a `fit` would be known by."""
    callback = callback or {}
    rated = callback.keys() & {"stages", "optimizer"} or group_optimizer(model.optimizer)
    rate = {} if rated else {"learning_rate": 1e-5}
    ours = UnfreezeAtConvergence(backup_dir=folder, verbose=0, **rate | callback)
    with pytest.raises(Stop):
        model.fit(
            x,
            y,
            validation_data=validation,
            verbose=0,
            callbacks=[ours, StopAtOnce()],
            **{"epochs": 3, "batch_size": 8, **fit_arguments},
        )
    # As it comes out of a file.
    return json.loads(json.dumps(ours._run._kept._identity))


_identities = {}


@pytest.fixture
def compare(tmp_path):
    """Returns how a run differs from another, each given by arguments of `build` and `identity`."""

    def compared(was=None, now=None, model=None, other_model=None):
        one = _identities.get("default") if was is None and model is None else None
        if one is None:
            one = identity(build(**(model or {})), tmp_path, **(was or {}))
        if was is None and model is None:
            _identities["default"] = one
        return why_another_run(one, identity(build(**(other_model or {})), tmp_path, **(now or {})))

    return compared


# The same run.


def permuted(array):
    return array[np.random.default_rng(1).permutation(len(array))]


@pytest.mark.parametrize(
    "now",
    [
        {},
        {"epochs": 30},
        {"callback": {"delete_checkpoint": False}},
        {"x": permuted(X), "y": permuted(Y)},
        {"x": X * np.float32(1 + 1e-7)},
        {"callback": {"layers": lambda layer: True}},
    ],
    ids=["again", "more epochs", "kept", "other order", "rounding", "other words"],
)
def test_the_same_run(compare, now):
    assert compare(now=now) is None


def test_started_again_without_a_seed(compare, monkeypatch):
    monkeypatch.setattr(run_identity, "global_seed", lambda: None)
    assert compare(model={"seed": 1}, other_model={"seed": 2}) is None
    learnt = {"learnt": 1.0, "lora": True}
    assert compare(model={"seed": 1, **learnt}, other_model={"seed": 2, **learnt}) is None


def test_how_steps_are_run_does_not_count(compare):
    assert compare(other_model={"run_eagerly": True}) is None


def test_names_that_count_up_do_not_count(tmp_path):
    def of(model):
        names = [model.layers[0].backbone.layers[1].name]
        return identity(model, tmp_path, callback={"layers": names})

    assert why_another_run(of(build()), of(build())) is None


def test_a_model_that_was_trained_since_is_the_same_run(tmp_path):
    # In a notebook: interrupted in a later stage, and `fit` called again on the same model.
    model = build(learnt=1.0)
    settings = {"max_frozen_epochs": 1, "backup_dir": tmp_path, "verbose": 0}
    ours = UnfreezeAtConvergence(0.5, **settings)

    class Interrupt(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 2:
                raise Stop

    fit = {"validation_data": VALIDATION, "epochs": 3, "batch_size": 8, "verbose": 0}
    with pytest.raises(Stop):
        model.fit(X, Y, callbacks=[ours, Interrupt()], **fit)
    first = json.loads(json.dumps(ours._run._kept._identity))
    callback = {"max_frozen_epochs": 1, "learning_rate": 0.5}
    assert why_another_run(first, identity(model, tmp_path, callback)) is None
    # Compiled anew with another rate, it is not.
    model.compile(keras.optimizers.Adam(0.3), "mse")
    with pytest.raises(ValueError, match=r"compile.optimizer.learning_rate \(was 0.02, is 0.3\)"):
        identity(model, tmp_path, callback)


def test_a_sequential_model_that_the_first_batch_builds(tmp_path):
    def make(head=1, inner=()):
        keras.utils.set_random_seed(0)
        base = keras.Sequential([*inner, keras.layers.Dense(4)])
        model = keras.Sequential([FrozenBackbone(base), keras.layers.Dense(head)])
        model.compile("sgd", "mse")
        return model

    unbuilt = identity(make(), tmp_path)
    built = make()
    built(X[:1])
    assert why_another_run(unbuilt, identity(built, tmp_path)) is None
    assert why_another_run(unbuilt, identity(make(inner=[keras.Input((4,))]), tmp_path)) is None
    assert "(Dense).units (was 1, is 2)" in why_another_run(unbuilt, identity(make(2), tmp_path))


class WithoutConfig(keras.Model):
    def __init__(self, base):
        super().__init__()
        self.base, self.out = FrozenBackbone(base), keras.layers.Dense(1)

    def call(self, x):
        return self.out(self.base(x))


def test_a_model_without_a_configuration_that_the_first_batch_builds(tmp_path):
    def make():
        keras.utils.set_random_seed(0)
        model = WithoutConfig(keras.Sequential([keras.layers.Dense(4)]))
        model.compile("sgd", "mse")
        return model

    built = make()
    built(X[:1])
    assert why_another_run(identity(make(), tmp_path), identity(built, tmp_path)) is None


def test_learning_rates_of_layers_whose_names_count_up(tmp_path):
    def of(model, decay=0.5):
        rates = layerwise_learning_rates(model.layers[0], 1e-3, decay=decay)
        return identity(model, tmp_path, callback={"learning_rate": rates})

    assert why_another_run(of(build()), of(build())) is None
    assert "learning_rate[" in why_another_run(of(build()), of(build(), 0.25))


def unseeded(monkeypatch, drawn="zeros"):
    """A model with a backbone that is not trained."""
    monkeypatch.setattr(run_identity, "global_seed", lambda: None)
    layers = [keras.layers.Dense(4, bias_initializer=drawn), keras.layers.BatchNormalization()]
    base = keras.Sequential([keras.Input((4,)), *layers])
    model = keras.Sequential([keras.Input((4,)), FrozenBackbone(base), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


def test_vectors_drawn_at_random_are_not_what_a_backbone_has_learnt(tmp_path, monkeypatch):
    one = identity(unseeded(monkeypatch, "random_normal"), tmp_path)
    other = identity(unseeded(monkeypatch, "random_normal"), tmp_path)
    assert why_another_run(one, other) is None
    assert doubt(one, other) is None


def test_another_backbone_is_doubted_where_no_seed_is_set(tmp_path, monkeypatch):
    def trained(value):
        model = unseeded(monkeypatch)
        model.layers[0].backbone.layers[0].bias.assign(value * np.arange(4.0))
        return identity(model, tmp_path)

    one, other = trained(1.0), trained(2.0)
    assert why_another_run(one, other) is None
    assert doubt(one, one) is None
    assert "the weights with which the backbone began" in doubt(one, other)


@pytest.mark.parametrize("grouped", [False, True], ids=["one optimizer", "groups"])
def test_a_checkpoint_that_is_loaded_if_it_exists(tmp_path, grouped):
    def make():
        model = build(rate=0.02)
        if grouped:
            groups = {"rest": keras.optimizers.SGD(0.01), "base": keras.optimizers.SGD(0.02)}
            # By a layer, of which an optimizer that is not built has no configuration.
            model.compile(GroupOptimizer(groups, assign={"base": model.layers[0]}), "mse")
        return model

    fresh = identity(make(), tmp_path)
    model = make()
    model.fit(X, Y, batch_size=8, verbose=0)
    model.optimizer.learning_rate = 0.001  # As `ReduceLROnPlateau` does.
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert why_another_run(fresh, identity(loaded, tmp_path / "of another")) is None
    loaded.compile(keras.optimizers.RMSprop(0.02), "mse")
    told = why_another_run(fresh, identity(loaded, tmp_path / "of another"))
    assert "compile.optimizer (was" in told


def test_sets_are_the_same_in_every_process():
    words = ["ab", "cd", "ef", "gh", "ij"]
    assert plain(set(words)) == plain(frozenset(words)) == words
    json.dumps(plain({"words": frozenset(words)}))


# Another run.


@pytest.mark.parametrize(
    ("callback", "words"),
    [
        ({"learning_rate": 0.05}, r"stages\[0\].learning_rate (was 1e-05, is 0.05)"),
        ({"mode": "max"}, "UnfreezeAtConvergence.mode (was 'auto', is 'max')"),
        ({"patience": 7}, "UnfreezeAtConvergence.patience (was 3, is 7)"),
        ({"head_learning_rate": 1e-3}, "head_learning_rate (was None, is 0.001)"),
        ({"warmup_steps": 3}, "UnfreezeAtConvergence.warmup_steps (was None, is 3)"),
        ({"optimizer": keras.optimizers.SGD(0.1)}, "UnfreezeAtConvergence.optimizer (was None, is"),
        ({"layers": 1}, "the weights that train in stage 1 (not any more: "),
        ({"stages": [Stage(1, 1e-3), Stage("all", 1e-3)]}, "stages (was"),
    ],
    ids=["rate", "mode", "patience", "head", "warm-up", "optimizer", "layers", "stages"],
)
def test_other_settings_of_the_callback(compare, callback, words):
    told = compare(now={"callback": callback})
    assert words.replace("\\", "") in told
    assert told.endswith("To resume that run, start it as it was. ")


def schedule(rate):
    return keras.optimizers.schedules.ExponentialDecay(rate, 10, 0.9)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dropout": 0.3}, "(Dropout).rate (was 0.1, is 0.3)"),
        ({"activation": "tanh"}, "(Dense).activation (was 'relu', is 'tanh')"),
        ({"rate": 1e-3}, "compile.optimizer.learning_rate (was 0.02, is 0.001)"),
        (
            {"rate": schedule(0.1)},
            "compile.optimizer.learning_rate (was 0.02, is ExponentialDecay)",
        ),
        ({"optimizer": keras.optimizers.SGD(0.02)}, "optimizer (was 'Adam', is 'SGD')"),
        ({"loss": "mae"}, "compile.loss (was 'mse', is 'mae')"),
        ({"metrics": ["mae"]}, "compile.metrics (was None, is ['mae'])"),
        ({"seed": 5}, "the seed of `keras.utils.set_random_seed` (was 0, is 5)"),
    ],
    ids=["dropout", "activation", "rate", "schedule", "optimizer", "loss", "metrics", "seed"],
)
def test_another_model_or_compilation(compare, arguments, words):
    assert words in compare(other_model=arguments)


def test_another_checkpoint_of_the_backbone(compare):
    told = compare(model={"learnt": 1.0}, other_model={"learnt": 1.1})
    assert "the weights with which the backbone began" in told


@pytest.mark.parametrize(
    ("was", "now", "words"),
    [
        ({"x": X[:32], "y": Y[:32]}, {"x": X[16:], "y": Y[16:]}, "the data's samples in `x`"),
        ({}, {"validation": (X[8:16], Y[8:16])}, "the data's samples in `validation_data`"),
        ({}, {"y": Y + 1}, "the data's samples in `y`"),
        ({}, {"x": X[8:], "y": Y[8:]}, "the data's shape in `x` (was [48, 4], is [40, 4])"),
        ({}, {"class_weight": {0: 1.0, 1: 2.0}}, "the data's class_weight (was None, is {"),
        ({}, {"batch_size": 4}, "the data's number of steps in an epoch (was 6, is 12)"),
    ],
    ids=["fold", "validation", "targets", "samples", "class weights", "batch size"],
)
def test_other_data(compare, was, now, words):
    told = compare(was, now)
    assert words in told
    assert "must be drawn with a seed" in told


def test_other_data_of_a_pipeline(compare):
    def pipeline(part):
        data = tf.data.Dataset.from_tensor_slices((X[part], Y[part])).shuffle(9).batch(8)
        return {"x": data.prefetch(1), "y": None, "batch_size": None}

    assert compare(pipeline(slice(0, 32)), pipeline(slice(0, 32))) is None
    told = compare(pipeline(slice(0, 32)), pipeline(slice(16, 48)))
    assert "the data's samples in `x`" in told


def test_data_that_cannot_be_seen_is_no_difference(compare):
    def endless():
        while True:
            yield X[:8], Y[:8]

    endless_data = {"x": endless(), "y": None, "batch_size": None, "steps_per_epoch": 3}
    assert compare(endless_data, {**endless_data, "x": endless()}) is None
    assert compare({"batch_size": 16}, endless_data) is None


def test_another_backend_or_number_of_processes_is_named(tmp_path):
    here = identity(build(), tmp_path)
    assert "the Keras backend (was abacus, is " in why_another_run(
        {**here, "backend": "abacus"}, here
    )
    assert "the number of processes (was 2, is 1)" in why_another_run(
        {**here, "processes": 2}, here
    )


def test_settings_that_another_version_does_not_know_do_not_count(tmp_path):
    here = identity(build(), tmp_path)
    callback = {**here["callback"], "a_setting_of_then": 1}
    older = {**here, "versions": ["3.0", "0.0"], "callback": callback}
    assert why_another_run(older, here) is None
    assert "a_setting_of_then" in why_another_run({**here, "callback": callback}, here)
