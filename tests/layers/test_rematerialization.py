"""A backbone whose activations are computed again in the backward pass."""

import copy

import keras
import numpy as np
import pytest

from keras_tl import FreezeGuard, FrozenBackbone, UnfreezeAtConvergence, unwrap
from tests import models
from tests.shared import as_bytes, only_on, regression_data

LAYERS = keras.layers
BACKEND = keras.backend.backend()


@keras.saving.register_keras_serializable(package="tests")
class Counted(LAYERS.Layer):
    """A layer that counts how often its computation is written down."""

    calls = 0

    def call(self, x):
        Counted.calls += 1
        return keras.ops.tanh(x)


@keras.saving.register_keras_serializable(package="tests")
class AlwaysNoisy(LAYERS.Layer):
    """A layer that draws in inference mode too."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed_generator = keras.random.SeedGenerator(3)

    def call(self, x):
        noise = keras.random.uniform(keras.ops.shape(x), seed=self.seed_generator)
        return keras.ops.tanh(x * noise)


@keras.saving.register_keras_serializable(package="tests")
class Insisting(LAYERS.Layer):
    """A layer that calls its BatchNormalization in training mode, whatever it is called with."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = LAYERS.BatchNormalization()

    def build(self, input_shape):
        self.norm.build(input_shape)

    def call(self, x):
        return self.norm(x, training=True)


def dense(**kwargs):
    return LAYERS.Dense(4, activation="tanh", **kwargs)


def chain(*first, n=10):
    return models.sequential_of(*first, *[dense() for _ in range(n)])


def residual():
    x = inputs = keras.Input((4,))
    for _ in range(5):
        y = LAYERS.BatchNormalization(momentum=0.5)(dense()(x))
        x = x + y
    return keras.Model(inputs, x)


def nested():
    inner = residual()
    shared = dense()
    x = inputs = keras.Input((4,))
    for _ in range(4):
        x = shared(dense()(x))
    x = inner(x)
    for _ in range(4):
        x = shared(dense()(x))
    return keras.Model(inputs, x)


def masked():
    inputs = keras.Input((4,))
    x = LAYERS.Embedding(99, 4, mask_zero=True)(keras.ops.cast(keras.ops.abs(inputs) * 4, "int32"))
    for _ in range(8):
        x = dense()(x)
    return keras.Model(inputs, LAYERS.GlobalAveragePooling1D()(x))


def regularized():
    return chain(dense(activity_regularizer=keras.regularizers.L2(0.1)))


def noisy():
    return chain(dense(), AlwaysNoisy())


def insisting():
    return chain(dense(), Insisting())


def half():
    layers = [dense(dtype="mixed_bfloat16") for _ in range(10)]
    return keras.Sequential([keras.Input((4,)), *layers], name="half")


def two_outputs():
    inputs = keras.Input((4,))
    early = dense()(inputs)
    late = chain()(chain()(early))
    return keras.Model(inputs, [early, late])


def compiled(base, rematerialize, **kwargs):
    wrapper = FrozenBackbone(base, rematerialize=rematerialize, **kwargs)
    inputs = keras.Input((4,))
    x = wrapper(inputs)
    x = LAYERS.concatenate(x) if isinstance(x, list) else x
    outputs = LAYERS.Dense(1, name="head")(x)
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model, wrapper


def trained(build, rematerialize, steps=2):
    """The losses and weights of a model after some steps, all of which trains."""
    keras.utils.set_random_seed(0)
    model, wrapper = compiled(build(), rematerialize)
    wrapper.unfreeze("all", train_batchnorm=True)
    x, y = regression_data()
    losses = [model.train_on_batch(x, y) for _ in range(steps)]
    return losses, [keras.ops.convert_to_numpy(weight) for weight in model.weights], model


@pytest.mark.covers("layer: FrozenBackbone(rematerialize=True)")
@pytest.mark.eager
@pytest.mark.parametrize(
    "build", [chain, residual, nested, masked, regularized, half, two_outputs, noisy, insisting]
)
def test_trains_as_without(build):
    check_trains_as_without(build)


def test_trains_as_without_where_steps_are_traced():
    check_trains_as_without(residual)


def check_trains_as_without(build):
    losses, weights, _ = trained(build, False)
    again, recomputed, _ = trained(build, True)

    bound = {"rtol": 0, "atol": 0}
    # XLA fuses other operations on JAX; and what a weight gets in several places, as that of an
    # embedding does, is summed in another order.
    if BACKEND == "jax" or build in (nested, masked):
        bound = {"rtol": 2e-6, "atol": 1e-6}
    if BACKEND == "jax" and build is half:
        bound = {"rtol": 2e-2, "atol": 2e-3}
    np.testing.assert_allclose(losses, again, **bound)
    for one, other in zip(weights, recomputed, strict=True):
        np.testing.assert_allclose(one, other, **bound)
    assert any(
        np.any(one != start)
        for one, start in zip(recomputed, trained(build, True, steps=0)[1], strict=True)
    )


