"""What learning rates by layer cost, as a ratio to one Adam.

Run by hand: `python -m tests.benchmarks.groups`. MobileNetV2 at 96x96, random weights and images,
all layers training: steps of 32 images with one Adam, and with a different rate for each of the
layers, in the same process, in turn.
"""

import keras

from keras_tl import FrozenBackbone, GroupOptimizer, layerwise_learning_rates
from keras_tl.learning_rates import LayerwiseLearningRates
from tests.benchmarks.timing import BATCH, SHAPE, images, paired, print_table, seconds

STEPS = 8


def model_with(make_optimizer):
    keras.utils.set_random_seed(0)
    base = keras.applications.MobileNetV2(
        SHAPE, include_top=False, weights=None, pooling="avg", name="base"
    )
    wrapper = FrozenBackbone(base)
    wrapper.unfreeze(train_batchnorm=True)
    model = keras.Sequential([keras.Input(SHAPE), wrapper, keras.layers.Dense(1)])
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(make_optimizer(wrapper), loss)
    return model


def by_block(wrapper):
    return grouped(wrapper, layerwise_learning_rates(wrapper, 1e-3, 0.8))


def by_layer(wrapper):
    names = [layer.name for layer in wrapper.backbone.layers if layer.weights]
    rates = {name: 1e-3 * 0.99**index for index, name in enumerate(names)}
    return grouped(wrapper, LayerwiseLearningRates(wrapper, rates))


def grouped(wrapper, rates):
    return GroupOptimizer(
        {"backbone": keras.optimizers.Adam(), "head": keras.optimizers.Adam(1e-3)},
        assign={"backbone": rates},
    )


def one_optimizer_a_block(wrapper):
    rates = layerwise_learning_rates(wrapper, 1e-3, 0.8)
    blocks = {}
    for name, rate in rates.items():
        blocks.setdefault(rate, []).append(wrapper.backbone.get_layer(name))
    groups = {f"block_{i}": keras.optimizers.Adam(rate) for i, rate in enumerate(blocks)}
    assign = dict(zip(groups, blocks.values(), strict=True))
    return GroupOptimizer({**groups, "head": keras.optimizers.Adam(1e-3)}, assign=assign)


def main():
    x, y = images(BATCH * STEPS)
    plain = model_with(lambda wrapper: keras.optimizers.Adam(1e-3))

    def epoch(model):
        return lambda: seconds(lambda: model.fit(x, y, BATCH, verbose=0))

    ways = {
        "a rate for each of 17 blocks / one Adam": by_block,
        "a rate for each of 104 layers / one Adam": by_layer,
        "an optimizer for each of 17 blocks / one Adam": one_optimizer_a_block,
    }
    print_table(
        [(name, 1.05, paired(epoch(model_with(way)), epoch(plain))) for name, way in ways.items()]
    )


if __name__ == "__main__":
    main()
