"""Invariant 10: a wrapped backbone is, to all around it, as one that is nested plainly."""

import copy
import pickle

import keras
import numpy as np
import pytest

from keras_tl import FeatureCache, FrozenBackbone, fine_tune
from tests import models
from tests.shared import as_bytes, regression_data, values_of

pytestmark = pytest.mark.covers("part: FrozenBackbone")


@keras.saving.register_keras_serializable(package="tests")
class Encoder(keras.Model):
    """A subclassed model that needs a second tensor, which it takes by keyword."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = keras.layers.Dense(3)

    def call(self, x, training=None, attention_mask=None):
        return self.dense(x) * keras.ops.cast(attention_mask, "float32")


@keras.saving.register_keras_serializable(package="tests")
class Total(keras.layers.Layer):
    """A layer that takes any number of inputs."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = keras.layers.Dense(3)

    def call(self, *inputs, training=None):
        first, *others = inputs
        return self.dense(sum((keras.ops.cast(x, "float32") for x in others), first))


@keras.saving.register_keras_serializable(package="tests")
class TotalOfMore(Total):
    """The same with a first input that has a name, and without `training`."""

    def call(self, x, *args):
        return super().call(x, *args)


@keras.saving.register_keras_serializable(package="tests")
class Block(keras.layers.Layer):
    """A layer that holds a model."""

    def __init__(self, model, **kwargs):
        super().__init__(**kwargs)
        self.model = model

    def call(self, x):
        return self.model(x)


def bytes_of(tensor):
    return keras.ops.convert_to_numpy(tensor).tobytes()


def wrapped_or_plain(backbone, wrap):
    if wrap:
        return FrozenBackbone(backbone)
    backbone.trainable = False
    return backbone


# A compiled backbone.


def compiled(model, metrics):
    model.compile("adam", "mse", metrics=metrics)
    return model


TRAINERS = {
    "functional": lambda metrics: compiled(models.functional(["dense"]), metrics),
    "subclassed": lambda metrics: compiled(models.Subclassed(["dense"]), metrics),
    "inner": lambda metrics: models.sequential_of(
        compiled(models.functional(["dense"]), metrics), keras.layers.Dense(3)
    ),
}


