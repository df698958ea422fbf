"""unwrap: the same model without any class of keras_tl."""

import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest

from keras_tl import FrozenBackbone, GroupOptimizer, Stage, UnfreezeAtConvergence, unwrap
from keras_tl.backbone.selecting import flatten_layers
from keras_tl.internals.values import on_host
from tests import models
from tests.shared import as_bytes, regression_data

pytestmark = pytest.mark.eager
X, Y = regression_data()
KINDS = ["dense", "batchnorm", "dropout"]


def twice(wrapper):
    """A backbone that is called on two inputs (siamese)."""
    left, right = keras.Input((models.FEATURES,)), keras.Input((models.FEATURES,))
    x = keras.layers.Concatenate()([wrapper(left), wrapper(right)])
    return keras.Model([left, right], keras.layers.Dense(1, name="output")(x))


def nested(wrapper):
    """A model that holds the model that holds the wrapper."""
    return models.functional_outer(models.functional_outer(wrapper))


def sequential(wrapper):
    return models.sequential_of(wrapper, keras.layers.Dense(1, name="output"))


@keras.saving.register_keras_serializable(package="tests")
class Outer(keras.Model):
    def __init__(self, backbone, **kwargs):
        super().__init__(**kwargs)
        self.backbone = backbone
        self.top = keras.layers.Dense(1)

    def call(self, x):
        return self.top(self.backbone(x))

    def get_config(self):
        return {
            **super().get_config(),
            "backbone": keras.saving.serialize_keras_object(self.backbone),
        }

    @classmethod
    def from_config(cls, config):
        backbone = keras.saving.deserialize_keras_object(config.pop("backbone"))
        return cls(backbone, **config)


def subclassed(wrapper):
    model = Outer(wrapper)
    model(X)
    return model


def inputs_of(model):
    return [X, X] if len(getattr(model, "inputs", None) or [0]) == 2 else X


def ours(model):
    return [one for one in flatten_layers(model) if type(one).__module__.startswith("keras_tl")]


def names_of(weights):
    return ["/".join(weight.path.split("/")[-2:]) for weight in weights]


@pytest.mark.covers("part: unwrap")
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("outer", [models.functional_outer, sequential, nested, twice])
def test_the_same_layers_without_a_wrapper(outer, flatten):
    wrapper = FrozenBackbone(models.functional(KINDS))
    model = outer(wrapper)
    wrapper.unfreeze(1)
    model.compile("adam", "mse")
    inputs = inputs_of(model)
    expected = model.predict(inputs, verbose=0)

    plain = unwrap(model, flatten=flatten)

    assert not ours(plain)
    assert plain.predict(inputs, verbose=0).tobytes() == expected.tobytes()
    assert plain.name == model.name
    assert not {id(one) for one in plain.weights} & {id(one) for one in model.weights}
    assert names_of(plain.trainable_weights) == names_of(model.trainable_weights)
    assert plain.evaluate(inputs, Y, verbose=0) == model.evaluate(inputs, Y, verbose=0)
    assert plain.optimizer is not model.optimizer
    names = [layer.name for layer in plain.layers]
    inner = wrapper.backbone.layers[1].name
    assert (inner in names) == (flatten and outer is not nested)
    assert (wrapper.backbone.name in names) == (not flatten and outer is not nested)


def test_flattened_its_inner_layers_are_reached_from_the_inputs():
    base = models.functional(["dense", "dense"])
    plain = unwrap(models.functional_outer(FrozenBackbone(base)), flatten=True)
    features = keras.Model(plain.input, plain.get_layer(base.layers[1].name).output)
    expected = keras.Model(base.input, base.layers[1].output).predict(X, verbose=0)
    assert len(plain.layers) == 4
    assert features.predict(X, verbose=0).tobytes() == expected.tobytes()


@pytest.mark.parametrize("made", [subclassed, "time distributed"])
def test_what_has_no_graph_is_made_again_from_its_configuration(made):
    wrapper = FrozenBackbone(models.functional(KINDS))
    if made == "time distributed":
        inputs = keras.Input((3, models.FEATURES))
        outputs = keras.layers.TimeDistributed(wrapper, name="each")(inputs)
        model, x = keras.Model(inputs, outputs), np.stack([X] * 3, axis=1)
    else:
        model, x = made(wrapper), X
    wrapper.unfreeze(1)
    model.compile("adam", "mse", metrics=["mae"])

    plain = unwrap(model)

    assert not ours(plain)
    assert plain.predict(x, verbose=0).tobytes() == model.predict(x, verbose=0).tobytes()
    assert [value for _, value in as_bytes(plain.weights)] == [
        value for _, value in as_bytes(model.weights)
    ]
    shapes = [weight.shape for weight in model.trainable_weights]
    assert [weight.shape for weight in plain.trainable_weights] == shapes != []


