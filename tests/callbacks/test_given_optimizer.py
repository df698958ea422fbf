"""Each run begins with the optimizer that was given, whatever the runs before have made of it."""

import copy

import keras
import pytest

from keras_tl import (
    FrozenBackbone,
    GroupOptimizer,
    Stage,
    UnfreezeAtConvergence,
)
from keras_tl.internals.optimizers import has_settable_rate, without_loss_scale
from keras_tl.internals.values import on_host
from tests import models
from tests.shared import Recorder, regression_data, values_of

X, Y = regression_data(8)
schedules = keras.optimizers.schedules


def of_the_output(variable):
    return variable.path.startswith("output/")


def excluding():
    optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    return optimizer


OPTIMIZERS = {
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "excluding": excluding,
    "schedule": lambda: keras.optimizers.Adam(schedules.ExponentialDecay(0.1, 1, 0.5)),
    "function": lambda: keras.optimizers.Adam(lambda: 0.01),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)),
    "groups": lambda: GroupOptimizer(
        {
            "output": keras.optimizers.SGD(0.1, momentum=0.9),
            "rest": excluding(),
        },
        assign={"output": of_the_output},
        global_clipnorm=1.0,
    ),
}


def build():
    keras.utils.set_random_seed(0)
    model = models.functional_outer(FrozenBackbone(models.functional(["dense"])))
    model.compile("sgd", "mse", run_eagerly=True)
    return model


class Decay(keras.callbacks.Callback):
    """Lowers the rate, where it is a number."""

    def on_epoch_end(self, epoch, logs=None):
        optimizer = without_loss_scale(self.model.optimizer)
        inner = getattr(optimizer, "groups", {"": optimizer})
        if all(has_settable_rate(one) for one in inner.values()):
            rate = float(keras.ops.convert_to_numpy(optimizer.learning_rate))
            self.model.optimizer.learning_rate = 0.5 * rate


def run(callback):
    """What a model of one's own becomes with the callback."""
    model = build()
    states = Recorder(lambda model: values_of_optimizer(model.optimizer))
    model.fit(X, Y, epochs=3, shuffle=False, callbacks=[callback, Decay(), states], verbose=0)
    return values_of(model), states.records


def values_of_optimizer(optimizer):
    return [on_host(variable).tolist() for variable in optimizer.variables]


def callback(**arguments):
    return UnfreezeAtConvergence(monitor="loss", max_frozen_epochs=1, verbose=0, **arguments)


@pytest.mark.eager
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("schedule", "function") else ())
        for name in OPTIMIZERS
    ],
)
def test_each_run_is_like_the_first(name):
    optimizer = OPTIMIZERS[name]()
    ours = callback(optimizer=optimizer)
    first = run(ours)
    assert run(ours) == first
    assert not optimizer.built
    assert ours.optimizer is optimizer


@pytest.mark.eager
@pytest.mark.parametrize(
    "name",
    [*(pytest.param(one, marks=pytest.mark.slow) for one in ("momentum", "schedule")), "groups"],
)
def test_a_deep_copy_of_a_callback_runs_like_it(name):
    """As KerasTuner makes one for each trial."""
    make = OPTIMIZERS[name]
    if name == "groups":

        def make():
            groups = {"output": keras.optimizers.SGD(0.1), "rest": keras.optimizers.Adam(0.01)}
            return GroupOptimizer(groups, assign={"output": of_the_output})

    ours = callback(optimizer=make())
    copied = copy.deepcopy(ours)
    assert run(ours) == run(copied)


@pytest.mark.eager
def test_each_stage_is_like_the_first_runs():
    optimizer = keras.optimizers.SGD(0.5, momentum=0.9)
    stages = [Stage("all", 0.1, epochs=1), Stage("all", 0.05)]
    ours = callback(optimizer=optimizer, stages=stages)
    assert run(ours) == run(ours)
    assert not optimizer.built


@pytest.mark.eager
def test_a_head_that_goes_on_beside_it():
    ours = callback(optimizer=keras.optimizers.SGD(0.1, momentum=0.9), head_learning_rate=0.01)
    assert run(ours) == run(ours)


@pytest.mark.eager
def test_a_second_fit_of_one_model_that_was_frozen_again():
    model, ours = build(), callback(optimizer=keras.optimizers.SGD(0.1, momentum=0.9))
    rates = []
    for _ in range(2):
        model.layers[1].freeze()
        model.compile("sgd", "mse", run_eagerly=True)
        rates += model.fit(X, Y, epochs=3, callbacks=[ours, Decay()], verbose=0).history[
            "learning_rate"
        ]
    assert rates[:3] == rates[3:]


def test_a_loss_scale_factor_survives_the_switch():
    for arguments in ({}, {"head_learning_rate": 0.01}):
        model = build()
        model.compile(keras.optimizers.SGD(0.1, loss_scale_factor=8.0), "mse", run_eagerly=True)
        model.fit(X, Y, epochs=2, callbacks=[callback(**arguments)], verbose=0)
        assert model.optimizer.loss_scale_factor == 8.0
