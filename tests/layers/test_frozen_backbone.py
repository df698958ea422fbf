import functools
import re

import keras
import numpy as np
import pytest

from keras_tl import FrozenBackbone
from tests import models
from tests.shared import Recorder, as_bytes, regression_data, values_of

pytestmark = pytest.mark.covers("part: FrozenBackbone")
X, Y = regression_data()


class Probe(keras.layers.Layer):
    """Records the `training` that it is called with."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen = []

    def call(self, x, training=None):
        self.seen.append(training)
        return x


@pytest.fixture
def base():
    layers = [
        keras.layers.Dense(4, name="a"),
        keras.layers.BatchNormalization(name="norm", momentum=0.5),
        keras.layers.Dropout(0.5, name="drop"),
        keras.layers.Dense(3, name="b"),
    ]
    inputs = keras.Input((4,))
    x = inputs
    for layer in layers:
        x = layer(x)
    return keras.Model(inputs, x, name="base")


def train(model, epochs=2, **compile_arguments):
    model.compile(keras.optimizers.SGD(0.1), "mse", **compile_arguments)
    model.fit(*regression_data(), batch_size=8, epochs=epochs, shuffle=False, verbose=0)


def values(tensor):
    return np.asarray(keras.ops.convert_to_numpy(tensor))


def paths(layer):
    return [w.path for w in layer.trainable_weights]


def test_starts_frozen(base):
    wrapper = FrozenBackbone(base)
    assert not wrapper.trainable
    assert wrapper.trainable_weights == base.trainable_weights == []


def test_outputs_what_the_backbone_outputs_in_inference(base):
    x, _ = regression_data()
    expected = values(base(x, training=False)).tobytes()
    wrapper = FrozenBackbone(base)
    assert values(wrapper(x)).tobytes() == expected
    assert values(wrapper(x, training=True)).tobytes() == expected


def test_unfreeze_returns_the_layers_from_input_to_output(base):
    wrapper = FrozenBackbone(base)
    assert [layer.name for layer in wrapper.unfreeze()] == ["a", "b"]
    assert wrapper.trainable
    assert paths(wrapper) == ["a/kernel", "a/bias", "b/kernel", "b/bias"]


def test_freeze_undoes_unfreeze(base):
    wrapper = FrozenBackbone(base)
    wrapper.unfreeze()
    wrapper.freeze("a")
    assert paths(wrapper) == ["b/kernel", "b/bias"]
    wrapper.freeze()
    assert not wrapper.trainable
    assert not base.trainable


def test_setting_trainable_is_recursive(base):
    wrapper = FrozenBackbone(base)
    wrapper.trainable = True
    assert all(layer.trainable for layer in base.layers)
    assert "norm/gamma" in paths(wrapper)
    wrapper.trainable = False
    assert paths(wrapper) == []


def test_trainable_argument_unfreezes_all(base):
    assert "norm/gamma" in paths(FrozenBackbone(base, trainable=True))


@pytest.mark.parametrize(
    ("how", "inference_mode"),
    [
        ("unfreeze", "always"),
        ("trainable", "batchnorm"),
        ("inner", "always"),
        pytest.param("unfreeze", "batchnorm", marks=pytest.mark.slow),
        pytest.param("trainable", "always", marks=pytest.mark.slow),
        pytest.param("inner", "batchnorm", marks=pytest.mark.slow),
    ],
)
def test_statistics_are_constant_while_gamma_trains(base, inference_mode, how):
    wrapper = FrozenBackbone(base, inference_mode=inference_mode)
    if how == "unfreeze":
        wrapper.unfreeze(train_batchnorm=True)
    elif how == "trainable":
        wrapper.trainable = True
    else:
        wrapper.trainable = True
        base.trainable = True
    statistics, rest = as_bytes(models.statistics(base)), as_bytes(base.trainable_weights)

    train(models.functional_outer(wrapper))

    assert as_bytes(models.statistics(base)) == statistics
    moved = [a[0] for a, b in zip(rest, as_bytes(base.trainable_weights)) if a != b]
    assert "norm/gamma" in moved
    assert base.get_layer("norm").trainable


def test_statistics_are_constant_in_a_backbone_that_insists_on_training_mode():
    class Insistent(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm = keras.layers.BatchNormalization(momentum=0.5)

        def call(self, x):
            return self.norm(x, training=True)

    wrapper = FrozenBackbone(Insistent(), trainable=True)
    model = models.functional_outer(wrapper)
    before = as_bytes(models.statistics(wrapper))
    train(model)
    assert as_bytes(models.statistics(wrapper)) == before


class OwnStatistics(keras.layers.BatchNormalization):
    """Moves its statistics whatever its flag is, as those of some libraries do."""

    def call(self, inputs, training=None, mask=None):
        if training:
            mean = keras.ops.mean(inputs, axis=0)
            self.moving_mean.assign(0.9 * self.moving_mean + 0.1 * mean)
        return super().call(inputs, training=False, mask=mask)


class Doubled(keras.layers.BatchNormalization):
    """Has a `call` of its own, and leaves the statistics to Keras."""

    def call(self, inputs, training=None, mask=None):
        return 2 * super().call(inputs, training=training, mask=mask)


def on_layer(layer, inference_mode, subclassed):
    base = keras.Sequential([keras.Input((models.FEATURES,)), keras.layers.Dropout(0.5), layer])
    wrapper = FrozenBackbone(base, inference_mode=inference_mode)
    if not subclassed:
        return keras.Sequential([keras.Input((models.FEATURES,)), wrapper, keras.layers.Dense(1)])

    class Outer(keras.Model):
        def __init__(self):
            super().__init__()
            self.wrapper, self.top = wrapper, keras.layers.Dense(1)

        def call(self, x):
            return self.top(self.wrapper(x))

    return Outer()


@pytest.mark.eager
@pytest.mark.parametrize("subclassed", [False, True])
def test_statistics_that_a_layer_moves_itself_are_an_error(subclassed):
    with pytest.raises(ValueError, match=r"constant.*: .*own_statistics.*/moving_mean"):
        on_layer(OwnStatistics(), "batchnorm", subclassed)(X)
    on_layer(OwnStatistics(), "always", subclassed)(X)


@pytest.mark.eager
@pytest.mark.parametrize("subclassed", [False, True])
@pytest.mark.parametrize(
    ("kind", "inference_mode"), [(Doubled, "batchnorm"), (OwnStatistics, "always")]
)
def test_layers_with_a_call_of_their_own_are_constant(kind, inference_mode, subclassed):
    layer = kind()
    model = on_layer(layer, inference_mode, subclassed)
    model(X)
    (wrapper,) = (one for one in model.layers if isinstance(one, FrozenBackbone))
    wrapper.unfreeze(train_batchnorm=True)
    model.compile("sgd", "mse")
    before = as_bytes([layer.moving_mean, layer.moving_variance])
    model.fit(X, Y, verbose=0)
    assert as_bytes([layer.moving_mean, layer.moving_variance]) == before


def test_batchnorm_mode_is_first_called_in_predict():
    """Where the model builds its layers itself; on JAX, `predict` has the values elsewhere then."""

    class Outer(keras.Model):
        def __init__(self):
            super().__init__()
            base = keras.Sequential([keras.layers.Dense(3), keras.layers.BatchNormalization()])
            self.wrapper = FrozenBackbone(base, inference_mode="batchnorm")
            self.top = keras.layers.Dense(1)

        def build(self, shape):
            self.wrapper.build(shape)
            self.top.build((None, 3))
            self.built = True

        def call(self, x):
            return self.top(self.wrapper(x))

    model = Outer()
    model.build((None, models.FEATURES))
    before = values_of(model)
    model.predict(X, verbose=0)
    assert values_of(model) == before


@pytest.mark.parametrize(
    ("inference_mode", "unfreeze", "expected"),
    [
        ("always", False, False),
        ("always", True, False),
        ("batchnorm", False, False),
        ("batchnorm", True, True),
    ],
)
def test_the_rest_follows_training_only_in_batchnorm_mode_once_unfrozen(
    inference_mode, unfreeze, expected
):
    probe = Probe()
    base = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), probe])
    wrapper = FrozenBackbone(base, inference_mode=inference_mode)
    if unfreeze:
        wrapper.unfreeze()
    wrapper(regression_data()[0])  # The first call asks more than once.
    probe.seen.clear()
    wrapper(regression_data()[0], training=True)
    assert probe.seen == [expected]


@pytest.mark.parametrize("training", [True, False, None])
def test_later_layers_see_the_training_that_the_model_is_called_with(base, training):
    class Outer(keras.Model):
        def __init__(self):
            super().__init__()
            self.before, self.after = Probe(), Probe()
            self.backbone = FrozenBackbone(base)

        def call(self, x):
            return self.after(self.backbone(self.before(x)))

    model = Outer()
    model(regression_data()[0], training=training)
    assert model.after.seen == model.before.seen


def test_calling_call_directly_leaves_no_context_behind(base):
    wrapper = FrozenBackbone(base)
    probe = Probe()
    wrapper.call(keras.ops.convert_to_tensor(regression_data()[0]))
    probe(np.ones((1, 1)))
    assert probe.seen == [None]


def test_output_layers(base):
    x, _ = regression_data()
    one = FrozenBackbone(base, output_layers="norm")
    several = FrozenBackbone(base, output_layers=["a", "norm"])

    assert one(x).shape == (16, 4)
    assert [y.shape for y in several(x)] == [(16, 4), (16, 4)]
    expected = keras.Model(base.input, base.get_layer("norm").output)(x)
    assert np.array_equal(several(x)[1], expected)
    assert "b/kernel" not in [w.path for w in one.weights]


def test_output_layers_of_a_model_in_fit(base):
    wrapper = FrozenBackbone(base, output_layers=["a", "b"])
    inputs = keras.Input((4,))
    outputs = keras.layers.Dense(1)(keras.layers.Concatenate()(wrapper(inputs)))
    train(keras.Model(inputs, outputs))
    assert wrapper.output_layers == ["a", "b"]


def test_mask_of_the_backbone_reaches_the_head():
    tokens = np.array([[1, 2, 0, 0]])
    inputs = keras.Input((4,), dtype="int32")
    base = keras.Model(inputs, keras.layers.Embedding(5, 3, mask_zero=True)(inputs))

    class Masked(keras.layers.Layer):
        supports_masking = True

        def call(self, x, mask=None):
            self.mask = mask
            return x

    head = Masked()
    outer = keras.Input((4,), dtype="int32")
    model = keras.Model(outer, head(FrozenBackbone(base)(outer)))
    model(tokens)
    assert values(head.mask).tolist() == [[True, True, False, False]]


def test_several_inputs_in_a_dict():
    inputs = {"left": keras.Input((2,), name="left"), "right": keras.Input((3,), name="right")}
    base = keras.Model(
        inputs, keras.layers.Dense(2)(keras.layers.Concatenate()([*inputs.values()]))
    )
    outer = {"left": keras.Input((2,)), "right": keras.Input((3,))}
    model = keras.Model(outer, keras.layers.Dense(1)(FrozenBackbone(base)(outer)))
    model.compile("sgd", "mse")
    x = {"left": np.ones((4, 2)), "right": np.ones((4, 3))}
    model.fit(x, np.ones((4, 1)), verbose=0)


def test_takes_the_dtype_policy_of_the_backbone():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        base = models.functional(["dense"])
    finally:
        keras.config.set_dtype_policy("float32")
    wrapper = FrozenBackbone(base)
    assert wrapper.dtype_policy.name == "mixed_float16"
    output = wrapper(regression_data()[0])
    assert keras.backend.standardize_dtype(output.dtype) == "float16"
    assert wrapper(keras.Input((4,))).dtype == "float16"


def test_does_not_cast_what_a_float32_backbone_gets_in_a_float16_model(base):
    x, _ = regression_data()
    expected = values(base(x))
    wrapper = FrozenBackbone(base, dtype="mixed_float16")
    assert np.array_equal(values(wrapper(x)), expected)


def test_wraps_a_single_layer():
    wrapper = FrozenBackbone(keras.layers.Dense(3))
    before = None
    model = models.functional_outer(wrapper)
    before = as_bytes(wrapper.weights)
    train(model)
    assert as_bytes(wrapper.weights) == before
    assert len(wrapper.unfreeze()) == 1


def test_layers_that_the_backbone_makes_in_build_are_frozen():
    class Late(keras.layers.Layer):
        def build(self, input_shape):
            self.dense = keras.layers.Dense(3)
            self.dense.build(input_shape)

        def call(self, x):
            return self.dense(x)

    wrapper = FrozenBackbone(Late())
    model = models.functional_outer(wrapper)
    assert len(model.trainable_weights) == 2
    assert [layer.name for layer in wrapper.unfreeze()] == [wrapper.backbone.dense.name]


def test_backbone_built_by_fit_trains_once_unfrozen():
    model = models.SubclassedOuter(FrozenBackbone(models.Subclassed(["dense", "dense"])))
    train(model)
    before = as_bytes(model.backbone.weights)
    model.backbone.unfreeze()
    train(model)
    assert all(a != b for a, b in zip(before, as_bytes(model.backbone.weights)))


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_unfrozen_copy_that_is_built_by_fit_trains(run_eagerly):
    wrapper = FrozenBackbone(models.Subclassed(["dense", "batchnorm"]))
    wrapper(regression_data()[0])
    wrapper.unfreeze()
    model = models.SubclassedOuter(FrozenBackbone.from_config(wrapper.get_config()))
    records = Recorder(lambda model: as_bytes(model.backbone.trainable_weights))
    model.compile("sgd", "mse", run_eagerly=run_eagerly)
    model.fit(*regression_data(), epochs=2, callbacks=[records], verbose=0)
    first, second = records.records
    assert len(first) == 2
    assert all(a != b for a, b in zip(first, second))


def test_evaluating_first_does_not_keep_it_from_training_later():
    model = models.SubclassedOuter(FrozenBackbone(models.Subclassed(["dense"])))
    model.compile("sgd", "mse")
    x, y = regression_data()
    model.evaluate(x, y, verbose=0)
    before = as_bytes(model.backbone.weights)
    model.backbone.unfreeze()
    train(model)
    assert all(a != b for a, b in zip(before, as_bytes(model.backbone.weights)))


def test_unfreezing_a_backbone_that_is_not_built_is_an_error():
    with pytest.raises(ValueError, match="not built"):
        FrozenBackbone(models.Subclassed(["dense"])).unfreeze()


def test_weight_frozen_by_hand_stays_frozen(base):
    base.get_layer("a").kernel.trainable = False
    wrapper = FrozenBackbone(base)
    wrapper.unfreeze()
    assert paths(wrapper) == ["a/bias", "b/kernel", "b/bias"]


def test_first_layer_of_a_sequential_model_builds_it(base):
    model = keras.Sequential([FrozenBackbone(base), keras.layers.Dense(1)])
    assert model.built
    train(model)


def test_time_distributed(base):
    layer = keras.layers.TimeDistributed(FrozenBackbone(base))
    assert layer(keras.Input((5, 4))).shape == (None, 5, 3)
    assert layer(np.ones((2, 5, 4))).shape == (2, 5, 3)


def test_shared_wrapper_called_twice(base):
    wrapper = FrozenBackbone(base)
    left, right = keras.Input((4,)), keras.Input((4,))
    distance = keras.layers.Subtract()([wrapper(left), wrapper(right)])
    model = keras.Model([left, right], keras.layers.Dense(1)(distance))
    before = as_bytes(wrapper.weights)
    model.compile("sgd", "mse")
    x, y = regression_data()
    model.fit([x, x[::-1]], y, verbose=0)
    assert as_bytes(wrapper.weights) == before


def test_the_head_trains_as_it_would_without_the_wrapper():
    def trained(wrap):
        # On torch, Dropout draws from a global generator: nothing else may draw in between.
        keras.utils.set_random_seed(1)
        base = models.functional(["dense", "batchnorm", "dense"])
        base.trainable = False
        head = [keras.layers.BatchNormalization(), keras.layers.Dropout(0.5)]
        model = models.functional_outer(FrozenBackbone(base) if wrap else base, head)
        train(model)
        return values_of(model)

    assert trained(wrap=True) == trained(wrap=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"inference_mode": "never"}, "`inference_mode` must be one of"),
        ({"output_layers": "bb"}, '`output_layers="bb"` matches no layer of the backbone "base"'),
        ({"output_layers": []}, "names no layer"),
    ],
)
def test_refuses_bad_arguments(base, arguments, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        FrozenBackbone(base, **arguments)


class OfAnotherFramework:
    def __call__(self, x):
        return x


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("base.keras", "(of type str). Of a file, pass the model that is in it: `keras.saving."),
        (keras.applications.Xception, "Call it, and pass what it returns: `Xception(...)`."),
        (keras.layers.Dense, "Call it, and pass what it returns: `Dense(...)`."),
        (functools.partial(keras.applications.Xception, weights=None), "Call it, and pass what"),
        (OfAnotherFramework(), "becomes a layer of Keras in a `keras.layers.TorchModuleWrapper`"),
    ],
)
def test_says_how_to_get_a_model(given, hint):
    with pytest.raises(ValueError, match=re.escape(hint)):
        FrozenBackbone(given)


def test_refuses_what_is_no_layer():
    with pytest.raises(ValueError, match="`backbone` must be a Keras layer or model.*str"):
        FrozenBackbone("resnet")


def test_refuses_output_layers_of_a_subclassed_backbone():
    with pytest.raises(ValueError, match="needs a Functional or a built Sequential backbone"):
        FrozenBackbone(models.Subclassed(["dense"]), output_layers="dense")


def test_refuses_output_layers_called_twice():
    inputs = keras.Input((4,))
    dense = keras.layers.Dense(4, name="twice")
    base = keras.Model(inputs, dense(dense(inputs)))
    with pytest.raises(ValueError, match="calls that layer 2 times"):
        FrozenBackbone(base, output_layers="twice")
