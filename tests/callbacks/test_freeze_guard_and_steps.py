"""FreezeGuard and the steps that train: what a switch, a stale compile or a fault does to them."""

import keras
import numpy as np
import pytest

from keras_tl import (
    FreezeGuard,
    FrozenWeightsChangedError,
    StaleCompileError,
    UnfreezeAtConvergence,
    renew_optimizer,
)
from tests import models
from tests.callbacks.test_freeze_guard import DATA, At, add_one, build, caught, fit
from tests.shared import SEVERAL_STEPS, as_bytes, only_on, regression_data

pytestmark = pytest.mark.covers("part: FreezeGuard")

NOT_ON_JAX = pytest.mark.skipif(
    keras.backend.backend() == "jax",
    reason="On JAX, Keras refuses to train with an optimizer that was built for other weights.",
)


# Switches.


@pytest.mark.eager
@pytest.mark.parametrize("first", [True, False])
def test_a_switch_in_fit_is_followed(first, capsys):
    model, wrapper = build()
    guard = FreezeGuard(check="batch")
    switch = UnfreezeAtConvergence(0.01, max_frozen_epochs=1, verbose=0)
    before = as_bytes(wrapper.trainable_weights or wrapper.backbone.layers[1].weights)
    callbacks = [guard, switch] if first else [switch, guard]
    fit(model, *callbacks, validation_data=DATA)
    assert as_bytes(wrapper.backbone.layers[1].weights) != before
    # The BatchNormalization layer is what stays frozen.
    assert "all 4 weights that must not change" in capsys.readouterr().out


@pytest.mark.eager
def test_what_stays_frozen_is_watched_over_a_switch():
    model, wrapper = build()
    switch = UnfreezeAtConvergence(0.01, max_frozen_epochs=1, verbose=0)
    mean = models.statistics(wrapper)[0]
    overwrite = At("on_epoch_begin", 3, lambda _: add_one(mean))
    error = caught(model, switch, FreezeGuard(), overwrite, validation_data=DATA, epochs=3)
    assert error.paths == [mean.path]


@pytest.mark.eager
def test_unfreezing_and_compiling_between_fits_is_followed():
    model, wrapper = build()
    guard = FreezeGuard(verbose=0)
    fit(model, guard)
    before = as_bytes(wrapper.backbone.weights)
    wrapper.unfreeze()
    model.compile("adam", "mse")
    fit(model, guard)
    assert as_bytes(wrapper.backbone.weights) != before


# Somebody else unfreezes in mid-run.


def renewed_after(change):
    """A function that makes a change and has a running `fit` train what is trainable then."""

    def change_and_renew(model):
        change()
        model.optimizer = renew_optimizer(model.optimizer, variables=model.trainable_variables)
        model.make_train_function(force=True)

    return change_and_renew


def unfreezes(wrapper, layers="all"):
    return renewed_after(lambda: wrapper.unfreeze(layers))


@pytest.mark.eager
@pytest.mark.parametrize(
    ("hook", "guard_is_first"),
    [
        ("on_epoch_begin", True),
        ("on_epoch_end", False),
        pytest.param("on_epoch_begin", False, marks=pytest.mark.slow),
        pytest.param("on_epoch_end", True, marks=pytest.mark.slow),
    ],
)
def test_what_somebody_else_unfreezes_is_not_said_to_be_unchanged(hook, guard_is_first, capsys):
    model, wrapper = build()
    kernel = wrapper.backbone.layers[3].kernel
    before = np.array(kernel)
    guard, unfreeze = FreezeGuard(), At(hook, 2, unfreezes(wrapper, 1))
    fit(model, *([guard, unfreeze] if guard_is_first else [unfreeze, guard]), epochs=3)
    assert not np.array_equal(np.array(kernel), before)
    assert "all 6 weights that must not change (36 parameters)" in capsys.readouterr().out


@pytest.mark.eager
def test_what_is_unfrozen_when_training_has_ended_is_not_counted(capsys):
    model, wrapper = build(["dense"])
    fit(model, FreezeGuard(), At("on_epoch_end", 1, lambda _: wrapper.unfreeze()), epochs=1)
    assert "nothing is frozen at the end" in capsys.readouterr().out


