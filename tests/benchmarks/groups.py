"""What learning rates by layer cost, as a ratio to one Adam.

Run by hand: `python -m tests.benchmarks.groups`. MobileNetV2 at 96x96, random weights and images,
all layers training: steps of 32 images with one Adam, and with a different rate for each of the
layers, in the same process, in turn.
"""

import statistics

import keras

from keras_tl import FrozenBackbone, GroupOptimizer, layerwise_learning_rates
from keras_tl.optimizers.learning_rates import LayerwiseLearningRates
from tests.benchmarks.timing import BATCH, REPEATS, SHAPE, images, print_table, seconds

STEPS = 20


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


def ratios(model, plain, x, y):
    """Ratios of the median times of steps made in turn, as the machine's speed wavers."""

    def step(one):
        return seconds(lambda: one.train_on_batch(x, y))

    step(model), step(plain)
    for _ in range(REPEATS):
        pairs = [(step(model), step(plain)) for _ in range(STEPS)]
        yield statistics.median(one for one, _ in pairs) / statistics.median(
            other for _, other in pairs
        )


def main():
    x, y = images(BATCH)
    plain = model_with(lambda wrapper: keras.optimizers.Adam(1e-3))
    ways = {
        "a rate for each of 17 blocks / one Adam": by_block,
        "a rate for each of 104 layers / one Adam": by_layer,
        "an optimizer for each of 17 blocks / one Adam": one_optimizer_a_block,
    }
    print_table(
        [(name, "<= 1.05", [*ratios(model_with(way), plain, x, y)]) for name, way in ways.items()]
    )


if __name__ == "__main__":
    main()
