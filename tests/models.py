"""Tiny models that tests are made of."""

import keras

from keras_tl import FrozenBackbone

FEATURES = 4


def make_layer(kind):
    """A layer, or a small stack, that maps `(batch, FEATURES)` to `(batch, FEATURES)`."""
    if kind == "dense":
        return keras.layers.Dense(FEATURES, activation="tanh")
    if kind == "batchnorm":
        return keras.layers.BatchNormalization(momentum=0.5)
    if kind == "dropout":
        return keras.layers.Dropout(0.5)
    if kind == "layernorm":
        return keras.layers.LayerNormalization()
    if kind == "conv":
        return keras.Sequential(
            [
                keras.layers.Reshape((FEATURES, 1)),
                keras.layers.Conv1D(2, 3, padding="same"),
                keras.layers.BatchNormalization(momentum=0.5),
                keras.layers.Flatten(),
                keras.layers.Dense(FEATURES),
            ]
        )
    if kind == "nested":
        return functional(["dense", "batchnorm", "dropout"])
    if kind == "shared":
        return SharedTwice()
    raise ValueError(kind)


@keras.saving.register_keras_serializable(package="tests")
class SharedTwice(keras.layers.Layer):
    """A layer that calls its one Dense and one BatchNormalization twice."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = keras.layers.Dense(FEATURES)
        self.norm = keras.layers.BatchNormalization(momentum=0.5)

    def build(self, input_shape):
        self.dense.build(input_shape)
        self.norm.build(input_shape)

    def call(self, x):
        return self.norm(self.dense(self.norm(self.dense(x))))

    def compute_output_shape(self, input_shape):
        return input_shape


def functional(kinds):
    inputs = keras.Input((FEATURES,))
    x = inputs
    for kind in kinds:
        x = make_layer(kind)(x)
    return keras.Model(inputs, x)


def sequential_of(*layers):
    return keras.Sequential([keras.Input((FEATURES,)), *layers])


def sequential(kinds):
    return keras.Sequential([keras.Input((FEATURES,)), *[make_layer(kind) for kind in kinds]])


@keras.saving.register_keras_serializable(package="tests")
class Subclassed(keras.Model):
    """The same layers in a subclassed model that does not mention `training`, not built."""

    def __init__(self, kinds, **kwargs):
        super().__init__(**kwargs)
        self.kinds = list(kinds)
        self.stack = [make_layer(kind) for kind in kinds]

    def call(self, x):
        for layer in self.stack:
            x = layer(x)
        return x

    def get_config(self):
        return {**super().get_config(), "kinds": list(self.kinds)}


def functional_outer(backbone, head=()):
    """A Functional model of a backbone, some layers and a Dense."""
    inputs = keras.Input((FEATURES,))
    x = backbone(inputs)
    for layer in head:
        x = layer(x)
    return keras.Model(inputs, keras.layers.Dense(1, name="output")(x))


@keras.saving.register_keras_serializable(package="tests")
class SubclassedOuter(keras.Model):
    """The same as a subclassed model that does not pass `training` on, and is not built."""

    def __init__(self, backbone, head=(), **kwargs):
        super().__init__(**kwargs)
        self.backbone = backbone
        self.head = list(head)
        self.top = keras.layers.Dense(1, name="output")

    def call(self, x, training=None):
        x = self.backbone(x)
        for layer in self.head:
            x = layer(x)
        return self.top(x)


def frozen_backbone_of(model):
    """The FrozenBackbone in a model."""
    return next(layer for layer in model.layers if isinstance(layer, FrozenBackbone))


def statistics(layer):
    """The moving statistics of all BatchNormalization layers in a layer or model."""
    return [w for w in layer.weights if w.name in ("moving_mean", "moving_variance")]
