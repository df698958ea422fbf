"""Fine-tunes a KerasHub image task in one `fit`, and deploys it without keras_tl.

The task classifies handwritten digits (scikit-learn's). Its head trains on the frozen ResNet, which
is then unfrozen and fine-tuned; its BatchNormalization statistics stay constant. The task applies
its own preprocessing to raw pixels. Then the plain model, which takes preprocessed pixels, is saved
for programs that have no keras_tl, and exported.

    python -m pip install keras-hub scikit-learn
    python examples/keras_hub_task.py            # ResNet-18 with ImageNet's weights (a download)
    python examples/keras_hub_task.py --small    # a small one with random weights, in seconds
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_hub
import numpy as np
from sklearn.datasets import load_digits

from keras_tl import (
    FreezeGuard,
    FrozenBackbone,
    UnfreezeAtConvergence,
    trainable_report,
    unwrap,
)

PRESET, SIZE = "resnet_18_imagenet", 32


def digits(count):
    """Returns pictures with values from 0 to 255 in three channels, and labels."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1)[:count] * (255 / 16)
    images = np.repeat(images.repeat(4, axis=1).repeat(4, axis=2), 3, axis=3)
    return images.astype("float32"), labels[:count]


def make_parts(small):
    """Returns the backbone and the preprocessor."""
    models = keras_hub.models
    if not small:
        return (
            models.Backbone.from_preset(PRESET),
            models.ImageClassifierPreprocessor.from_preset(PRESET),
        )
    backbone = models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64, 64],
        stackwise_num_blocks=[1, 1],
        stackwise_num_strides=[1, 2],
        block_type="basic_block",
        image_shape=(SIZE, SIZE, 3),
    )
    converter = keras_hub.layers.ResNetImageConverter(image_size=(SIZE, SIZE), scale=1 / 255)
    return backbone, models.ResNetImageClassifierPreprocessor(converter)


def main():
    """Trains, and says what trained."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--small", action="store_true")
    small = parser.parse_args().small
    keras.utils.set_random_seed(0)
    images, labels = digits(240 if small else 1000)
    split = 2 * len(images) // 3
    backbone, preprocessor = make_parts(small)
    task = keras_hub.models.ImageClassifier(
        backbone=FrozenBackbone(backbone), preprocessor=preprocessor, num_classes=10
    )
    task.compile(
        keras.optimizers.Adam(1e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    switch = UnfreezeAtConvergence(1e-4, max_frozen_epochs=2 if small else None)
    task.fit(
        images[:split],
        labels[:split],
        validation_data=(images[split:], labels[split:]),
        epochs=4 if small else 30,
        callbacks=[switch, FreezeGuard()],
        verbose=2,
    )
    print(trainable_report(task))
    plain = unwrap(task)
    plain.save("digits.keras")
    plain.export("digits", verbose=False)
    expected = task.predict(images[split:], verbose=0)
    found = plain.predict(task.preprocessor(images[split:]), verbose=0)
    same = np.array_equal(found, expected)
    print(f"digits.keras and digits/ need no keras_tl; predictions equal bit for bit: {same}")


if __name__ == "__main__":
    main()
