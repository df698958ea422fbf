"""FreezeGuard is silent in every clean run, and names each fault at the first check after it."""

import dataclasses

import hypothesis
import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_tl import (
    FreezeGuard,
    FrozenBackbone,
    FrozenWeightsChangedError,
    StaleCompileError,
    UnfreezeAtConvergence,
)
from keras_tl.backbone.changeable import constant_weights
from tests import models, strategies
from tests.shared import as_bytes, examples, only_on, regression_data

BATCHES = 4

eagerly = st.sampled_from([True, True, True, False])
frequencies = st.sampled_from(["epoch", "batch", 2, 3])
ON_TORCH = keras.backend.backend() == "torch"  # Which takes one step at a time.


@dataclasses.dataclass
class Run:
    """A model to train, some of whose layers are frozen, and how."""

    model: keras.Model
    base: keras.Layer
    wrapper: FrozenBackbone | None
    optimizer: keras.Optimizer
    loss: str
    run_eagerly: bool
    steps_per_execution: int
    make_optimizer: object

    def compile(self, optimizer=None):
        self.model.compile(
            optimizer or self.make_optimizer(),
            self.loss,
            run_eagerly=self.run_eagerly,
            steps_per_execution=self.steps,
        )

    @property
    def steps(self):
        """How many steps there are between two calls of a hook."""
        return 1 if self.run_eagerly or ON_TORCH else self.steps_per_execution

    def fit(self, *callbacks, epochs=2):
        x, y = regression_data()
        self.model.fit(
            x,
            y,
            batch_size=len(x) // BATCHES,
            epochs=epochs,
            validation_data=(x, y),
            callbacks=list(callbacks),
            verbose=0,
        )


@st.composite
def optimizer_makers(draw):
    rate = draw(st.sampled_from([1e-3, 1e-2]))
    extra = draw(
        st.sampled_from(
            [
                {},
                {"weight_decay": 0.1},
                {"use_ema": True},
                {"use_ema": True, "ema_overwrite_frequency": 2},
                {"gradient_accumulation_steps": 2},
                {"global_clipnorm": 0.1},
            ]
        )
    )
    kind = draw(st.sampled_from(["SGD", "Adam", "AdamW", "RMSprop", "Lion"]))
    return lambda: getattr(keras.optimizers, kind)(rate, **extra)


@st.composite
def runs(draw, wrapped=None):
    """A function that makes a `Run`: weights are drawn outside of strategies."""
    make_backbone = draw(strategies.backbone_makers())
    outer = draw(strategies.outer_models)
    make_optimizer = draw(optimizer_makers())
    loss = draw(strategies.losses)
    run_eagerly = draw(eagerly)
    steps_per_execution = draw(st.sampled_from([1, 1, 2, 4]))
    wrap = draw(st.booleans()) if wrapped is None else wrapped
    inference_mode = draw(st.sampled_from(["always", "batchnorm"]))

    def make():
        base = make_backbone()
        wrapper = FrozenBackbone(base, inference_mode=inference_mode) if wrap else None
        base.trainable = False
        head = [keras.layers.BatchNormalization(), keras.layers.Dropout(0.5)]
        model = outer(wrapper or base, head)
        model(regression_data()[0])
        run = Run(
            model, base, wrapper, None, loss, run_eagerly, steps_per_execution, make_optimizer
        )
        run.compile()
        return run

    return make


class At(keras.callbacks.Callback):
    """Calls a function after one batch of the whole `fit`, counted from 1."""

    def __init__(self, batch, function):
        super().__init__()
        self.batch = batch
        self.function = function
        self.epoch = 0
        self.done = False

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if not self.done and self.epoch * BATCHES + batch + 1 >= self.batch:
            self.done = True
            _ = self.model  # Gives the variables their values, on JAX.
            self.function()


