"""The learning-rate range test: leaves everything as found, and suggests from the curve."""

import math
import random
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_tl import (
    FreezeGuard,
    FrozenBackbone,
    GroupOptimizer,
    find_learning_rate,
    learning_rate_finder,
)
from keras_tl.learning_rate_finder import LearningRateRange
from tests import models, strategies
from tests.shared import as_bytes, examples, regression_data, values_of

pytestmark = pytest.mark.covers("part: find_learning_rate")

X, Y = regression_data(32)


def build(optimizer=None, outer=models.functional_outer, backbone=None):
    wrapper = FrozenBackbone(backbone or models.functional(["dense", "batchnorm", "dense"]))
    head = [keras.layers.BatchNormalization(), keras.layers.Dropout(0.5)]
    model = outer(wrapper, head)
    model(X)
    model.compile(optimizer or keras.optimizers.SGD(0.01, momentum=0.9), "mse", metrics=["mae"])
    return model, wrapper


@pytest.fixture(scope="module")
def fitted():
    """A model that has been fitted, which nothing here may change."""
    keras.utils.set_random_seed(0)
    model, wrapper = build()
    model.fit(X, Y, epochs=1, verbose=0)
    return model, wrapper


def state_of(model):
    """All that a user can see of a model."""
    everything = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    return {
        "values": [(id(v), value) for v, (_, value) in zip(everything, as_bytes(everything))],
        "trainable": [weight.trainable for weight in model.weights],
        "optimizer": id(model.optimizer),
        "train_function": id(model.train_function),
        "test_function": id(model.test_function),
        "history": id(model.history),
        "stop_training": model.stop_training,
        "random": (random.getstate(), np.random.get_state()[1].tobytes()),
    }


def find(model, x=X, y=Y, **arguments):
    return find_learning_rate(
        model, x, y, **{"steps": 12, "batch_size": 8, "verbose": 0} | arguments
    )


@pytest.mark.eager
@given(
    layers=st.sampled_from([None, "all", 1]),
    train_batchnorm=st.booleans(),
    fault=st.sampled_from([None, ValueError, KeyboardInterrupt]),
    batch=st.integers(0, 11),
)
@settings(max_examples=examples(10))
def test_leaves_the_model_as_found(fitted, layers, train_batchnorm, fault, batch):
    model, _ = fitted
    before = state_of(model)
    batches = []

    class Faulty(keras.utils.PyDataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            batches.append(index)
            random.random(), np.random.random()
            if fault is not None and len(batches) > batch:
                raise fault
            return X[8 * index : 8 * index + 8], Y[8 * index : 8 * index + 8]

    arguments = {"layers": layers, "train_batchnorm": train_batchnorm, "batch_size": None}
    if fault is None:
        assert len(find(model, Faulty(), None, **arguments).losses) > 5
    else:
        with pytest.raises(BaseException) as raised:
            find(model, Faulty(), None, **arguments)
        assert isinstance(raised.value, (fault, tf.errors.OpError, RuntimeError))
    assert state_of(model) == before


ANY = {
    "backbone": strategies.backbone_makers(),
    "optimizer": strategies.optimizers(),
    "outer": strategies.outer_models,
    "layers": st.sampled_from([None, "all"]),
}


@pytest.mark.eager
@given(**ANY)
@settings(max_examples=examples(6))
def test_a_fit_after_it_is_as_without_it(backbone, optimizer, outer, layers):
    check_fit_after_it(backbone, optimizer, outer, layers)


@pytest.mark.slow
@given(**ANY)
@settings(max_examples=examples(6))
def test_a_fit_after_it_is_as_without_it_where_steps_are_compiled(
    backbone, optimizer, outer, layers
):
    check_fit_after_it(backbone, optimizer, outer, layers)


@pytest.mark.slow
def test_a_compiled_step_after_it_is_as_without_it():
    check_fit_after_it(
        lambda: models.functional(["dense", "batchnorm"]),
        keras.optimizers.Adam(0.01),
        models.functional_outer,
        "all",
    )


def check_fit_after_it(backbone, optimizer, outer, layers):
    config = keras.optimizers.serialize(optimizer)
    results = []
    for searched in (False, True):
        keras.utils.set_random_seed(1)
        model, _ = build(keras.optimizers.deserialize(config), outer, backbone())
        # A first fit would draw a batch to build the metrics by, on JAX and torch.
        model.evaluate(X, Y, verbose=0)
        if searched:
            find(model, layers=layers)
        model.fit(X, Y, batch_size=8, epochs=1, callbacks=[FreezeGuard(verbose=0)], verbose=0)
        results.append(values_of(model))
    assert results[0] == results[1]


@pytest.mark.eager
def test_leaves_arrays_and_the_order_of_a_pydataset_as_found(fitted):
    class Shuffling(keras.utils.PyDataset):
        def __init__(self):
            super().__init__()
            self.order = np.arange(4)

        def __len__(self):
            return 4

        def __getitem__(self, index):
            part = slice(8 * self.order[index], 8 * self.order[index] + 8)
            return X[part], Y[part]

        def on_epoch_end(self):
            np.random.default_rng(0).shuffle(self.order)

    data = Shuffling()
    before = X.tobytes(), Y.tobytes()
    find(fitted[0], data, None, batch_size=None)
    assert data.order.tolist() == [0, 1, 2, 3]
    assert (X.tobytes(), Y.tobytes()) == before


@pytest.mark.eager
def test_tries_rising_rates_each_on_a_batch(fitted):
    found = find(fitted[0], min_learning_rate=1e-6, max_learning_rate=1e-1, steps=10)
    assert len(found.learning_rates) == len(found.losses) == len(found.smoothed_losses) == 10
    np.testing.assert_allclose(found.learning_rates, np.geomspace(1e-6, 1e-1, 10))


@pytest.mark.eager
def test_the_loss_is_that_of_each_step():
    # At a rate that moves nothing, the losses are those of the batches, which differ.
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    batches = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)
    found = find(
        model, batches, None, batch_size=None, min_learning_rate=1e-30, max_learning_rate=1e-29
    )
    expected = [model.evaluate(*batch, verbose=0) for batch in batches] * 3
    np.testing.assert_allclose(found.losses, expected, rtol=1e-5)