@pytest.mark.eager
def test_what_stays_frozen_is_named_with_its_moments_after_somebody_else_unfroze():
    model, wrapper = build()
    mean = models.statistics(wrapper)[0]
    unfreeze = At("on_epoch_begin", 2, unfreezes(wrapper))
    overwrite = At("on_train_batch_end", 6, lambda _: add_one(mean))
    error = caught(model, unfreeze, overwrite, FreezeGuard(check="batch"))
    (change,) = error.changes
    assert (change.path, change.cause) == (mean.path, "overwritten")
    assert (str(change.last_clean), str(change.detected)) == (
        "epoch 2, batch 1",
        "epoch 2, batch 2",
    )


@pytest.mark.eager
@pytest.mark.parametrize("check", ["epoch", "batch"])
def test_unfreezing_for_a_part_of_an_epoch(check):
    model, wrapper = build(["dense"])

    guard = FreezeGuard(check=check, verbose=0)
    callbacks = [
        At("on_epoch_end", 2, renewed_after(wrapper.freeze)),
        guard,
        At("on_epoch_begin", 2, unfreezes(wrapper)),
    ]
    if check == "batch":  # At each batch it is seen to train by right.
        fit(model, *callbacks)
        return
    error = caught(model, *callbacks)
    assert error.paths == [weight.path for weight in wrapper.weights]
    assert {change.cause for change in error.changes} == {"trained in between, or overwritten"}
    assert "The model was compiled between the two moments" in str(error)


@pytest.mark.eager
def test_unfreezing_without_compiling_in_mid_run_is_a_stale_compile():
    model, wrapper = build(["dense"])
    with pytest.raises(StaleCompileError, match="unknown to the optimizer") as caught:
        fit(model, At("on_epoch_begin", 2, lambda _: wrapper.unfreeze()), FreezeGuard())
    assert list(caught.value.not_training) == [weight.path for weight in wrapper.weights]
    assert caught.value.changes == ()


# Stale compile.


def stale_by_freezing():
    model, wrapper = build()
    wrapper.unfreeze()
    model.compile("adam", "mse")
    fit(model)
    wrapper.freeze()
    return model, [
        w.path for w in wrapper.backbone.layers[1].weights + wrapper.backbone.layers[3].weights
    ]


def test_freezing_after_fit_without_compile_is_an_error_before_a_step():
    model, paths = stale_by_freezing()
    before = as_bytes(model.weights)
    with pytest.raises(StaleCompileError, match=r"Call `model.compile\(...\)` again") as caught:
        fit(model, FreezeGuard())
    assert list(caught.value.still_training) == paths
    assert caught.value.changes == ()
    assert as_bytes(model.weights) == before


@only_on("tensorflow", "torch looks at the flags at each step; on JAX Keras refuses the optimizer.")
def test_without_the_guard_keras_trains_on_what_was_frozen():
    model, _ = stale_by_freezing()
    kernel = model.layers[1].backbone.layers[1].kernel
    before = np.array(kernel)
    fit(model)
    assert not np.array_equal(np.array(kernel), before)


@pytest.mark.eager
def test_unfreezing_after_fit_without_compile_is_an_error_before_a_step():
    model, wrapper = build()
    fit(model)
    wrapper.unfreeze()
    before = as_bytes(model.weights)
    with pytest.raises(StaleCompileError, match="unknown to the optimizer") as caught:
        fit(model, FreezeGuard())
    assert len(caught.value.not_training) == 4
    assert as_bytes(model.weights) == before


def test_freezing_in_mid_fit_is_an_error_at_the_next_epoch():
    model, wrapper = build()
    wrapper.unfreeze()
    model.compile("adam", "mse")
    epochs = []
    count = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: epochs.append(epoch))
    with pytest.raises(StaleCompileError) as caught:
        fit(model, FreezeGuard(), At("on_epoch_end", 1, lambda _: wrapper.freeze()), count)
    assert epochs == [0]
    assert caught.value.changes == ()


