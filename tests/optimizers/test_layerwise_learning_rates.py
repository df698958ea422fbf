"""Learning rates by layer: each variable trains as with an optimizer of its own."""

import copy
import pickle

import keras
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keras_tl import FrozenBackbone, GroupOptimizer, layerwise_learning_rates
from keras_tl.optimizers.learning_rates import LayerwiseLearningRates
from tests.optimizers.test_group_optimizer import OPTIMIZERS, SETTINGS
from tests.shared import SEVERAL_STEPS, as_bytes, examples, regression_data, slow_on, values_of

pytestmark = pytest.mark.covers("part: layerwise_learning_rates")

LAYERS = ("a", "b", "c")


def stack(seed=0):
    keras.utils.set_random_seed(seed)
    layers = [keras.layers.Dense(3, name=name) for name in LAYERS]
    return keras.Sequential([keras.Input((3,)), *layers])


# One multiplication more separates the two ways: the rates must be products in float32 in both.
def in_float32(rate, scale):
    return float(np.float32(rate) * np.float32(scale))


@given(
    kind=st.sampled_from(OPTIMIZERS),
    extra=st.sampled_from([{}, *[one for one in SETTINGS if "global_clipnorm" not in one]]),
    scales=st.lists(st.sampled_from([1.0, 0.5, 0.1, 0.03]), min_size=3, max_size=3),
    seed=st.integers(0, 100),
    steps=st.integers(1, 4),
)
@example(kind="Nadam", extra={}, scales=[1.0, 0.1, 0.5], seed=3, steps=4)
@settings(max_examples=examples(30))
def test_each_variable_trains_as_with_an_optimizer_of_its_own(kind, extra, scales, seed, steps):
    if kind == "ScheduleFreeAdamW" and "use_ema" in extra:
        extra = {}
    scales[0] = 1.0
    make = getattr(keras.optimizers, kind)
    together, alone = stack(seed), stack(seed)
    rates = LayerwiseLearningRates(together, dict(zip(LAYERS, [0.01 * s for s in scales])))
    optimizer = GroupOptimizer({"all": make(0.5, **extra)}, assign={"all": rates})
    exact = [rates[name] / rates.learning_rate for name in LAYERS]
    single = [make(in_float32(0.01, scale), **extra) for scale in exact]
    random = np.random.default_rng(seed)
    for _ in range(steps):
        gradients = [
            keras.ops.convert_to_tensor(random.normal(size=w.shape).astype("float32"))
            for w in together.trainable_variables
        ]
        optimizer.apply(gradients, together.trainable_variables)
        for index, (one, layer) in enumerate(zip(single, alone.layers, strict=True)):
            one.apply(gradients[2 * index : 2 * index + 2], layer.trainable_variables)

    assert [b for _, b in as_bytes(together.weights)] == [b for _, b in as_bytes(alone.weights)]


def test_the_rates_of_a_group_scale_with_it():
    # SGD's steps are its rates.
    model = stack()
    rates = layerwise_learning_rates(model, 0.5, decay=0.5)
    assert dict(rates) == {"a": 0.125, "b": 0.25, "c": 0.5}
    optimizer = GroupOptimizer({"all": keras.optimizers.SGD()}, assign={"all": rates})
    optimizer.build(model.trainable_variables)
    optimizer.learning_rate = 0.25
    before = [np.array(w) for w in model.weights]
    optimizer.apply([keras.ops.ones(w.shape) for w in model.weights], model.weights)
    steps = [
        float(np.mean(old - np.array(new))) for old, new in zip(before, model.weights, strict=True)
    ]
    np.testing.assert_allclose(steps, [0.0625, 0.0625, 0.125, 0.125, 0.25, 0.25], rtol=1e-6)


def build(**compile_arguments):
    keras.utils.set_random_seed(0)
    wrapper = FrozenBackbone(stack())
    wrapper.unfreeze()
    model = keras.Sequential([keras.Input((3,)), wrapper, keras.layers.Dense(1)])
    optimizer = GroupOptimizer(
        {"backbone": keras.optimizers.AdamW(), "head": keras.optimizers.AdamW(1e-2)},
        assign={"backbone": layerwise_learning_rates(wrapper, 1e-3, 0.5)},
    )
    model.compile(optimizer, "mse", **compile_arguments)
    return model


def fit(model, epochs=2):
    x, y = regression_data(features=3)
    return model.fit(x, y, batch_size=4, epochs=epochs, shuffle=False, verbose=0).history