def detected(check, batch, steps):
    """Epoch and batch of the first check after something that batch `batch` did, both from 0."""
    batch = -(-batch // steps) * steps  # The hook is called once for several steps.
    epoch, index = divmod(batch - 1, BATCHES)
    every = {"epoch": BATCHES, "batch": 1}.get(check, check)
    last = -1
    for ended in range(steps - 1, BATCHES, steps):
        if ended - last >= every:
            last = ended
            if ended >= index:
                return epoch, ended
    return epoch, BATCHES - 1


# Clean runs.


def train_cleanly(make_run, check, switch, again):
    """Trains without a fault, with a switch in `fit` or an unfreezing between two, or neither."""
    run = make_run()
    guard = FreezeGuard(check=check, verbose=0)
    before = as_bytes(constant_weights(run.model))
    callbacks = [guard]
    if switch != "none":
        backbone = None if run.wrapper else run.base
        unfreezing = UnfreezeAtConvergence(
            1e-3, backbone=backbone, max_frozen_epochs=1, fine_tune_patience=1, verbose=0
        )
        callbacks = [guard, unfreezing] if switch == "behind" else [unfreezing, guard]
    run.fit(*callbacks, epochs=3 if switch != "none" else 2)
    if switch == "none":
        assert as_bytes(constant_weights(run.model)) == before
    if again:
        if run.wrapper:
            run.wrapper.unfreeze()
        run.compile()
        run.fit(guard, epochs=1)


clean = {
    "make_run": runs(),
    "check": frequencies,
    "switch": st.sampled_from(["none", "none", "before", "behind"]),
    "again": st.booleans(),
}


@given(**clean)
@settings(max_examples=examples(10))
def test_a_clean_run_never_trips_the_guard(make_run, check, switch, again):
    train_cleanly(make_run, check, switch, again)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(40))
def test_a_thousand_clean_runs_never_trip_the_guard(chunk):
    @hypothesis.seed(chunk)
    @given(**clean)
    @settings(max_examples=examples(25), derandomize=False)
    def run(make_run, check, switch, again):
        train_cleanly(make_run, check, switch, again)

    run()


# Faults.


def error_of(run, guard, *callbacks, batch=None, check=None):
    with pytest.raises(FrozenWeightsChangedError) as caught:
        run.fit(*callbacks, guard)
    if batch is not None:
        moments = {(c.detected.epoch, c.detected.batch) for c in caught.value.changes}
        assert moments == {detected(check, batch, run.steps)}
    return caught.value


def causes_of(error):
    return {change.cause for change in error.changes}


@given(
    make_run=runs(),
    check=frequencies,
    batch=st.integers(1, 2 * BATCHES),
    data=st.data(),
    relative=st.booleans(),
)
@settings(max_examples=examples(12))
def test_an_overwritten_weight_is_named(make_run, check, batch, data, relative):
    run = make_run()
    weights = constant_weights(run.model)
    weight = data.draw(st.sampled_from(weights))

    def overwrite():
        value = np.array(weight).reshape(-1)
        value[0] = np.nextafter(value[0], np.float32(9)) if relative else value[0] + 1
        weight.assign(value.reshape(weight.shape))

    error = error_of(run, FreezeGuard(check=check), At(batch, overwrite), batch=batch, check=check)

    assert error.paths == [weight.path]
    assert causes_of(error) == {"overwritten"}


@pytest.mark.slow
@given(make_run=runs(), check=frequencies, batch=st.integers(1, 2 * BATCHES))
@settings(max_examples=examples(10))
def test_loaded_weights_are_overwriting(make_run, check, batch):
    run = make_run()
    other = [np.array(weight) + 1 for weight in run.model.weights]
    load = At(batch, lambda: run.model.set_weights(other))

    error = error_of(run, FreezeGuard(check=check), load, batch=batch, check=check)

    assert error.paths == [weight.path for weight in constant_weights(run.model)]
    assert causes_of(error) == {"overwritten"}