@pytest.mark.eager
def test_smoothing_is_an_average_without_bias():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    found = find(model, min_learning_rate=1e-8, max_learning_rate=1e-2)
    weights = 0.98 ** np.arange(12)[::-1]
    for count in (1, 5, 12):
        expected = np.average(found.losses[:count], weights=weights[-count:])
        np.testing.assert_allclose(found.smoothed_losses[count - 1], expected, rtol=1e-6)


def test_ends_when_the_loss_diverges():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    found = find(model, max_learning_rate=1e3, steps=200)
    assert len(found.losses) < 200
    assert max(found.smoothed_losses[:-1]) <= 4 * min(found.smoothed_losses)
    assert found.smoothed_losses[-1] > 4 * min(found.smoothed_losses)
    assert 1e-4 < found.suggestion < 10


@pytest.mark.eager
@pytest.mark.parametrize(("unfrozen", "layers", "count"), [(False, "all", 4), (True, 1, 2)])
def test_just_the_layers_of_a_stage_train(unfrozen, layers, count):
    model, wrapper = build()
    if unfrozen:
        wrapper.unfreeze()
    before = [weight.trainable for weight in model.weights]
    trained = []
    original = model.make_train_function

    def noted(force=False):
        trained.append(len(wrapper.trainable_weights))
        return original(force=force)

    model.make_train_function = noted
    find(model, layers=layers)
    assert trained[0] == count
    assert [weight.trainable for weight in model.weights] == before


@pytest.mark.eager
def test_loss_scale_of_mixed_precision_is_left_as_found():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model, _ = build()
        model.fit(X, Y, epochs=1, verbose=0)
        before = state_of(model)
        assert math.isfinite(find(model, layers="all").losses[0])
        assert state_of(model) == before
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.eager
def test_groups_keep_their_ratio():
    wrapper = FrozenBackbone(models.functional(["dense"]))
    wrapper.unfreeze()
    optimizer = GroupOptimizer(
        {"backbone": keras.optimizers.SGD(1e-3), "head": keras.optimizers.SGD(1e-2)},
        assign={"backbone": wrapper},
    )
    model = models.functional_outer(wrapper)
    model.compile(optimizer, "mse")
    before = as_bytes(model.weights)
    assert len(find(model).losses) == 12
    assert as_bytes(model.weights) == before
    rates = [float(one.learning_rate) for one in optimizer.groups.values()]
    np.testing.assert_allclose(rates, [1e-3, 1e-2], rtol=1e-6)


