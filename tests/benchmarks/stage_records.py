"""What records of the part that is frozen save, as ratios to training through the whole model.

Run by hand: `python -m tests.benchmarks.stage_records`. keras.applications at 96x96, random weights
and images, on the processor's cores that the process may use; times of each pair in turn, in one
process. With `--only stages` just the run in four stages, and with `--picture FILE` a picture of
what an epoch of each of these costs.
"""

import argparse
import statistics
import time

import keras

from keras_tl import (
    FeatureCache,
    FreezeGuard,
    FrozenBackbone,
    Stage,
    UnfreezeAtConvergence,
    fine_tune,
)
from keras_tl.visualization.axes import COLORS
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


class ProcessorSeconds(keras.callbacks.Callback):
    """Notes the processor seconds of each epoch."""

    def __init__(self):
        super().__init__()
        self.epochs = []

    def on_epoch_begin(self, epoch, logs=None):
        self._start = time.process_time()

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append(time.process_time() - self._start)

    def by_stage(self):
        """Returns the median of each stage's epochs, all of which have the same number."""
        starts = range(0, len(self.epochs), EPOCHS)
        return [statistics.median(self.epochs[start : start + EPOCHS]) for start in starts]


def gradual(x, y):
    """Whole runs in stages, with all that is traced and recorded in them.

    Returns:
        By the way that the run went, its processor seconds, and those of an epoch in each stage.
    """
    _, wrapper = model_of("ResNet50")
    stages = [
        {**stage.to_dict(), "epochs": EPOCHS} for stage in Stage.by_depth(wrapper, 4, 1e-4, 0.5)
    ]
    settings = {"epochs": EPOCHS * 5, "batch_size": BATCH, "verbose": 0}
    unfreezing = {"stages": stages, "max_frozen_epochs": EPOCHS, "monitor": "loss", "patience": 99}

    def recorded(clock):
        both = settings | unfreezing
        fine_tune(model_of("ResNet50")[0], x, y, fine_tune_patience=99, callbacks=clock, **both)

    def through(clock):
        switch = UnfreezeAtConvergence(fine_tune_patience=99, verbose=0, **unfreezing)
        callbacks = [clock, switch, FreezeGuard(verbose=0)]
        model_of("ResNet50")[0].fit(x, y, callbacks=callbacks, **settings)

    found = {}
    for name, way in {"`fit`": through, "`fine_tune`": recorded}.items():
        clock, start = ProcessorSeconds(), time.process_time()
        way(clock)
        found[name] = (time.process_time() - start, clock.by_stage())
    return found


def draw(found, path):
    """Draws what an epoch costs in each stage, a bar a way."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(8, 3.5), layout="constrained").subplots()
    names = ["head alone", "+ last quarter", "+ third quarter", "+ second quarter", "all"]
    for place, (color, (way, (_, costs))) in enumerate(zip(COLORS, found.items(), strict=False)):
        rows = [row + 0.4 * place - 0.2 for row in range(len(costs))]
        bars = axes.barh(rows, costs, height=0.36, color=color, label=way.strip("`"))
        axes.bar_label(bars, fmt="%.1f", padding=3, size=9)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set(xlabel="processor seconds of an epoch", ylabel="what trains")
    axes.legend(frameon=False)
    axes.figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--only", choices=["epochs", "stages"])
    parser.add_argument("--images", type=int, default=SAMPLES)
    parser.add_argument("--picture", help="a file to draw the costs of stages in")
    given = parser.parse_args()
    x, y = images(given.images)
    if given.only != "stages":
        last = epochs("MobileNetV2", "block_16.*|Conv_1.*", x, y)
        stage = epochs("ResNet50", "conv5.*", x, y)
        print_table(
            [
                ("epoch on records / through MobileNetV2, its last block trains", "<= 0.33", last),
                ("epoch on records / through ResNet50, its last stage trains", "<= 0.5", stage),
            ]
        )
    if given.only != "epochs":
        found = gradual(x, y)
        (through, _), (recorded, _) = found.values()
        ways = "ResNet50 in four stages, processor seconds: `fine_tune` / guarded `fit`"
        print_table([(ways, "<= 0.6", [recorded / through])])
        if given.picture:
            draw(found, given.picture)


if __name__ == "__main__":
    main()
