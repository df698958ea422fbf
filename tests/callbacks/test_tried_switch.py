"""What can fail at a switch is found before the first step, and trying it leaves no trace."""

import weakref

import keras
import numpy as np
import pytest

from keras_tl import (
    FrozenBackbone,
    GroupOptimizer,
    Stage,
    UnfreezeAtConvergence,
)
from keras_tl.stages import switching
from keras_tl.stages.staged_model import StagedModel
from tests import models
from tests.shared import Recorder, as_bytes, regression_data, values_of

X, Y = regression_data()
TORCH_HAS_NO_TAPE = pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="Written for a gradient tape or a stateless step."
)


class WithoutConfig(keras.optimizers.SGD):
    """It cannot be made from its configuration."""

    def __init__(self, total_steps, **kwargs):
        super().__init__(**kwargs)
        self.total_steps = total_steps


class LosesArgument(keras.optimizers.SGD):
    """It can be made from its configuration, but it is another one then."""

    def __init__(self, total_steps=10, **kwargs):
        super().__init__(**kwargs)
        self.total_steps = total_steps


class FailsToBuild(keras.optimizers.SGD):
    """It has no room for more than some weights."""

    room = 2

    def build(self, variables):
        if len(variables) > self.room:
            raise RuntimeError("no room for slots")
        super().build(variables)


def build(optimizer="adam", outer=models.functional_outer):
    model = outer(FrozenBackbone(models.functional(["dense", "batchnorm", "dense"])))
    model.compile(optimizer, "mse")
    return model


def fit(model, *callbacks, **arguments):
    arguments.setdefault("epochs", 3)
    return model.fit(X, Y, batch_size=8, verbose=0, callbacks=list(callbacks), **arguments)


def switch(**arguments):
    return UnfreezeAtConvergence(**{"monitor": "loss", "max_frozen_epochs": 2} | arguments)


def steps_until_error(model, callback, words, error=ValueError):
    steps = Recorder(lambda model: None)
    steps.on_train_batch_end = lambda batch, logs=None: steps.records.append(batch)
    with pytest.raises(error, match=words):
        fit(model, callback, steps)
    return len(steps.records)


OUTERS = pytest.mark.parametrize("outer", [models.functional_outer, models.SubclassedOuter])


@pytest.mark.eager
@OUTERS
@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (WithoutConfig, "WithoutConfig cannot be made.*'total_steps'.*pass `optimizer=`"),
        (LosesArgument, "LosesArgument cannot be made.*it lacks total_steps"),
    ],
)
def test_an_optimizer_that_cannot_be_made_again_is_an_error_before_the_first_step(
    optimizer, words, outer
):
    model = build(optimizer(20), outer)
    assert steps_until_error(model, switch(), words) == 0


@pytest.mark.eager
def test_such_an_optimizer_serves_until_a_switch_to_another():
    model = build(WithoutConfig(20))
    fit(model, switch(optimizer=keras.optimizers.SGD(1e-3), verbose=0))
    assert not isinstance(model.optimizer, WithoutConfig)


@pytest.mark.eager
def test_an_argument_that_is_as_by_default_is_not_lost():
    model = build(LosesArgument())
    fit(model, switch(verbose=0))
    assert model.optimizer.total_steps == 10


@pytest.mark.eager
@OUTERS
def test_an_optimizer_that_cannot_be_built_is_an_error_before_the_second_step(outer):
    model = build(FailsToBuild(), outer)
    flags = [layer.trainable for layer in model._flatten_layers()]
    steps = steps_until_error(model, switch(), "no room for slots", RuntimeError)
    assert steps <= (outer is models.SubclassedOuter)
    assert [layer.trainable for layer in model._flatten_layers()] == flags
    assert len(model.trainable_weights) == 2