@pytest.mark.parametrize(
    ("kind", "metrics"),
    [
        ("functional", ["mae"]),
        ("inner", None),
        ("subclassed", ["mae"]),
        pytest.param("functional", None, marks=pytest.mark.slow),
        pytest.param("inner", ["mae"], marks=pytest.mark.slow),
        pytest.param("subclassed", None, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_backbone_keeps_its_loss_and_metrics_to_itself(tmp_path, kind, metrics):
    x, y = regression_data()

    def results(wrap):
        keras.utils.set_random_seed(0)
        model = models.functional_outer(wrapped_or_plain(TRAINERS[kind](metrics), wrap))
        keras.utils.set_random_seed(0)
        model.compile("sgd", "mae", metrics=["mse"], run_eagerly=True)
        history = model.fit(x, y, epochs=2, validation_data=(x, y), shuffle=False, verbose=0)
        evaluated = model.evaluate(x, y, verbose=0, return_dict=True)
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        return history.history, evaluated, loaded.evaluate(x, y, verbose=0, return_dict=True)

    plain, wrapped = results(wrap=False), results(wrap=True)
    assert wrapped == plain
    assert wrapped[0]["loss"][0] > 0
    assert wrapped[1] == pytest.approx(wrapped[2])


@pytest.mark.skipif(
    keras.backend.backend() == "jax",
    reason="Keras on JAX fails to build a Sequential with a layer that has a metric.",
)
def test_a_metric_in_a_layer_of_the_backbone_is_seen_and_reset():
    class Tracking(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.tracker = keras.metrics.Mean(name="largest")

        def call(self, x):
            self.tracker.update_state(keras.ops.max(x))
            return x

    tracking = Tracking()
    base = keras.Sequential([keras.Input((models.FEATURES,)), keras.layers.Dense(3), tracking])
    model = models.functional_outer(FrozenBackbone(base))
    model.compile("sgd", "mse")
    x, y = regression_data()
    history = model.fit(x, y, epochs=2, batch_size=16, shuffle=False, verbose=0).history
    assert [metric for metric in model.metrics if metric is tracking.tracker] == [tracking.tracker]
    assert history["largest"] == pytest.approx([history["largest"][0]] * 2)


@pytest.mark.parametrize("around", [keras.layers.TimeDistributed, Block], ids=["Keras", "own"])
def test_a_compiled_model_in_a_layer_of_the_backbone_is_warned_of(around):
    inner = compiled(models.functional(["dense"]), None)
    with pytest.warns(UserWarning, match=f'holds the compiled model "{inner.name}"'):
        FrozenBackbone(around(inner))


# Gradients.


def gradients(function, x, weights=()):
    """Gradients of the sum of `function(x)`: to `x`, then to the weights."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        x = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
        return tape.gradient(y, [x, *[weight.value for weight in weights]])
    if keras.backend.backend() == "jax":
        import jax

        def total(x, values):
            with keras.StatelessScope(state_mapping=list(zip(weights, values))):
                return keras.ops.sum(function(x))

        to_x, to_weights = jax.grad(total, (0, 1))(x, [weight.value for weight in weights])
        return [to_x, *to_weights]
    import torch

    x = torch.tensor(x, requires_grad=True)
    values = [weight.value for weight in weights]
    return torch.autograd.grad(function(x).sum(), [x, *values])


def arrays(tensors):
    return [keras.ops.convert_to_numpy(tensor) for tensor in tensors]


@pytest.mark.parametrize("unfreeze", [None, 1, "all"])
def test_gradients_are_those_of_the_plain_backbone(unfreeze):
    x, _ = regression_data()
    base = models.functional(["dense", "batchnorm", "dense"])
    wrapper = FrozenBackbone(base)
    if unfreeze is not None:
        wrapper.unfreeze(unfreeze)
    weights = wrapper.trainable_weights
    expected = arrays(gradients(lambda x: base(x, training=False), x, weights))
    found = arrays(gradients(wrapper, x, weights))
    assert [one.tobytes() for one in found] == [one.tobytes() for one in expected]
    assert all(np.abs(one).max() > 0 for one in found)


@pytest.mark.eager
def test_a_layer_before_a_frozen_backbone_trains_as_before_a_plain_one():
    x, y = regression_data()

    def trained(wrap):
        keras.utils.set_random_seed(0)
        base = models.functional(["dense", "batchnorm"])
        inputs = keras.Input((models.FEATURES,))
        adapter = keras.layers.Dense(models.FEATURES, name="adapter")
        features = wrapped_or_plain(base, wrap)(adapter(inputs))
        model = keras.Model(inputs, keras.layers.Dense(1)(features))
        before = as_bytes(adapter.weights)
        model.compile(keras.optimizers.SGD(0.1), "mse")
        model.fit(x, y, epochs=2, shuffle=False, verbose=0)
        assert all(a != b for a, b in zip(before, as_bytes(adapter.weights)))
        return values_of(model)

    assert trained(wrap=True) == trained(wrap=False)


@pytest.mark.eager
def test_fine_tune_trains_a_layer_before_the_backbone():
    inputs = keras.Input((models.FEATURES,))
    adapter = keras.layers.Dense(models.FEATURES)
    wrapper = FrozenBackbone(models.functional(["dense"]))
    model = keras.Model(inputs, keras.layers.Dense(1)(wrapper(adapter(inputs))))
    model.compile("adam", "mse")
    before = as_bytes(adapter.weights)
    with pytest.raises(ValueError, match="come before the outputs of the backbone"):
        FeatureCache(model)
    fine_tune(model, *regression_data(), epochs=1, verbose=0)
    assert all(a != b for a, b in zip(before, as_bytes(adapter.weights)))


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="Only TensorFlow has tapes.")
@pytest.mark.parametrize("fails", [False, True])
def test_a_tape_does_not_record_a_frozen_backbone_in_vain(fails):
    import tensorflow as tf

    class Failing(keras.layers.Layer):
        fails = False

        def call(self, x):
            if self.fails:
                raise RuntimeError("in the backbone")
            return x

    base = models.sequential_of(keras.layers.Dense(3), Failing())
    base.layers[-1].fails = fails
    wrapper = FrozenBackbone(base)
    x = tf.ones((2, models.FEATURES))
    with tf.GradientTape() as tape:
        try:
            wrapper(x)
        except RuntimeError:
            assert fails
    assert tape.watched_variables() == ()
    with tf.GradientTape() as tape:
        base.layers[0](x)
    assert len(tape.watched_variables()) == 2


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="Only TensorFlow has tapes.")
def test_the_gradient_to_a_frozen_weight_is_had_by_watching_it():
    import tensorflow as tf

    base = models.functional(["dense"])
    wrapper = FrozenBackbone(base)
    kernel = base.weights[0].value
    with tf.GradientTape() as tape:
        tape.watch(kernel)
        y = wrapper(tf.ones((2, models.FEATURES)))
    with tf.GradientTape() as plain:
        y_plain = base(tf.ones((2, models.FEATURES)))
    expected = plain.gradient(y_plain, kernel)
    assert bytes_of(tape.gradient(y, kernel)) == bytes_of(expected)


# The `training` that is given to the wrapper itself.


class Probe(keras.layers.Layer):
    """Records the `training` that it is called with."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def call(self, x, training=None):
        self.seen.append(training)
        return x


class Outer(keras.Model):
    def __init__(self, backbone, given):
        super().__init__()
        self.before, self.after = Probe(), Probe()
        self.backbone = backbone
        self.given = given

    def call(self, x):
        return self.after(self.backbone(self.before(x), training=self.given))


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("training", [True, False, None])
def test_training_given_to_the_wrapper_does_not_reach_later_layers(given, training):
    model = Outer(FrozenBackbone(models.functional(["dense"])), given)
    model(regression_data()[0], training=training)
    assert model.after.seen == model.before.seen


def test_dropout_after_a_wrapper_that_is_given_training_is_active_in_fit():
    inputs = keras.Input((models.FEATURES,))
    features = FrozenBackbone(models.functional(["dense"]))(inputs, training=False)
    outputs = keras.layers.Dense(1)(keras.layers.Dropout(0.9)(features))
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    x, y = regression_data()
    history = model.fit(x, y, batch_size=16, verbose=0).history
    assert history["loss"][0] != model.evaluate(x, y, verbose=0)


def test_training_may_be_given_by_position_as_to_a_functional_model():
    x, _ = regression_data()
    wrapper = FrozenBackbone(models.functional(["dense"]))
    assert bytes_of(wrapper(x, False)) == bytes_of(wrapper(x, training=False))
    assert bytes_of(wrapper.call(x, False)) == bytes_of(wrapper(x))


def test_more_arguments_than_the_backbone_takes_are_an_error():
    x, _ = regression_data()
    with pytest.raises(TypeError, match="too many positional arguments"):
        FrozenBackbone(Probe())(x, x, x)


# Call arguments.

QUERY = (5, 6)


def attention(layer, x, mask):
    return layer(x, x, attention_mask=mask[:, None, :], return_attention_scores=True)[0]


def mask_as_third(layer, x, mask):
    return layer(x, None, mask[:, :, None])


def several(layer, x, mask):
    return layer(x, mask[:, :, None], x + x)


CALLS = {
    "keyword": (Encoder, lambda layer, x, mask: layer(x, attention_mask=mask[:, :, None])),
    "by position": (Encoder, mask_as_third),
    "second tensor": (lambda: keras.layers.MultiHeadAttention(2, 3), attention),
    "states": (
        lambda: keras.layers.LSTM(6),
        lambda layer, x, mask: layer(x, initial_state=[x[:, 0], x[:, 1]]),
    ),
    "mask": (
        lambda: keras.layers.Bidirectional(keras.layers.GRU(2, return_sequences=True)),
        lambda layer, x, mask: layer(x, mask=mask),
    ),
    "any number": (Total, several),
    "one of any number": (Total, lambda layer, x, mask: layer(x)),
    "a first and any number": (TotalOfMore, several),
}


def batch():
    random = np.random.default_rng(0)
    x = random.normal(size=(8, *QUERY)).astype("float32")
    return [x, random.random((8, QUERY[0])) > 0.5], np.ones((8, 1), "float32")


def model_with(layer, call):
    inputs = [keras.Input(QUERY), keras.Input(QUERY[:1], dtype="bool")]
    x = keras.layers.Flatten()(call(layer, *inputs))
    return keras.Model(inputs, keras.layers.Dense(1)(x))


@pytest.mark.parametrize("kind", CALLS)
def test_call_arguments_are_passed_on(kind):
    make, call = CALLS[kind]
    layer = make()
    (x, mask), _ = batch()
    x, mask = keras.ops.convert_to_tensor(x), keras.ops.convert_to_tensor(mask)
    expected = call(layer, x, mask)
    wrapper = FrozenBackbone(layer)
    assert bytes_of(call(wrapper, x, mask)) == bytes_of(expected)
    symbolic = call(wrapper, keras.Input(QUERY), keras.Input(QUERY[:1], dtype="bool"))
    assert symbolic.shape[1:] == expected.shape[1:]


@pytest.mark.eager
@pytest.mark.parametrize(
    ("kind", "unfreeze"),
    [
        # Each kind once in the ordinary run, half of them frozen and half of them not.
        pytest.param(kind, unfreeze, marks=[pytest.mark.slow] if unfreeze != (i % 2 == 0) else [])
        for i, kind in enumerate(CALLS)
        for unfreeze in (False, True)
    ],
)
@pytest.mark.filterwarnings("ignore:Model 'encoder.*' had a build config")
def test_a_model_with_call_arguments_trains_and_loads(tmp_path, kind, unfreeze):
    make, call = CALLS[kind]
    wrapper = FrozenBackbone(make())
    model = model_with(wrapper, call)
    if unfreeze:
        wrapper.unfreeze()
    model.compile("sgd", "mse", run_eagerly=True)
    x, y = batch()
    before = as_bytes(wrapper.weights)
    model.fit(x, y, verbose=0)
    assert (as_bytes(wrapper.weights) != before) == unfreeze

    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")

    assert bytes_of(loaded.predict(x, verbose=0)) == bytes_of(model.predict(x, verbose=0))
    assert len(loaded.trainable_weights) == len(model.trainable_weights)


@keras.saving.register_keras_serializable(package="tests")
class EncoderOuter(keras.Model):
    """A subclassed model whose backbone needs more than the first input to be built."""

    def __init__(self, backbone=None, **kwargs):
        super().__init__(**kwargs)
        self.backbone = backbone
        self.top = keras.layers.Dense(1)

    def call(self, x):
        return self.top(self.backbone(x, attention_mask=x[:, :1]))

    def get_config(self):
        return {**super().get_config(), "backbone": self.backbone}

    @classmethod
    def from_config(cls, config):
        backbone = keras.saving.deserialize_keras_object(config.pop("backbone"))
        return cls(backbone, **config)


@pytest.mark.eager
@pytest.mark.filterwarnings("ignore:Model 'encoder.*' had a build config")
def test_a_subclassed_model_of_an_encoder_loads_in_its_stage(tmp_path):
    x, y = regression_data()
    model = EncoderOuter(FrozenBackbone(Encoder()))
    model.compile("sgd", "mse")
    model.fit(x, y, verbose=0)
    model.backbone.unfreeze()
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert bytes_of(loaded(x)) == bytes_of(model(x))
    assert len(loaded.trainable_weights) == 4


@pytest.mark.eager
@pytest.mark.parametrize("kind", ["keyword", "mask"])
def test_the_outputs_of_a_backbone_with_call_arguments_are_recorded(kind):
    make, call = CALLS[kind]
    x, y = batch()

    def trained(how):
        keras.utils.set_random_seed(0)
        model = model_with(FrozenBackbone(make()), call)
        model.compile("sgd", "mse")
        how(model)
        return values_of(model)[-2:]

    def on_features(model):
        cache = FeatureCache(model)
        cache.head.fit(cache(x, y, batch_size=8), verbose=0)

    recorded = trained(on_features)
    through = trained(lambda model: model.fit(x, y, batch_size=8, shuffle=False, verbose=0))
    for one, other in zip(recorded, through):
        np.testing.assert_allclose(np.frombuffer(one, "f4"), np.frombuffer(other, "f4"), 1e-5)


# What a task reads from a backbone.


class Backbone(keras.Model):
    """A backbone as KerasHub has it, with attributes and methods of its own."""

    def __init__(self, **kwargs):
        inputs = keras.Input((models.FEATURES,), name="images")
        middle = keras.layers.Dense(3, name="middle")(inputs)
        norm = keras.layers.BatchNormalization(name="norm")(middle)
        outputs = keras.layers.Dense(2, name="last")(norm)
        super().__init__(inputs, outputs, **kwargs)
        self.image_shape = (models.FEATURES,)
        self.pyramid_outputs = {"P1": norm, "P2": outputs, "text": "not a tensor"}
        self.nothing_yet = None

    def last(self, suffix):
        return self.get_layer("last").name + suffix

    def enable(self):
        for layer in self.layers:
            layer.trainable = True
        return "done"

    @property
    def broken(self):
        raise AttributeError("broken inside")


def test_public_attributes_and_methods_of_the_backbone_are_the_wrappers_too():
    base = Backbone()
    wrapper = FrozenBackbone(base)
    assert wrapper.image_shape == (models.FEATURES,)
    assert wrapper.layers == base.layers
    assert wrapper.last("!") == "last!"
    assert wrapper.nothing_yet is None
    assert wrapper.get_layer("norm") is base.get_layer("norm")
    assert wrapper.input is base.input


def test_what_the_wrapper_has_is_its_own():
    base = Backbone(name="base")
    base.inference_mode = base.hand_frozen = "the backbone's"
    wrapper = FrozenBackbone(base)
    wrapper.image_shape = "set"
    assert (wrapper.inference_mode, wrapper.image_shape) == ("always", "set")
    assert wrapper.hand_frozen != "the backbone's"
    assert wrapper.name != "base"
    assert base.image_shape == (models.FEATURES,)
    assert wrapper.metrics == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", "'FrozenBackbone'.*'nothing', and nor has the backbone 'base' .*Backbone"),
        ("broken", "'broken', and nor has"),
        ("_pruned", "'FrozenBackbone' object has no attribute '_pruned'$"),
        ("fit", "'fit'. As a layer it is not trained or saved by itself: see `backbone.fit`"),
        ("compiled", "see `backbone.compiled`"),
        ("get_compile_config", "see `backbone.get_compile_config`"),
    ],
)
def test_attributes_that_neither_has_or_that_no_layer_has(name, words):
    wrapper = FrozenBackbone(compiled(Backbone(name="base"), None))
    assert not hasattr(wrapper, name)
    with pytest.raises(AttributeError, match=words):
        getattr(wrapper, name)


def test_a_wrapper_without_a_backbone_yet_has_no_attributes():
    empty = object.__new__(FrozenBackbone)  # As while it is unpickled.
    for name in ("backbone", "image_shape", "_anything"):
        with pytest.raises(AttributeError):
            getattr(empty, name)


def test_copies_have_attributes_of_the_backbone():
    wrapper = FrozenBackbone(models.functional(["dense"]))
    for copied in (copy.deepcopy(wrapper), pickle.loads(pickle.dumps(wrapper))):
        assert tuple(copied.input_shape) == wrapper.input_shape
        assert copied.layers[1] is copied.backbone.layers[1]


@pytest.mark.parametrize("of", ["output", "outputs", "pyramid_outputs"])
@pytest.mark.eager
def test_a_model_made_of_symbolic_tensors_holds_the_statistics(of):
    base = Backbone()
    wrapper = FrozenBackbone(base)
    wrapper.unfreeze()
    tensors = getattr(wrapper, of)
    if of == "pyramid_outputs":
        assert tensors["text"] == "not a tensor"
        assert wrapper.pyramid_outputs["P1"] is tensors["P1"]
        tensors = [tensors["P1"], tensors["P2"]]
    tensors = keras.tree.flatten(tensors)
    head = keras.layers.Dense(1)(keras.layers.Concatenate()([*tensors, *tensors]))
    model = keras.Model(wrapper.input, head)
    x, y = regression_data()
    statistics, kernel = as_bytes(base.non_trainable_weights), as_bytes([base.weights[0]])

    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(x, y, verbose=0)

    assert len(statistics) == 4  # Of BatchNormalization, whose gamma and beta stay frozen.
    assert as_bytes(base.non_trainable_weights) == statistics
    assert as_bytes([base.weights[0]]) != kernel
    found = keras.Model(wrapper.input, tensors[-1])(x)
    assert bytes_of(found) == bytes_of(base(x, training=False))


def test_symbolic_tensors_after_the_first_call_are_those_of_the_call():
    wrapper = FrozenBackbone(Backbone())
    inputs = keras.Input((models.FEATURES,), name="others")
    outputs = wrapper(inputs)
    assert wrapper.input is inputs
    assert wrapper.output is outputs
    assert wrapper.inputs == [inputs]
    assert wrapper.outputs == [outputs]
    assert keras.Model(inputs, wrapper.pyramid_outputs["P1"]).inputs == [inputs]


def test_a_part_of_the_graph_follows_the_flags_of_the_wrapper():
    base = Backbone()
    wrapper = FrozenBackbone(base)
    model = keras.Model(wrapper.input, wrapper.pyramid_outputs["P1"])
    assert model.trainable_weights == []
    wrapper.unfreeze("middle")
    assert [w.path.split("/")[-2] for w in model.trainable_weights] == ["middle"] * 2
    found = gradients(model, regression_data()[0], base.get_layer("middle").weights)
    assert all(np.abs(one).max() > 0 for one in arrays(found))


def test_a_method_of_the_backbone_does_not_unfreeze_a_frozen_wrapper():
    base = Backbone()
    wrapper = FrozenBackbone(base)
    assert wrapper.enable() == "done"
    assert base.trainable_weights == []
    wrapper.unfreeze("last")
    wrapper.enable()
    assert len(base.trainable_weights) == 6