@pytest.mark.slow
@given(
    make_run=runs(wrapped=True),
    check=frequencies,
    batch=st.integers(1, 2 * BATCHES),
    flags=st.sampled_from(["all", "batchnorm"]),
)
@settings(max_examples=examples(10))
def test_statistics_moved_by_a_call_in_training_mode_are_named(make_run, check, batch, flags):
    run = make_run()
    statistics = models.statistics(run.base)
    hypothesis.assume(statistics)
    if flags == "all":
        run.wrapper.trainable = True
    else:
        run.wrapper.unfreeze(train_batchnorm=True)
    run.compile()
    x, _ = regression_data()
    # Directly, not through the wrapper.
    call = At(batch, lambda: run.base(3 * x + 2, training=True))

    error = error_of(run, FreezeGuard(check=check), call, batch=batch, check=check)

    assert {change.path for change in error.changes} <= {weight.path for weight in statistics}
    assert causes_of(error) == {"BatchNormalization in training mode"}


@pytest.mark.slow
@given(make_run=runs(), freeze=st.booleans(), check=frequencies)
@settings(max_examples=examples(15))
def test_a_stale_compile_is_an_error_before_a_step(make_run, freeze, check):
    run = make_run()
    run.base.trainable = freeze
    run.compile()
    run.fit(epochs=1)
    run.base.trainable = not freeze
    before = as_bytes(run.model.weights)

    error = error_of(run, FreezeGuard(check=check))

    assert isinstance(error, StaleCompileError)
    named = error.still_training if freeze else error.not_training
    assert set(named) == trained_paths(run.base)
    assert as_bytes(run.model.weights) == before


def trained_paths(base):
    statistics = {weight.path for weight in models.statistics(base)}
    return {weight.path for weight in base.weights} - statistics


@keras.saving.register_keras_serializable(package="tests")
class HandsAllToTheOptimizer(keras.Model):
    """Its train step gives the optimizer frozen weights too, with gradients of zero."""

    def train_step(self, data):
        x, y = data
        loss = self.compute_loss(x, y, self(x, training=True))
        weights = [w for w in self.weights if w.name not in ("moving_mean", "moving_variance")]
        self.optimizer.apply([keras.ops.zeros_like(weight) for weight in weights], weights)
        return {"loss": loss}


@pytest.mark.slow
@only_on("tensorflow", "A step of one's own is written for one backend.")
@given(
    kinds=strategies.layer_kinds(min_size=3),
    check=frequencies,
    make_optimizer=st.sampled_from(
        [
            lambda: keras.optimizers.AdamW(1e-2, weight_decay=0.1),
            lambda: keras.optimizers.SGD(1e-2, weight_decay=0.1),
            lambda: keras.optimizers.Adam(
                1e-2, use_ema=True, ema_momentum=0.3, ema_overwrite_frequency=1
            ),
        ]
    ),
    run_eagerly=st.booleans(),
)
@settings(max_examples=examples(10))
def test_a_side_effect_of_the_optimizer_is_named(kinds, check, make_optimizer, run_eagerly):
    base = models.functional(kinds)
    base.trainable = False
    random = np.random.default_rng(0)
    for weight in base.weights:
        # An average of equal values rounds to another one for a few numbers in a hundred.
        weight.assign(random.uniform(0.5, 1.5, weight.shape))
    inputs = keras.Input((models.FEATURES,))
    model = HandsAllToTheOptimizer(inputs, keras.layers.Dense(1)(base(inputs)))
    model.compile(make_optimizer(), "mse", run_eagerly=run_eagerly)
    x, y = regression_data()

    with pytest.raises(FrozenWeightsChangedError) as caught:
        model.fit(x, y, batch_size=4, epochs=2, callbacks=[FreezeGuard(check=check)], verbose=0)

    assert causes_of(caught.value) == {"optimizer side effect"}
    assert set(caught.value.paths) <= trained_paths(base)
    assert caught.value.changes[0].detected.epoch == 0