@pytest.mark.parametrize(
    "arguments",
    [
        # torch compiles nothing unless it is told to: there this is the model as it is compiled.
        pytest.param({}, marks=slow_on("tensorflow", "jax")),
        pytest.param({"jit_compile": True}, marks=slow_on("torch")),
        pytest.param({"steps_per_execution": 4}, marks=[SEVERAL_STEPS, pytest.mark.slow]),
    ],
)
def test_in_fit_as_in_a_loop(arguments):
    model, plain = build(**arguments), build(run_eagerly=True)
    fit(model)
    fit(plain)
    for one, other in zip(model.weights, plain.weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
    assert float(model.optimizer.groups["backbone"].learning_rate) == np.float32(1e-3)


@pytest.mark.eager
def test_a_saved_model_goes_on_as_if_it_had_not_been_saved(tmp_path):
    model = build()
    fit(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    fit(model)
    fit(loaded)
    assert values_of(loaded) == values_of(model)


def test_every_layer_must_have_a_rate():
    model = stack()
    rates = LayerwiseLearningRates(model, {"a": 0.1, "b": 0.1})
    optimizer = GroupOptimizer({"all": keras.optimizers.SGD()}, assign={"all": rates})
    with pytest.raises(ValueError, match="There is no learning rate for '.*c/kernel'"):
        optimizer.build(model.trainable_variables)


def test_a_layer_brings_the_layers_in_it():
    inner = stack()
    inner.name = "inner"
    outer = keras.Sequential([keras.Input((3,)), inner])
    rates = LayerwiseLearningRates(outer, {"inner": 0.1, "inner/b": 0.2})
    assert [rates.of(weight) for weight in outer.weights] == [0.1, 0.1, 0.2, 0.2, 0.1, 0.1]


def test_reads_as_a_dictionary():
    rates = layerwise_learning_rates(stack(), 0.5, decay=0.5)
    assert "a" in rates
    assert "x" not in rates
    assert len(rates) == 3
    assert repr(rates) == "{'a': 0.125, 'b': 0.25, 'c': 0.5}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"learning_rate": 0.0}, "`learning_rate` must be a finite number above 0"),
        ({"learning_rate": lambda: 0.1}, "`learning_rate` must be a number here"),
        ({"decay": 0.0}, "`decay` must be above 0 and at most 1"),
        ({"decay": 1.5}, "`decay` must be above 0 and at most 1"),
        ({"decay": "0.5"}, "`decay` must be above 0 and at most 1"),
        ({"decay": True}, "`decay` must be above 0 and at most 1"),
    ],
)
def test_refuses_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        layerwise_learning_rates(
            **{"backbone": stack(), "learning_rate": 0.1, "decay": 0.5, **arguments}
        )


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        ({}, "The learning rates by layer are empty"),
        ({"bb": 0.1}, 'learning_rate="bb"` matches no layer'),
        ({"b": 0.0}, r"`learning_rate\['b'\]` must be a finite number"),
    ],
)
def test_refuses_rates_of_other_layers(rates, words):
    with pytest.raises(ValueError, match=words):
        LayerwiseLearningRates(stack(), rates)


def test_refuses_an_optimizer_with_a_schedule():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)
    rates = layerwise_learning_rates(stack(), 0.1, 0.5)
    with pytest.raises(ValueError, match="layer-wise learning rates would replace it"):
        GroupOptimizer({"all": keras.optimizers.SGD(schedule)}, assign={"all": rates})


@pytest.mark.parametrize(
    "wrap", [lambda one: one, FrozenBackbone, list], ids=["", "wrapper", "list"]
)
def test_a_deep_copy_is_for_the_same_weights(wrap):
    # KerasTuner copies callbacks, and with them what they were given.
    backbone = stack()
    given = wrap(backbone.layers if wrap is list else backbone)
    rates = layerwise_learning_rates(given, 0.1, 0.5)
    for twin in (copy.copy(rates), copy.deepcopy({"rates": rates})["rates"]):
        assert dict(twin) == dict(rates)
        assert [id(w) for w in twin.weights] == [id(w) for w in backbone.weights]
        assert [twin.of(w) for w in backbone.weights] == [rates.of(w) for w in backbone.weights]
    narrower = copy.copy(rates.restricted_to(backbone.weights[2:4]))
    assert [weight.path for weight in narrower.weights] == [w.path for w in backbone.weights[2:4]]


def test_what_is_loaded_from_a_pickle_is_for_the_weights_loaded_with_it():
    rates = layerwise_learning_rates(stack(), 0.1, 0.5)
    rates = rates.restricted_to(rates.backbone.weights[2:4])
    twin = pickle.loads(pickle.dumps(rates))
    assert dict(twin) == dict(rates)
    weights = rates.backbone.weights
    assert [twin.of(w) for w in twin.backbone.weights] == [rates.of(w) for w in weights]
    assert [id(w) for w in twin.weights] == [id(w) for w in twin.backbone.weights[2:4]]
    with pytest.raises(ValueError, match="There is no learning rate for"):
        twin.of(weights[0])
