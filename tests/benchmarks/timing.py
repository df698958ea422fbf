"""What the benchmarks share: data, clocks and tables of ratios."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import operator
import statistics
import time

import keras
import numpy as np

SHAPE = (96, 96, 3)
BATCH = 32
REPEATS = 5


def images(count):
    random = np.random.default_rng(0)
    return random.normal(size=(count, *SHAPE)).astype("float32"), random.integers(0, 2, (count, 1))


class Clock(keras.callbacks.Callback):
    """Notes when each epoch ended and each step ended."""

    def on_train_begin(self, logs=None):
        self.epoch_ends, self.step_ends = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.step_ends.append(time.perf_counter())

    def on_epoch_end(self, epoch, logs=None):
        self.epoch_ends.append(time.perf_counter())


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def paired(first, second):
    """Ratios of two timings taken in turn, after one of each that does not count."""
    first(), second()
    return [first() / second() for _ in range(REPEATS)]


def print_table(rows):
    """Prints rows of a name, a target such as `"<= 1.1"` (or none) and a list of ratios."""
    print("| ratio | median | range | target | met |\n|---|---|---|---|---|")
    for name, target, ratios in rows:
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        met = verdict(target, middle)
        spread = f"{low:.3g} to {high:.3g}" if len(ratios) > 1 else ""
        print(f"| {name} | {middle:.3g} | {spread} | {target} | {met} |", flush=True)
    print(flush=True)


def verdict(target, value):
    """Whether a value meets a target: "yes", "MISSED", or "" where there is none."""
    if not target:
        return ""
    relation, bound = target.split()
    met = {"<=": operator.le, ">=": operator.ge}[relation](value, float(bound))
    return "yes" if met else "MISSED"