# The suggestions.


def valley(falls_from=30, falls_to=70, count=100):
    rates = np.geomspace(1e-7, 10, count)
    losses = np.full(count, 2.0)
    losses[:falls_from] += 1e-3 * (np.arange(falls_from) % 3)
    losses[falls_from:falls_to] = np.linspace(2, 1, falls_to - falls_from)
    losses[falls_to:] = np.linspace(1, 3, count - falls_to)
    return LearningRateRange(tuple(rates), tuple(losses), tuple(losses))


def test_suggests_the_middle_of_the_valley():
    found = valley()
    rates = found.learning_rates
    assert rates[45] <= found.suggestion <= rates[55]
    assert found.suggestion == found.suggestions["valley"]


def test_suggests_where_the_loss_falls_fastest():
    rates = np.geomspace(1e-5, 1, 50)
    losses = 2 - 1 / (1 + np.exp(-(np.arange(50) - 24.5)))
    found = LearningRateRange(tuple(rates), tuple(losses), tuple(losses))
    assert found.suggestions["steepest"] == pytest.approx(rates[24])


def test_suggests_a_tenth_of_the_rate_of_the_minimum():
    found = valley()
    assert found.suggestions["minimum"] == pytest.approx(found.learning_rates[69] / 10)


def test_suggests_nothing_if_the_loss_never_falls():
    rates, losses = np.geomspace(1e-5, 1, 50), np.linspace(1, 2, 50)
    found = LearningRateRange(tuple(rates), tuple(losses), tuple(losses))
    assert found.suggestions == {"valley": None, "steepest": None, "minimum": None}
    assert str(found).endswith("valley none, steepest none, minimum none.")


def converged(seed=0, level=0.1, spread=1.0, rises_at=60, count=100):
    """Losses that stay as they are but for noise, and rates from 1e-7 to 10."""
    noise = np.random.default_rng(seed).lognormal(0.0, spread, count)
    losses = level * noise
    losses[rises_at:] += 2.3 * np.geomspace(1, 100, count - rises_at)
    return np.geomspace(1e-7, 10, count), losses.tolist()


def outcome_of(rates, losses, stop_at=4.0):
    """What the test makes of losses that a model would have."""
    test = learning_rate_finder._RangeTest(list(rates), stop_at, verbose=0)
    test.set_model(types.SimpleNamespace(stop_training=False))
    for batch, loss in enumerate(losses):
        test.on_train_batch_end(batch, {"loss": loss})
        if test.model.stop_training:
            break
    return LearningRateRange(tuple(test.learning_rates), tuple(test.losses), tuple(test.smoothed))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("level", "spread"), [(1e-6, 0.1), (1e-6, 1.0), (0.1, 0.1), (0.1, 1.0), (3.0, 0.1)]
)
def test_suggests_a_rate_below_that_at_which_the_loss_of_a_converged_head_rises(
    seed, level, spread
):
    rates, losses = converged(seed, level, spread)
    found = outcome_of(rates, losses)
    assert len(found.losses) > 60
    # By the noise of some batches later, if losses are high already.
    assert rates[60] / 4 < found.suggestion < rates[66]
    assert found.suggestion == found.suggestions["rise"]
    assert found.suggestions["valley"] is None


def test_one_batch_of_a_high_loss_is_no_divergence():
    rates, losses = converged(level=1e-4)
    for batch in (1, 2, 12, 30, 31):
        losses[batch] = 5.0
    found = outcome_of(rates, losses)
    assert len(found.losses) > 60
    assert rates[60] / 4 < found.suggestion < rates[70]


def test_a_loss_that_has_become_high_ends_the_test():
    rates, losses = converged()
    found = outcome_of(rates, losses)
    assert 60 < len(found.losses) < 80


