"""What is deployed predicts what the model does: an unwrapped model in files of other programs."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_tl import FrozenBackbone, unwrap
from tests.shared import only_on

pytestmark = only_on("tensorflow", "Keras exports to these formats from TensorFlow's graph.")

X = np.random.default_rng(0).normal(size=(3, 8, 8, 3)).astype("float32")


@pytest.fixture(scope="module")
def model():
    layers = [keras.layers.Conv2D(4, 3), keras.layers.BatchNormalization(), keras.layers.ReLU()]
    base = keras.Sequential([keras.Input((8, 8, 3)), *layers, keras.layers.GlobalMaxPooling2D()])
    base.layers[1].moving_variance.assign([0.5, 1.0, 2.0, 3.0])
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Dropout(0.5)(FrozenBackbone(base)(inputs))
    return keras.Model(inputs, keras.layers.Dense(2)(x))


def saved_model(model, path):
    model.export(path, verbose=False)
    loaded = tf.saved_model.load(path)
    return loaded.serve(X).numpy()


def lite(model, path):
    with warnings.catch_warnings(action="ignore"):
        interpreter = tf.lite.Interpreter(
            model_content=tf.lite.TFLiteConverter.from_keras_model(model).convert()
        )
    (given,) = interpreter.get_input_details()
    interpreter.resize_tensor_input(given["index"], X.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(given["index"], X)
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])


def onnx(model, path):
    pytest.importorskip("tf2onnx")
    runtime = pytest.importorskip("onnxruntime")
    model.export(f"{path}.onnx", format="onnx", verbose=False)
    session = runtime.InferenceSession(f"{path}.onnx")
    return session.run(None, {session.get_inputs()[0].name: X})[0]


@pytest.mark.covers("part: unwrap, exported")
@pytest.mark.parametrize(
    "deployed",
    [saved_model, *(pytest.param(one, marks=pytest.mark.slow) for one in (lite, onnx))],
)
def test_an_exported_model_predicts_what_the_wrapped_one_does(deployed, model, tmp_path):
    # Other programs add up in another order, so not bit for bit.
    expected = model.predict(X, verbose=0)
    found = deployed(unwrap(model), str(tmp_path / "deployed"))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
