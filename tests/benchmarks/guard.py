"""What FreezeGuard costs, as ratios.

Run by hand: `python -m tests.benchmarks.guard`. MobileNetV2 and ResNet50 at 96x96, random weights
and images. A check's time is set against an epoch of 1,024 images (or a step of 32, or `numpy.sum`
of the same bytes) in the same process, in turn.
"""

import time

import keras
import numpy as np

from keras_tl import FreezeGuard, FrozenBackbone
from keras_tl.guard.watch import WeightWatch
from tests.benchmarks.timing import BATCH, REPEATS, SHAPE, images, print_table, seconds

IMAGES = 1024


class Timed(FreezeGuard):
    """A guard that adds up how long its hooks took in each epoch."""

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        self.seconds, self.begins = [], []

    def on_epoch_begin(self, epoch, logs=None):
        self.begins.append(time.perf_counter())
        self.seconds.append(seconds(lambda: super(Timed, self).on_epoch_begin(epoch, logs)))

    def _on_train_batch_end(self, batch, logs=None):
        self.seconds[-1] += seconds(lambda: super(Timed, self)._on_train_batch_end(batch, logs))

    def on_epoch_end(self, epoch, logs=None):
        self.seconds[-1] += seconds(lambda: super(Timed, self).on_epoch_end(epoch, logs))


def model_on(application):
    keras.utils.set_random_seed(0)
    base = application(input_shape=SHAPE, include_top=False, weights=None, pooling="avg")
    model = keras.Sequential([keras.Input(SHAPE), FrozenBackbone(base), keras.layers.Dense(1)])
    model.compile("adam", keras.losses.BinaryCrossentropy(from_logits=True))
    return model, base


def shares(model, check):
    """The guard's share of each epoch but the first, which compiles."""
    x, y = images(IMAGES)
    guard = Timed(check=check, verbose=0)
    model.fit(x, y, BATCH, epochs=REPEATS + 2, callbacks=[guard], verbose=0)
    epochs = np.diff(guard.begins)
    rest = epochs - guard.seconds[:-1]
    return (np.array(guard.seconds[:-1]) / rest)[1:].tolist()


def against_numpy(base):
    """How fast a check runs through the weights, in terms of `numpy.sum` of each array."""
    watch = WeightWatch(base.weights)
    arrays = [np.array(weight) for weight in base.weights]
    watch.changes(), [array.sum() for array in arrays]
    for _ in range(REPEATS * 4):
        summing = seconds(lambda: [array.sum() for array in arrays])
        yield summing / seconds(watch.changes)


def first_check(base):
    return [seconds(lambda: WeightWatch(base.weights))]


def main():
    costs, speeds, compiling = [], [], []
    for application in (keras.applications.MobileNetV2, keras.applications.ResNet50):
        name = application.__name__
        model, base = model_on(application)
        compiling.append((name, first_check(base)[0]))
        speeds.append(
            (f"speed of a check of {name} / of `numpy.sum`", ">= 0.5", [*against_numpy(base)])
        )
        costs.append((f'{name}, `check="epoch"` / frozen epoch', "<= 0.01", shares(model, "epoch")))
        costs.append((f'{name}, `check="batch"` / frozen step', "<= 0.1", shares(model, "batch")))
    print_table([*costs, *speeds])
    for name, taken in compiling:
        print(f"The first check of {name}, which compiles: {taken:.2f} s.")


if __name__ == "__main__":
    main()