@pytest.mark.eager
def test_freezing_between_compile_and_the_first_fit_is_no_error():
    model, wrapper = build()
    wrapper.unfreeze()
    model.compile("adam", "mse")
    wrapper.freeze()
    fit(model, FreezeGuard(verbose=0))


@pytest.mark.eager
@NOT_ON_JAX
def test_compiling_again_with_the_same_optimizer_is_no_error():
    optimizer = keras.optimizers.Adam(0.01)
    model, wrapper = build()
    wrapper.unfreeze()
    model.compile(optimizer, "mse")
    fit(model)
    wrapper.freeze()
    model.compile(optimizer, "mse")
    fit(model, FreezeGuard(verbose=0))


def test_compiling_again_with_the_same_averaging_optimizer_is_an_error():
    # Keras would write the averages back by position, to other weights than they are of.
    optimizer = keras.optimizers.Adam(0.01, use_ema=True)
    model, wrapper = build()
    wrapper.unfreeze()
    model.compile(optimizer, "mse")
    fit(model)
    wrapper.freeze()
    model.compile(optimizer, "mse")
    with pytest.raises(StaleCompileError):
        fit(model, FreezeGuard())


@pytest.mark.skipif(
    keras.backend.backend() == "torch",
    reason="torch traces no step, so a layer is frozen as soon as it is told to be.",
)
def test_batchnorm_without_weights_to_train_that_was_frozen_too_late_is_a_stale_compile():
    norm = keras.layers.BatchNormalization(center=False, scale=False)
    model = keras.Sequential([keras.Input((4,)), norm, keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    fit(model)
    norm.trainable = False
    with pytest.raises(StaleCompileError) as caught:
        fit(model, FreezeGuard())
    assert {change.cause for change in caught.value.changes} == {"stale compile"}


@pytest.mark.eager
@NOT_ON_JAX
@pytest.mark.parametrize("action", ["restore", pytest.param("warn", marks=pytest.mark.slow)])
def test_a_stale_compile_is_warned_of_once(action):
    model, _ = stale_by_freezing()
    guard = FreezeGuard(action=action, check="batch", verbose=0)
    with pytest.warns(UserWarning, match="stale compile") as warned:
        fit(model, guard)
    assert sum("made for other weights" in str(w.message) for w in warned) == 1


# Other causes.


@pytest.mark.eager
def test_batchnorm_in_training_mode():
    model, wrapper = build()
    wrapper.trainable = True
    model.compile("adam", "mse")
    x, _ = regression_data()
    call = At("on_train_batch_end", 2, lambda _: wrapper.backbone(x, training=True))
    error = caught(model, FreezeGuard(), call)
    assert error.paths == [weight.path for weight in models.statistics(wrapper)]
    assert {change.cause for change in error.changes} == {"BatchNormalization in training mode"}
    assert "FrozenBackbone" in str(error)


def test_the_guides_recipe_is_caught_where_it_drifts():
    base = models.functional(["dense", "batchnorm"])
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(1)(base(inputs, training=False)))
    model.compile("adam", "mse")
    statistics = models.statistics(base)
    before = as_bytes(statistics)
    try:
        fit(model, FreezeGuard(verbose=0))
    except FrozenWeightsChangedError as error:
        assert error.paths == [weight.path for weight in statistics]
        assert {c.cause for c in error.changes} == {"BatchNormalization in training mode"}
    else:
        assert as_bytes(statistics) == before, "this Keras drifts, and the guard did not say so"


@pytest.mark.eager
def test_load_weights_is_overwriting(tmp_path):
    model, wrapper = build()
    model.save_weights(tmp_path / "other.weights.h5")
    for weight in wrapper.backbone.weights:
        add_one(weight)
    model.compile("adam", "mse")
    load = At("on_epoch_end", 2, lambda m: m.load_weights(tmp_path / "other.weights.h5"))
    with pytest.warns(UserWarning, match="Skipping variable loading"):
        error = caught(model, load, FreezeGuard())
    assert error.paths == [weight.path for weight in wrapper.backbone.weights]
    assert {change.cause for change in error.changes} == {"overwritten"}


@pytest.mark.eager
def test_statistics_that_are_loaded_with_other_weights_are_overwritten():
    model, wrapper = build()
    wrapper.trainable = True
    wrapper.freeze(lambda layer: isinstance(layer, keras.layers.Dense))
    model.compile("adam", "mse")
    other = [np.array(weight) + 1 for weight in wrapper.backbone.weights]
    load = At("on_epoch_end", 1, lambda _: wrapper.backbone.set_weights(other))
    error = caught(model, load, FreezeGuard())
    assert len(error.changes) == 6
    assert {change.cause for change in error.changes} == {"overwritten"}


class HandsAllToTheOptimizer(keras.Model):
    """A train step that gives the optimizer frozen weights too, without a gradient."""

    @property
    def handed(self):
        return [w for layer in self.layers for w in layer.weights if "moving" not in w.path]

    def train_step(self, *given):
        *states, (x, y) = given
        if not states:
            return self.step(x, y)
        # On JAX the step is a function from the variables' values to new ones.
        owners = (
            self.trainable_variables,
            self.non_trainable_variables,
            self.optimizer.variables,
            self.metrics_variables,
        )
        values = [pair for one in zip(owners, *states) for pair in zip(*one, strict=True)]
        with keras.StatelessScope(values) as scope:
            logs = self.step(x, y)
        return logs, tuple([scope.get_current_value(v) for v in one] for one in owners)

    def step(self, x, y):
        self(x, training=True)
        weights = self.handed
        self.optimizer.apply([keras.ops.zeros(weight.shape) for weight in weights], weights)
        return {"loss": keras.ops.stop_gradient(self.compute_loss(x, y, self(x)))}


def handing(optimizer, **compile_arguments):
    base = models.functional(["dense", "batchnorm"])
    base.trainable = False
    inputs = keras.Input((4,))
    model = HandsAllToTheOptimizer(inputs, keras.layers.Dense(1)(base(inputs)))
    model.compile(optimizer, "mse", **compile_arguments)
    # `fit` would build it for the trainable weights alone, but on TensorFlow.
    optimizer.build(model.handed)
    # On JAX `fit` does so after an error too, for the trainable weights alone: another error.
    optimizer.finalize_variable_values = lambda weights: None
    return model, base


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
        lambda: keras.optimizers.SGD(
            0.01, use_ema=True, ema_momentum=0.3, ema_overwrite_frequency=1
        ),
    ],
    ids=["weight decay", "average"],
)
def test_side_effects_of_the_optimizer(optimizer):
    # The average of 0.12 and 0.12 is another number, unless JAX' compiler saves the rounding.
    model, base = handing(optimizer(), run_eagerly=keras.backend.backend() == "jax")
    base.layers[1].kernel.assign(np.full((4, 4), 0.12))
    error = caught(model, FreezeGuard())
    assert base.layers[1].kernel.path in error.paths
    assert {change.cause for change in error.changes} == {"optimizer side effect"}


@pytest.mark.eager
def test_an_optimizer_that_is_handed_frozen_weights_but_leaves_them_is_no_error():
    model, _ = handing(keras.optimizers.SGD(0.01))
    guard = FreezeGuard(verbose=0)
    fit(model, guard)
    fit(model, guard)


# Other ways to train.


@SEVERAL_STEPS
def test_several_steps_in_one_execution():
    model, wrapper = build(steps_per_execution=4)
    fit(model, FreezeGuard(check="batch", verbose=0))
    overwrite = At("on_train_batch_end", 2, lambda _: add_one(wrapper.backbone.weights[0]))
    error = caught(model, overwrite, FreezeGuard(check="batch"))
    assert str(error.changes[0].detected) == "epoch 2, batch 4"


@pytest.mark.slow
def test_mixed_precision():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model, wrapper = build()
        wrapper.unfreeze()
        model.compile("adam", "mse")
        fit(model, FreezeGuard(check="batch", verbose=0))
        wrapper.freeze()
        with pytest.raises(StaleCompileError):
            fit(model, FreezeGuard())
    finally:
        keras.config.set_dtype_policy("float32")