@pytest.mark.eager
def test_every_stage_is_tried():
    model = build(FailsToBuild())
    first, second = models.frozen_backbone_of(model).backbone.layers[1::2]
    assert (
        steps_until_error(
            model,
            switch(stages=[Stage(second.name, 1e-3, epochs=1), Stage(first.name, 1e-3)]),
            "no room for slots",
            RuntimeError,
        )
        == 0
    )


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: "adam",
        lambda: keras.optimizers.Adam(0.01, use_ema=True),
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01, momentum=0.9)),
        lambda: GroupOptimizer(
            {"head": keras.optimizers.SGD(), "rest": keras.optimizers.Adam()},
            assign={"head": "output/.*"},
        ),
    ],
)
@pytest.mark.parametrize("trained_before", [False, True])
def test_a_tried_switch_leaves_no_trace(optimizer, trained_before):
    model = build(optimizer())
    if trained_before:
        fit(model, epochs=1)
    grouped = isinstance(model.optimizer, GroupOptimizer)
    rates = {} if grouped else {"head_learning_rate": 1e-3}
    stage = Stage("all", None if grouped else 1e-5, **rates)
    staged = StagedModel(model, [stage], exactly=False)
    staged.check_renewable(0)

    def state():
        functions = model.train_function, model.test_function, model.predict_function
        optimizer = model.optimizer
        flags = [layer.trainable for layer in model._flatten_layers()]
        return (
            [id(function) for function in functions],
            (id(optimizer), optimizer.built),
            [as_bytes(model.weights), as_bytes(optimizer.variables)],
            [id(weight) for weight in model.trainable_weights],
            flags,
            model.get_compile_config(),
        )

    before = state()
    staged.try_switches(0)
    assert state() == before


def test_a_tried_switch_does_not_change_what_is_trained(monkeypatch):
    def trained():
        keras.utils.set_random_seed(1)
        model = build()
        fit(model, switch(head_learning_rate=1e-3, verbose=0))
        return values_of(model)

    with_tries = trained()
    monkeypatch.setattr(StagedModel, "try_switches", lambda self, stage: None)
    assert trained() == with_tries


def test_a_tried_switch_traces_nothing(monkeypatch):
    calls = []
    wrapper = FrozenBackbone(models.functional(["dense"]))
    model = models.functional_outer(wrapper)
    model.compile("adam", "mse")
    original = FrozenBackbone.call
    monkeypatch.setattr(
        FrozenBackbone, "call", lambda self, *a, **k: calls.append(1) or original(self, *a, **k)
    )
    StagedModel(model, [Stage("all", 1e-4)], exactly=False).try_switches(0)
    assert calls == []


# Models with optimizers of their own.


class OwnOptimizer(keras.Model):
    """A model with a `train_step` that trains with another optimizer than `self.optimizer`."""

    def __init__(self):
        super().__init__()
        self.trained = build()

    def call(self, x):
        return self.trained(x)

    def compile(self, own, **arguments):
        super().compile(**arguments)
        self.own = own

    def train_step(self, *args):
        if keras.backend.backend() == "jax":
            return self._stateless_step(*args)
        import tensorflow as tf

        x, y = args[0]
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self(x, training=True) - y) ** 2)
        weights = self.trainable_weights
        self.own.apply(tape.gradient(loss, weights), weights)
        return {"loss": loss}

    def _stateless_step(self, state, data):
        return {"loss": keras.ops.mean(data[0])}, state


@pytest.mark.eager
@TORCH_HAS_NO_TAPE
def test_an_optimizer_that_keras_makes_by_default_beside_others_is_an_error_at_once():
    model = OwnOptimizer()
    model.compile(keras.optimizers.Adam())
    words = r"trains with optimizers of its own \(`own`\).*makes by default.*super\(\).compile"
    assert steps_until_error(model, switch(), words) == 0