def test_masks_reach_later_segments():
    base = keras.Sequential(
        [keras.Input((4, 4)), *[dense() for _ in range(8)], LAYERS.GlobalAveragePooling1D()]
    )
    wrapper = FrozenBackbone(base, rematerialize=True)
    wrapper.unfreeze("all")
    x = np.random.default_rng(0).normal(size=(2, 4, 4)).astype("float32")
    mask = np.array([[True, True, False, False], [True, False, False, True]])

    def values(layer, **arguments):
        return keras.ops.convert_to_numpy(layer(keras.ops.convert_to_tensor(x), **arguments))

    expected = values(base, mask=keras.ops.convert_to_tensor(mask))
    found = values(wrapper, mask=keras.ops.convert_to_tensor(mask))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.any(values(wrapper) != found)


@pytest.mark.eager
@pytest.mark.skipif(BACKEND == "jax", reason="JAX computes again what it has written down once.")
def test_computes_again_only_what_trains():
    base = chain(*[Counted() for _ in range(6)])
    model, wrapper = compiled(base, True)
    x, y = regression_data()

    def calls():
        model.train_on_batch(x, y)  # Keras may build its metrics first.
        before = Counted.calls
        model.train_on_batch(x, y)
        return Counted.calls - before

    assert calls() == 6
    wrapper.unfreeze("all")
    model.compile("sgd", "mse")
    assert calls() == 6
    base = models.sequential_of(dense(), *[Counted() for _ in range(12)])
    model, wrapper = compiled(base, True)
    wrapper.unfreeze("all")
    assert 12 < calls() < 24


@only_on("jax", "JAX alone writes down what is computed again.")
def test_segments_are_written_down_as_such():
    import jax

    model, wrapper = compiled(chain(), True)
    x, _ = regression_data()

    def forward(trainable, frozen):
        return model.stateless_call(trainable, frozen, x, training=True)[0]

    def written():
        values = [
            [weight.value for weight in weights]
            for weights in (model.trainable_variables, model.non_trainable_variables)
        ]
        return str(jax.make_jaxpr(forward)(*values))

    assert "remat" not in written() and "checkpoint" not in written()
    wrapper.unfreeze("all")
    assert "remat" in written() or "checkpoint" in written()


@pytest.mark.eager
def test_switches_in_a_running_fit_as_without():
    def run(rematerialize):
        keras.utils.set_random_seed(0)
        model, wrapper = compiled(residual(), rematerialize)
        before = as_bytes(models.statistics(wrapper))
        x, y = regression_data()
        callback = UnfreezeAtConvergence(
            0.1, train_batchnorm=True, max_frozen_epochs=1, restore_best_weights=False, verbose=0
        )
        callbacks = [callback, FreezeGuard(verbose=0)]
        history = model.fit(
            x, y, validation_data=(x, y), epochs=3, shuffle=False, callbacks=callbacks, verbose=0
        )
        assert history.history["stage"] == [0, 1, 1]
        assert as_bytes(models.statistics(wrapper)) == before
        return model.get_weights()

    for one, other in zip(run(False), run(True), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-6 if BACKEND == "jax" else 0)


@pytest.mark.eager
def test_a_saved_model_goes_on_with_it(tmp_path):
    model, wrapper = compiled(chain(), True)
    wrapper.unfreeze("all")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert models.frozen_backbone_of(loaded).rematerialize is True
    x, y = regression_data()
    assert loaded.train_on_batch(x, y) == pytest.approx(model.train_on_batch(x, y))


def test_a_sequential_backbone_may_be_built_later():
    base = keras.Sequential([dense() for _ in range(10)])
    wrapper = FrozenBackbone(base, rematerialize=True)
    models.functional_outer(wrapper)
    wrapper.unfreeze("all")
    x, _ = regression_data()
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(wrapper(keras.ops.convert_to_tensor(x))),
        keras.ops.convert_to_numpy(base(keras.ops.convert_to_tensor(x))),
    )


def test_a_copy_has_segments_of_its_own():
    model, wrapper = compiled(chain(), True)
    twin = models.frozen_backbone_of(copy.deepcopy(model))
    assert twin.rematerialize is True
    assert twin._in_segments is not wrapper._in_segments


def test_a_call_of_the_backbone_itself_is_as_ever():
    base = chain()
    compiled(base, True)[0].predict(regression_data()[0], verbose=0)
    assert "_run_through_graph" not in vars(base._functional)


@pytest.mark.eager
def test_an_unwrapped_model_has_none_of_it():
    model, _ = compiled(residual(), True)
    x, _ = regression_data()
    plain = unwrap(model)
    np.testing.assert_array_equal(plain.predict(x, verbose=0), model.predict(x, verbose=0))


def test_a_backbone_without_a_graph_is_an_error():
    with pytest.raises(ValueError, match="needs a Functional or Sequential backbone.*Subclassed"):
        FrozenBackbone(models.Subclassed(["dense"]), rematerialize=True)


def test_training_mode_is_an_error():
    with pytest.raises(ValueError, match='needs `inference_mode="always"`'):
        FrozenBackbone(chain(), rematerialize=True, inference_mode="batchnorm")
