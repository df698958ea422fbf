"""The architectures people fine-tune: all of `keras.applications`, and layers of every kind."""

import keras
import numpy as np
import pytest

from keras_tl import FreezeGuard, FrozenBackbone, UnfreezeAtConvergence
from tests import models
from tests.shared import Recorder, as_bytes, slow_on

LAYERS = keras.layers
BACKEND = keras.backend.backend()


def random_array(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def batchnorm_layers(layer):
    return [one for one in layer._flatten_layers() if isinstance(one, LAYERS.BatchNormalization)]


def pretrain(base, x):
    """Builds the backbone and gives its BatchNormalization layers weights of their own.

    Without the statistics of some data, gradients vanish on the way through a deep network.
    """
    base(x)
    random = np.random.default_rng(1)
    for layer in batchnorm_layers(base):
        layer.momentum = 0.0  # The statistics are those of the last batch.
        for weight in layer.trainable_weights:
            noise = random.uniform(-0.1, 0.1, weight.shape).astype("float32")
            weight.assign(keras.ops.convert_to_numpy(weight) + noise)
    base(x, training=True)


def paths_to_train(base):
    """The weights that were made to be trained, without those of BatchNormalization."""
    kept = {id(weight) for layer in batchnorm_layers(base) for weight in layer.weights}
    return [weight.path for weight in base.trainable_weights if id(weight) not in kept]


def outer_model(wrapper, x, head=()):
    inputs = keras.Input(x.shape[1:], dtype=keras.backend.standardize_dtype(x.dtype))
    outputs = wrapper(inputs)
    for layer in head:
        outputs = layer(outputs)
    return keras.Model(inputs, LAYERS.Dense(1, name="output")(outputs))


def moved(before, after):
    """The paths of the weights that are not bitwise the same in two results of `as_bytes`."""
    return [path for (path, old), (_, new) in zip(before, after, strict=True) if old != new]


def targets_for(x):
    return random_array(len(keras.tree.flatten(x)[0]), 1)


def fit_over_a_switch(model, x, **unfreezing):
    """Trains for a step in each stage. Returns the backbone's weights after each."""
    wrapper = models.frozen_backbone_of(model)
    y = targets_for(x)
    unfreezer = UnfreezeAtConvergence(
        1e-2,
        monitor="loss",
        max_frozen_epochs=1,
        restore_best_weights=False,
        verbose=0,
        **unfreezing,
    )
    recorder = Recorder(lambda model: as_bytes(wrapper.weights))
    # On TensorFlow, XLA takes much longer to compile a step than the step takes.
    jit_compile = False if BACKEND == "tensorflow" else "auto"
    model.compile("adam", "mse", jit_compile=jit_compile)
    callbacks = [unfreezer, FreezeGuard(verbose=0), recorder]
    history = model.fit(x, y, batch_size=len(y), epochs=2, callbacks=callbacks, verbose=0)
    assert history.history["stage"] == [0, 1]
    return recorder.records


def outputs_of(model, x):
    return keras.ops.convert_to_numpy(model(x)).tobytes()


def trainable_mask(model):
    trainable = {id(weight) for weight in model.trainable_weights}
    return [id(weight) in trainable for weight in model.weights]


def check(model, x, to_move, folder, **unfreezing):
    """Trains over a switch, saves and loads. Returns the loaded model.

    Args:
        model: A model with a FrozenBackbone.
        x: Its inputs, of one batch.
        to_move: The paths of the weights that a step after the switch is to change.
        folder: Where to save the model.
        **unfreezing: Further arguments of UnfreezeAtConvergence.
    """
    wrapper = models.frozen_backbone_of(model)
    before = as_bytes(wrapper.weights)
    frozen, tuned = fit_over_a_switch(model, x, **unfreezing)
    assert moved(before, frozen) == []
    assert moved(before, tuned) == to_move

    model.save(folder / "model.keras")
    loaded = keras.models.load_model(folder / "model.keras")
    assert outputs_of(loaded, x) == outputs_of(model, x)
    assert trainable_mask(loaded) == trainable_mask(model)
    return loaded


def check_step(model, x, to_move):
    """Trains a loaded model for a step. Its weights may have other paths, but have their order."""
    weights = models.frozen_backbone_of(model).weights
    before = as_bytes(weights)
    model.train_on_batch(x, targets_for(x))
    assert [path.split("/")[-1] for path in moved(before, as_bytes(weights))] == [
        path.split("/")[-1] for path in to_move
    ]


# The families of `keras.applications`, with the smallest images that they take.

slow = pytest.mark.slow
not_on_torch = pytest.mark.skipif(
    BACKEND == "torch",
    reason="Keras refuses to make a NASNetMobile on torch, for a bug it has there",
)
FAMILIES = [
    pytest.param("ConvNeXtTiny", 32, marks=slow),
    pytest.param("DenseNet121", 32, marks=slow),
    pytest.param("EfficientNetB0", 32, marks=slow),
    pytest.param("EfficientNetV2B0", 32, marks=slow),
    pytest.param("InceptionResNetV2", 75, marks=slow),
    pytest.param("InceptionV3", 75, marks=slow),
    # The second version takes twice as long as the first.
    pytest.param("MobileNet", 32, marks=slow_on("torch")),
    pytest.param("MobileNetV2", 32, marks=slow_on("tensorflow", "jax")),
    pytest.param("MobileNetV3Large", 32, marks=slow),
    pytest.param("MobileNetV3Small", 32, marks=slow),
    pytest.param("NASNetMobile", 32, marks=[slow, not_on_torch]),
    pytest.param("ResNet50", 32, marks=slow),
    pytest.param("ResNet50V2", 32, marks=slow),
    pytest.param("VGG16", 32, marks=slow),
    pytest.param("VGG19", 32, marks=slow),
    pytest.param("Xception", 71, marks=slow),
]


@pytest.mark.eager
@pytest.mark.covers("backbone: the families of keras.applications")
@pytest.mark.parametrize(("name", "size"), FAMILIES)
def test_family_of_keras_applications(name, size, tmp_path):
    make = getattr(keras.applications, name)
    base = make(input_shape=(size, size, 3), include_top=False, weights=None)
    x = random_array(4, size, size, 3)
    pretrain(base, x)
    to_move = paths_to_train(base)
    model = outer_model(FrozenBackbone(base), x, [LAYERS.GlobalAveragePooling2D()])
    check(model, x, to_move, tmp_path)


def test_no_family_of_keras_applications_is_left_out():
    def modules(names):
        return {getattr(keras.applications, name).__module__ for name in names}

    every = [name for name in dir(keras.applications) if name[0].isupper()]
    assert modules(every) == modules(family.values[0] for family in FAMILIES)


# Backbones of other layers. A builder returns the backbone and inputs for it.


def random_tokens(samples=6, length=3, vocabulary=7):
    """Numbers of words; 0, which masks, at the end of each row."""
    tokens = np.random.default_rng(0).integers(1, vocabulary, (samples, length))
    tokens[:, -1] = 0
    return tokens.astype("int32")


def strings(rows):
    import tensorflow as tf

    return tf.constant(rows)


def subclassed():
    kinds = ["conv", "batchnorm", "nested", "dropout", "shared", "layernorm"]
    return models.Subclassed(kinds), random_array(6, models.FEATURES)


def sub_model_called_twice():
    block = models.functional(["dense", "batchnorm"])
    inputs = keras.Input((models.FEATURES,))
    outputs = LAYERS.add([block(block(inputs)), inputs])
    return keras.Model(inputs, outputs), random_array(6, models.FEATURES)


def embedding_and_lstm():
    base = keras.Sequential(
        [
            LAYERS.Embedding(7, 4, mask_zero=True),
            LAYERS.LSTM(3, return_sequences=True, dropout=0.5),
            LAYERS.BatchNormalization(),
            LAYERS.LSTM(3, recurrent_dropout=0.5),
        ]
    )
    return base, random_tokens()


def bidirectional_gru():
    base = keras.Sequential(
        [
            LAYERS.Bidirectional(LAYERS.GRU(3, return_sequences=True, dropout=0.5)),
            LAYERS.BatchNormalization(),
            LAYERS.Bidirectional(LAYERS.GRU(2), merge_mode="sum"),
        ]
    )
    return base, random_array(6, 3, 3)


def attention():
    inputs = keras.Input((5, 4))
    # Without biases: that of the keys has no gradient, since softmax takes no notice of it.
    attended = LAYERS.MultiHeadAttention(2, 3, dropout=0.5, use_bias=False)(inputs, inputs)
    x = LAYERS.LayerNormalization()(LAYERS.add([inputs, LAYERS.Dropout(0.5)(attended)]))
    hidden = LAYERS.Dense(4, activation="gelu")(LAYERS.BatchNormalization()(x))
    outputs = LAYERS.GroupNormalization(2)(LAYERS.add([x, hidden]))
    return keras.Model(inputs, outputs), random_array(6, 5, 4)


def adapted_normalization():
    x = 3 * random_array(6, 4) + 2
    normalization = LAYERS.Normalization()
    normalization.adapt(x)
    return keras.Sequential([normalization, *models.sequential(["dense", "batchnorm"]).layers]), x


def spectral_normalization():
    base = keras.Sequential(
        [
            LAYERS.SpectralNormalization(LAYERS.Conv1D(3, 2)),
            LAYERS.BatchNormalization(),
            LAYERS.Flatten(),
            LAYERS.SpectralNormalization(LAYERS.Dense(4), power_iterations=2),
        ]
    )
    return base, random_array(6, 5, 3)


def time_distributed():
    inputs = keras.Input((2, 8, 8, 2))
    x = LAYERS.TimeDistributed(LAYERS.Conv2D(3, 3, activation="tanh"))(inputs)
    x = LAYERS.TimeDistributed(LAYERS.BatchNormalization())(x)
    frame = keras.Sequential(
        [LAYERS.Conv2D(2, 3), LAYERS.BatchNormalization(), LAYERS.GlobalAveragePooling2D()]
    )
    return keras.Model(inputs, LAYERS.TimeDistributed(frame)(x)), random_array(6, 2, 8, 8, 2)


WORDS = ["red", "green", "blue"]


def string_lookup():
    x = strings([[WORDS[i % 3], WORDS[i % 2]] for i in range(6)])
    layers = [LAYERS.StringLookup(vocabulary=WORDS), LAYERS.Embedding(4, 3)]
    return keras.Sequential([*layers, LAYERS.BatchNormalization(), LAYERS.Flatten()]), x


def text_vectorization():
    vectorization = LAYERS.TextVectorization(output_sequence_length=4)
    vectorization.adapt(strings(["red green", "blue, green!"]))
    layers = [vectorization, LAYERS.Embedding(6, 3, mask_zero=True), LAYERS.GRU(3)]
    x = strings([["red"], ["green red"], ["Blue blue"], ["black"]])
    return keras.Sequential([*layers, LAYERS.BatchNormalization()]), x


on_tensorflow_only = pytest.mark.skipif(
    BACKEND != "tensorflow", reason="only TensorFlow has tensors of strings to call a model with"
)


def backbone_of(make, name, *marks):
    return pytest.param(make, marks=[pytest.mark.covers(f"backbone: {name}"), *marks], id=name)


eager = pytest.mark.eager
KINDS = [
    # One is compiled: that each kind of layer moves as it is to does not depend on it.
    backbone_of(subclassed, "subclassed model", eager),
    backbone_of(sub_model_called_twice, "nested model called twice"),
    backbone_of(embedding_and_lstm, "Embedding and LSTM, masks", eager),
    backbone_of(bidirectional_gru, "Bidirectional GRU", eager),
    backbone_of(attention, "MultiHeadAttention", eager),
    backbone_of(adapted_normalization, "adapted Normalization", eager),
    backbone_of(spectral_normalization, "SpectralNormalization", eager),
    backbone_of(time_distributed, "TimeDistributed", eager),
    backbone_of(string_lookup, "StringLookup", on_tensorflow_only, eager),
    backbone_of(text_vectorization, "TextVectorization", on_tensorflow_only, eager),
]


@pytest.mark.parametrize("make", KINDS)
def test_backbone_of_other_layers(make, tmp_path):
    base, x = make()
    pretrain(base, x)
    to_move = paths_to_train(base)
    model = outer_model(FrozenBackbone(base), x, [LAYERS.Flatten()])
    loaded = check(model, x, to_move, tmp_path)
    check_step(loaded, x, to_move)


@pytest.mark.eager
@pytest.mark.parametrize(
    ("make", "inference_mode"),
    [
        (sub_model_called_twice, "always"),
        (spectral_normalization, "batchnorm"),
        pytest.param(subclassed, "batchnorm", marks=slow),
        pytest.param(spectral_normalization, "always", marks=slow),
        pytest.param(subclassed, "always", marks=slow),
        pytest.param(sub_model_called_twice, "batchnorm", marks=slow),
        pytest.param(time_distributed, "always", marks=slow),
        pytest.param(time_distributed, "batchnorm", marks=slow),
    ],
)
def test_statistics_hold_where_batchnorm_trains(make, inference_mode, tmp_path):
    base, x = make()
    pretrain(base, x)
    trained = {weight.path for weight in base.trainable_weights}
    if inference_mode == "batchnorm":
        # In training mode, SpectralNormalization iterates on this vector.
        trained |= {weight.path for weight in base.weights if weight.name == "vector_u"}
    to_move = [weight.path for weight in base.weights if weight.path in trained]
    wrapper = FrozenBackbone(base, inference_mode=inference_mode)
    model = outer_model(wrapper, x, [LAYERS.Flatten()])
    loaded = check(model, x, to_move, tmp_path, train_batchnorm=True)
    check_step(loaded, x, to_move)


@pytest.mark.eager
@pytest.mark.covers("backbone: shared, called twice (siamese)")
def test_backbone_called_twice(tmp_path):
    base = models.functional(["dense", "batchnorm", "nested", "dropout", "conv"])
    x = [random_array(6, models.FEATURES), random_array(6, models.FEATURES)[::-1]]
    pretrain(base, x[0])
    to_move = paths_to_train(base)
    wrapper = FrozenBackbone(base)
    left, right = keras.Input((models.FEATURES,)), keras.Input((models.FEATURES,))
    likeness = LAYERS.Multiply()([wrapper(left), wrapper(right)])
    model = keras.Model([left, right], LAYERS.Dense(1)(likeness))
    loaded = check(model, x, to_move, tmp_path)
    check_step(loaded, x, to_move)
