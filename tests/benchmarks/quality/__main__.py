"""How well models are that are transferred in several ways, on real weights and data.

    python -m tests.benchmarks.quality                      # all pairs, 3 seeds
    python -m tests.benchmarks.quality --pairs films --seeds 5
    python -m tests.benchmarks.quality --table              # what there is, without new runs

Each run is a line of JSON in a folder of the user's (`--cache`), so that a command that was stopped
goes on where it was. Ways with one learning rate try each of a grid, and the one with the best
validation loss counts, seed by seed; their seconds are those of all rates. Scores are balanced
accuracy on held-out data: mean and standard deviation over the seeds, which are what came out.
"""

import argparse
import functools
import json
import os
import pathlib
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from keras_tl import FrozenBackbone, fine_tune
from tests.benchmarks.quality.pairs import PAIRS, MissingError

EPOCHS, PATIENCE, HEAD_RATE = 80, 4, 1e-2
FOLDER = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")


def compiled(pair, x, backbone, rate):
    inputs = keras.Input(x.shape[1:], dtype=x.dtype.name)
    features = keras.layers.Dropout(0.2)(pair.pooling()(backbone(inputs)))
    model = keras.Model(inputs, keras.layers.Dense(pair.classes)(features))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss, metrics=["accuracy"])
    return model


def everything(pair, train, validation, rate, *, wrapped=False, pretrained=True, head_only=False):
    """Trains in one stage, with the best weights by validation loss in the end."""
    backbone = pair.backbone(pretrained)
    if wrapped or head_only:
        backbone = FrozenBackbone(backbone)
    if wrapped:
        backbone.unfreeze()
    model = compiled(pair, train[0], backbone, rate)
    stopping = keras.callbacks.EarlyStopping(patience=PATIENCE, restore_best_weights=True)
    settings = {"epochs": EPOCHS, "batch_size": pair.batch_size, "verbose": 0}
    model.fit(*train, validation_data=validation, callbacks=[stopping], **settings)
    return model


def two_stages(pair, train, validation, rate, **settings):
    model = compiled(pair, train[0], FrozenBackbone(pair.backbone(True)), HEAD_RATE)
    limits = {"patience": PATIENCE, "fine_tune_patience": PATIENCE, "epochs": EPOCHS}
    settings = limits | {"learning_rate": rate} | settings
    batches = {"batch_size": pair.batch_size, "verbose": 0}
    fine_tune(model, *train, validation_data=validation, **batches, **settings)
    return model


# By name, the function and its rates; None is the grid of the pair.
WAYS = {
    "head only": (functools.partial(everything, head_only=True), (HEAD_RATE,)),
    "keras_tl, 1e-5": (two_stages, (1e-5,)),
    'keras_tl, "auto"': (two_stages, ("auto",)),
    'keras_tl, "auto", interpolated': (functools.partial(two_stages, interpolate=0.5), ("auto",)),
    "everything, FrozenBackbone": (functools.partial(everything, wrapped=True), None),
    "everything, plain": (everything, None),
    "from scratch": (functools.partial(everything, pretrained=False), None),
}


def balanced_accuracy(model, x, y):
    found = model.predict(x, batch_size=256, verbose=0).argmax(axis=1)
    return float(np.mean([np.mean(found[y == label] == label) for label in np.unique(y)]))


def run(pair, way, rate, seed):
    """Returns what one run gives."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    train, validation, tests = pair.data(seed)
    start = time.perf_counter()
    model = WAYS[way][0](pair, train, validation, rate)
    seconds = time.perf_counter() - start
    return {
        "seconds": round(seconds, 1),
        "val_loss": model.evaluate(*validation, verbose=0)[0],
        "scores": {name: balanced_accuracy(model, *test) for name, test in tests.items()},
    }


def read(path):
    lines = path.read_text().splitlines() if path.exists() else []
    results = [json.loads(line) for line in lines]
    return {(one["pair"], one["way"], one["rate"], one["seed"]): one for one in results}


def run_all(names, ways, seeds, path):
    """Does the runs that there are not yet."""
    for name in names:
        try:
            pair = PAIRS[name](path.parent)
        except MissingError as missing:
            print(f"{name}: left out. It needs `{missing}`", flush=True)
            continue
        for seed, way in ((seed, way) for seed in range(seeds) for way in ways):
            for rate in WAYS[way][1] or pair.rates:
                if (name, way, rate, seed) in read(path):
                    continue
                result = run(pair, way, rate, seed)
                with path.open("a") as file:
                    key = {"pair": name, "way": way, "rate": rate, "seed": seed}
                    file.write(json.dumps(key | result) + "\n")


def print_table(results, name):
    """Prints the table of a pair."""
    mine = [one for one in results.values() if one["pair"] == name]
    if not mine:
        return
    tests = list(mine[0]["scores"])
    print(f"\n### {name}\n\n| way | seeds | {' | '.join(tests)} | seconds |")
    print("|---" * (len(tests) + 3) + "|")
    for way in WAYS:
        seeds = sorted({one["seed"] for one in mine if one["way"] == way})
        if not seeds:
            continue
        tried = [[one for one in mine if (one["way"], one["seed"]) == (way, s)] for s in seeds]
        best = [min(runs, key=lambda one: one["val_loss"]) for runs in tried]
        cells = [_mean([one["scores"][test] for one in best]) for test in tests]
        seconds = statistics.mean(sum(one["seconds"] for one in runs) for runs in tried)
        print(f"| {way} | {len(seeds)} | {' | '.join(cells)} | {seconds:.0f} |")


def _mean(values):
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache", type=pathlib.Path, default=FOLDER / "keras_tl")
    parser.add_argument("--table", action="store_true", help="no new runs")
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    path = arguments.cache / "quality.jsonl"
    if not arguments.table:
        run_all(arguments.pairs, arguments.ways, arguments.seeds, path)
    results = read(path)
    for name in arguments.pairs:
        print_table(results, name)


if __name__ == "__main__":
    main()