def test_groups_become_an_optimizer_of_keras():
    wrapper = FrozenBackbone(models.functional(KINDS))
    wrapper.unfreeze()
    model = models.functional_outer(wrapper)
    groups = {"backbone": keras.optimizers.SGD(0.5), "head": keras.optimizers.Adam(0.25)}
    model.compile(GroupOptimizer(groups, assign={"backbone": wrapper}), "mse")

    optimizer = unwrap(model).optimizer

    assert type(optimizer) is keras.optimizers.MultiOptimizer
    rates = {float(one.learning_rate) for one in optimizer.optimizers}
    assert rates == {0.5, 0.25}


def test_rates_by_layer_are_warned_of():
    wrapper = FrozenBackbone(models.functional(["dense", "dense"]))
    model = models.functional_outer(wrapper)
    model.compile("sgd", "mse")
    rates = dict.fromkeys([layer.name for layer in wrapper.backbone.layers[1:]], 0.1)
    rates[wrapper.backbone.layers[1].name] = 0.01
    fine_tuning = UnfreezeAtConvergence(
        stages=[Stage("all", rates)], max_frozen_epochs=1, verbose=0
    )
    model.fit(X, Y, validation_data=(X, Y), epochs=2, callbacks=[fine_tuning], verbose=0)
    with pytest.warns(UserWarning, match="without learning rates by layer"):
        unwrap(model)