def test_a_loss_that_falls_and_rises_has_its_valley():
    losses = [2.0 + 0.1 * (i % 3) for i in range(40)]
    losses += [*np.linspace(2.0, 0.2, 30), *np.geomspace(0.2, 100, 30)]
    rates = np.geomspace(1e-7, 10, 100)
    found = outcome_of(rates, losses)
    assert set(found.suggestions) == {"valley", "steepest", "minimum"}
    assert rates[40] < found.suggestion < rates[70]


@pytest.mark.eager
def test_a_converged_model_is_left_a_rate():
    # Its loss is all noise: 1e-3 at the most, of targets that it knows but for that much.
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    kernel = np.ones((4, 1), "float32")
    model.set_weights([kernel, np.zeros(1, "float32")])
    noise = np.random.default_rng(0).standard_cauchy((64, 1)).astype("float32")
    y = X.repeat(2, 0) @ kernel + 1e-3 * noise
    found = find(model, X.repeat(2, 0), y, steps=100, batch_size=8)
    assert len(found.losses) > 50
    assert 1e-5 < found.suggestion < 1


def test_plots_its_curve_and_suggestions():
    pytest.importorskip("matplotlib")
    figure = valley().plot()
    (ax,) = figure.axes
    assert ax.get_xscale() == "log"
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert [label.split(":")[0] for label in labels] == [
        "loss of the batch",
        "smoothed",
        "valley",
        "steepest",
        "minimum",
    ]
    assert valley().plot(ax) is figure
    for mark in (line for line in ax.lines if len(line.get_xdata()) == 1):
        after = np.searchsorted(valley().learning_rates, mark.get_xdata()[0])
        assert mark.get_ydata()[0] in valley().smoothed_losses[after - 1 : after + 1]


@pytest.mark.eager
def test_shows_a_progress_bar(fitted, capsys):
    find(fitted[0], steps=10, verbose=1)
    assert "10/10" in capsys.readouterr().out
    find(fitted[0], steps=10, verbose=0)
    assert capsys.readouterr().out == ""


# Refusals.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"min_learning_rate": 0.0}, "`min_learning_rate` must be a finite number above 0"),
        ({"max_learning_rate": math.inf}, "`max_learning_rate` must be a finite number above 0"),
        ({"max_learning_rate": 1e-9}, "`min_learning_rate` must be below `max_learning_rate`"),
        ({"stop_at": 1.0}, "`stop_at` above 1"),
        ({"steps": 9}, "`steps` must be an int of at least 10"),
        ({"layers": "nothing"}, 'layers="nothing"` matches no layer'),
        ({"x": iter([(X, Y)]), "y": None, "batch_size": None}, "is a generator or iterator"),
        ({"y": np.full_like(Y, np.nan)}, "The loss is not finite after 0 steps"),
    ],
)
def test_refuses_bad_arguments(fitted, arguments, words):
    before = state_of(fitted[0])
    with pytest.raises(ValueError, match=words):
        find(fitted[0], **arguments)
    assert state_of(fitted[0]) == before


def test_refuses_a_model_that_is_not_ready():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    with pytest.raises(ValueError, match="Compile the model"):
        find(model)
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="is not built"):
        find(model)


def test_refuses_groups_with_a_schedule():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)
    model, _ = build(GroupOptimizer({"all": keras.optimizers.SGD(schedule)}))
    with pytest.raises(ValueError, match="`find_learning_rate` needs learning rates"):
        find(model)


@pytest.mark.eager
def test_a_schedule_of_one_optimizer_is_replaced_and_put_back():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)
    model, _ = build(keras.optimizers.SGD(schedule))
    optimizer = model.optimizer
    assert len(find(model).losses) == 12
    assert model.optimizer is optimizer


@pytest.mark.eager
def test_refuses_a_step_that_tells_no_loss():
    class Silent(keras.Model):
        def train_step(self, *state_and_data):
            if keras.backend.backend() == "jax":
                return {"other": 1.0}, state_and_data[0]
            return {"other": 1.0}

    inputs = keras.Input((4,))
    model = Silent(inputs, keras.layers.Dense(1)(inputs))
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="returns no `loss`.*It returns: other"):
        find(model)
