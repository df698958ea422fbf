"""What records of the part that is frozen save, as ratios to training through the whole model.

Run by hand: `python -m tests.benchmarks.stage_records`. keras.applications at 96x96, random weights
and images, on the processor's cores that the process may use; times of each pair in turn, in one
process.
"""

import keras

from keras_tl import (
    FeatureCache,
    FreezeGuard,
    FrozenBackbone,
    Stage,
    UnfreezeAtConvergence,
    fine_tune,
)
from tests.benchmarks.timing import BATCH, SHAPE, images, paired, print_table, seconds

SAMPLES = 1024
EPOCHS = 3


def model_of(application):
    keras.utils.set_random_seed(0)
    base = keras.applications.__dict__[application](
        input_shape=SHAPE, include_top=False, weights=None
    )
    pooling = keras.layers.GlobalAveragePooling2D()
    wrapper = FrozenBackbone(base)
    model = keras.Sequential([keras.Input(SHAPE), wrapper, pooling, keras.layers.Dense(1)])
    model.compile("adam", keras.losses.BinaryCrossentropy(from_logits=True))
    return model, wrapper


def epochs(application, layers, x, y):
    """Ratios of epochs on records to epochs through the whole model."""
    model, wrapper = model_of(application)
    wrapper.unfreeze(layers)
    model.compile("adam", keras.losses.BinaryCrossentropy(from_logits=True))
    cache = FeatureCache(model)
    features = cache(x, y, batch_size=BATCH, verbose=0)
    return paired(
        lambda: seconds(lambda: cache.head.fit(features, shuffle=False, verbose=0)),
        lambda: seconds(lambda: model.fit(x, y, batch_size=BATCH, verbose=0)),
    )


def gradual(x, y):
    """A ratio of two whole runs, with all that is traced and recorded in them."""
    _, wrapper = model_of("ResNet50")
    stages = [
        {**stage.to_dict(), "epochs": EPOCHS} for stage in Stage.by_depth(wrapper, 4, 1e-4, 0.5)
    ]
    settings = {"epochs": EPOCHS * 5, "batch_size": BATCH, "verbose": 0}
    unfreezing = {"stages": stages, "max_frozen_epochs": EPOCHS, "monitor": "loss", "patience": 99}

    def recorded():
        fine_tune(model_of("ResNet50")[0], x, y, fine_tune_patience=99, **settings, **unfreezing)

    def through():
        switch = UnfreezeAtConvergence(fine_tune_patience=99, verbose=0, **unfreezing)
        model_of("ResNet50")[0].fit(x, y, callbacks=[switch, FreezeGuard(verbose=0)], **settings)

    return [seconds(recorded) / seconds(through)]


def main():
    x, y = images(SAMPLES)
    last = epochs("MobileNetV2", "block_16.*|Conv_1.*", x, y)
    stage = epochs("ResNet50", "conv5.*", x, y)
    print_table(
        [
            ("epoch on records / through MobileNetV2, its last block trains", "<= 0.33", last),
            ("epoch on records / through ResNet50, its last stage trains", "<= 0.5", stage),
        ]
    )
    print_table([("ResNet50 in four stages: `fine_tune` / guarded `fit`", "<= 0.6", gradual(x, y))])


if __name__ == "__main__":
    main()