@pytest.mark.slow
def test_a_file_that_loads_without_keras_tl(tmp_path):
    model = models.functional_outer(FrozenBackbone(models.functional(["dense", "batchnorm"])))
    schedule = keras.optimizers.schedules.PolynomialDecay(0.1, 10)
    model.compile("adam", "mse")
    fine_tuning = UnfreezeAtConvergence(
        1e-3, head_learning_rate=schedule, max_frozen_epochs=1, verbose=0
    )
    model.fit(X, Y, validation_data=(X, Y), epochs=2, callbacks=[fine_tuning], verbose=0)
    unwrap(model).save(tmp_path / "plain.keras")
    np.savez(tmp_path / "data.npz", x=X, y=model.predict(X, verbose=0))
    program = (
        "import sys; sys.modules['keras_tl'] = None; import keras, numpy as np;"
        "model = keras.models.load_model('plain.keras'); data = np.load('data.npz');"
        "assert (model.predict(data['x'], verbose=0) == data['y']).all();"
        "print(len(model.trainable_weights), type(model.optimizer).__name__)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert run.stdout.split()[-2:] == ["4", "MultiOptimizer"]


def test_weights_go_both_ways(tmp_path):
    def build():
        return models.functional_outer(FrozenBackbone(models.functional(["dense", "batchnorm"])))

    one, wrapped = build(), build()
    unwrap(one).save_weights(tmp_path / "plain.weights.h5")
    wrapped.load_weights(tmp_path / "plain.weights.h5")
    plain = unwrap(build())
    plain.load_weights(tmp_path / "plain.weights.h5")
    for loaded in (wrapped, plain):
        assert loaded.predict(X, verbose=0).tobytes() == one.predict(X, verbose=0).tobytes()


@keras.saving.register_keras_serializable(package="tests")
class BuiltByItsCall(keras.Layer):
    """A layer without `build`, whose sublayers are built when it is first called."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first, self.second = keras.layers.Dense(3), keras.layers.Dense(2)

    def call(self, x):
        return self.second(self.first(x))


@pytest.mark.filterwarnings("ignore:`build..` was called on layer")
def test_a_layer_that_its_first_call_builds():
    inputs = keras.Input((models.FEATURES,))
    x = BuiltByItsCall()(FrozenBackbone(models.functional(["dense"]))(inputs))
    model = keras.Model(inputs, x)
    assert unwrap(model).predict(X, verbose=0).tobytes() == model.predict(X, verbose=0).tobytes()


@pytest.mark.parametrize("flatten", [False, True])
def test_a_layer_that_is_in_the_backbone_and_outside_is_one(flatten):
    tied = keras.layers.Dense(models.FEATURES, name="tied")
    inputs = keras.Input((models.FEATURES,))
    base = keras.Model(inputs, keras.layers.Dense(models.FEATURES)(tied(inputs)))
    outer = keras.Input((models.FEATURES,))
    model = keras.Model(outer, tied(FrozenBackbone(base)(outer)))
    plain = unwrap(model, flatten=flatten)
    assert plain.count_params() == model.count_params()
    assert plain.predict(X, verbose=0).tobytes() == model.predict(X, verbose=0).tobytes()


@keras.saving.register_keras_serializable(package="tests")
class Factor(keras.layers.Layer):
    """A layer that keeps a number in a file of its own."""

    factor = 1.0

    def call(self, x):
        return self.factor * x

    def save_assets(self, folder):
        pathlib.Path(folder, "factor.txt").write_text(str(self.factor))

    def load_assets(self, folder):
        self.factor = float(pathlib.Path(folder, "factor.txt").read_text())


@pytest.mark.parametrize("flatten", [False, True])
def test_what_layers_keep_in_files_is_copied(flatten, tmp_path):
    factor = Factor()
    factor.factor = 5.0
    base = keras.Sequential([keras.Input((models.FEATURES,)), factor, keras.layers.Dense(2)])
    model = sequential(FrozenBackbone(base))
    plain = unwrap(model, flatten=flatten)
    plain.save(tmp_path / "plain.keras")
    for one in (plain, keras.models.load_model(tmp_path / "plain.keras")):
        np.testing.assert_array_equal(on_host(one(X)), on_host(model(X)))


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="strings are TensorFlow's")
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("kind", ["StringLookup", "TextVectorization"])
def test_an_adapted_vocabulary_is_copied(kind, flatten, tmp_path):
    layer = getattr(keras.layers, kind)(output_mode="tf_idf")
    layer.adapt(["one two", "two three", "four"])
    words = keras.Input((1,), dtype="string")
    wrapper = FrozenBackbone(keras.Model(words, layer(words)))
    model = keras.Sequential([keras.Input((1,), dtype="string"), wrapper, keras.layers.Dense(1)])
    x = keras.ops.convert_to_tensor([["one two"], ["four"]])
    plain = unwrap(model, flatten=flatten)
    plain.save(tmp_path / "plain.keras")
    for one in (plain, keras.models.load_model(tmp_path / "plain.keras")):
        np.testing.assert_array_equal(on_host(one(x)), on_host(model(x)))


def test_a_lambda_is_copied():
    inputs = keras.Input((models.FEATURES,))
    x = keras.layers.Lambda(lambda x: x * 2.0 - 1.0)(inputs)
    x = FrozenBackbone(models.functional(["dense"]))(x)
    model = keras.Model(inputs, keras.layers.Dense(1)(x))
    assert unwrap(model).predict(X, verbose=0).tobytes() == model.predict(X, verbose=0).tobytes()


def test_what_cannot_be_unwrapped():
    with pytest.raises(ValueError, match="takes a `keras.Model`. Received: <Dense"):
        unwrap(keras.layers.Dense(1))
    with pytest.raises(ValueError, match="is not built"):
        unwrap(models.SubclassedOuter(FrozenBackbone(models.Subclassed(["dense"]))))
    with pytest.raises(ValueError, match="needs a Functional or Sequential model"):
        unwrap(subclassed(FrozenBackbone(models.Subclassed(["dense"]))), flatten=True)


def test_lora_is_merged():
    base = models.functional(["dense", "dense"])
    base.layers[1].enable_lora(2)
    base.layers[1].lora_kernel_b.assign(np.ones((2, models.FEATURES)))
    model = models.functional_outer(FrozenBackbone(base))
    expected = model.predict(X, verbose=0)
    assert unwrap(model).predict(X, verbose=0).tobytes() == expected.tobytes()


def test_a_layer_that_cannot_be_made_again_is_named():
    class Local(keras.layers.Layer):
        def __init__(self, factor):
            super().__init__(name="local")
            self.factor = factor

        def call(self, x):
            return x * self.factor

    model = sequential(FrozenBackbone(models.sequential_of(Local(2.0))))
    with pytest.raises(ValueError, match="get_config.*register_keras"):
        unwrap(model)