@pytest.mark.eager
@TORCH_HAS_NO_TAPE
def test_an_optimizer_that_made_no_step_is_an_error_once_the_backbone_trains():
    model = OwnOptimizer()
    model.compile(keras.optimizers.Adam(), optimizer="adam")
    model.own.build(model.trained.weights)  # Or Keras refuses what it does not know.
    with pytest.warns(UserWarning, match="no step in this epoch.*looked at again once it trains"):
        # Two steps in each epoch, and the ends of those before the last.
        assert steps_until_error(model, switch(), "has made no step in this epoch") == 3 * 2 + 2


class OneForEach(OwnOptimizer):
    """A model that trains its backbone with `self.optimizer`, and the rest with another one."""

    def train_step(self, *args):
        import tensorflow as tf

        x, y = args[0]
        with tf.GradientTape(persistent=True) as tape:
            loss = tf.reduce_mean((self(x, training=True) - y) ** 2)
        weights = self.trainable_weights
        of_backbone = {id(one) for one in models.frozen_backbone_of(self.trained).weights}
        for optimizer, its in ((self.own, False), (self.optimizer, True)):
            pairs = zip(tape.gradient(loss, weights), weights, strict=True)
            pairs = [(grad, one) for grad, one in pairs if (id(one) in of_backbone) is its]
            if pairs:
                optimizer.apply(*zip(*pairs, strict=True))
        return {"loss": loss}


@pytest.mark.eager
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="its step uses a tape")
def test_an_optimizer_for_the_backbone_alone_is_no_error():
    model = OneForEach()
    model.compile(keras.optimizers.Adam(), optimizer=keras.optimizers.Adam(0.5), run_eagerly=True)
    model(X[:1])
    backbone = models.frozen_backbone_of(model.trained)
    before = Recorder(lambda _: values_of(backbone))
    with pytest.warns(UserWarning, match="looked at again once it trains"):
        model.fit(X, Y, epochs=4, verbose=0, callbacks=[switch(learning_rate=1e-3), before])
    first, second, third, fourth = before.records
    assert first == second
    assert second != third != fourth
    assert float(model.optimizer.learning_rate) == np.float32(1e-3)


class OwnStep(keras.Model):
    """A Functional model whose own step is that of Keras."""

    def train_step(self, *args, **kwargs):
        return super().train_step(*args, **kwargs)


@pytest.mark.eager
def test_a_step_of_ones_own_that_uses_the_optimizer_is_no_error():
    plain = build()
    model = OwnStep(plain.inputs, plain.outputs)
    model.compile("rmsprop", "mse")
    model.another = keras.optimizers.Adam()
    model.optimizer.learning_rate = 0.01
    callback = switch(verbose=0)
    fit(model, callback)
    assert callback.stage == 1


@pytest.mark.eager
def test_a_step_that_accumulates_gradients_is_a_step():
    plain = build()
    model = OwnStep(plain.inputs, plain.outputs)
    model.compile(keras.optimizers.SGD(0.01, gradient_accumulation_steps=4), "mse")
    callback = switch(verbose=0, max_frozen_epochs=1)
    fit(model, callback, epochs=2)
    assert callback.stage == 1


@pytest.mark.eager
def test_a_step_that_overflows_is_a_step():
    plain = build()
    model = OwnStep(plain.inputs, plain.outputs)
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(), initial_scale=2.0**127)
    model.compile(scaled, "mse")
    fit(model, switch(verbose=0, max_frozen_epochs=1), epochs=2)


@pytest.mark.parametrize("head_learning_rate", [None, 1e-3])
def test_no_slots_of_a_tried_switch_stay_alive(monkeypatch, head_learning_rate):
    made, build_optimizer = [], switching._build

    def noted(new, *rest):
        build_optimizer(new, *rest)
        made.extend(weakref.ref(variable) for variable in new.variables)

    monkeypatch.setattr(switching, "_build", noted)
    stage = Stage("all", 1e-4, head_learning_rate=head_learning_rate)
    StagedModel(build(), [stage], exactly=False).try_switches(0)
    assert made
    assert all(reference() is None for reference in made)
