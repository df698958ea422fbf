"""How well models are that are transferred in several ways, on real weights and data.

    python -m tests.benchmarks.quality                      # all pairs, five seeds: hours
    python -m tests.benchmarks.quality --pairs films --seeds 3
    python -m tests.benchmarks.quality --show               # what there is, without new runs

Each run is a line of JSON in a folder of the user's (`--cache`), so that a command that was stopped
continues where it was. Ways with one learning rate try each of a grid, and the one with the best
validation loss counts, seed by seed; their seconds are those of all rates. Scores are balanced
accuracy on held-out data, mean and standard deviation over the seeds; the error of calibration is
that on the first of these data, before and after `scale_temperature` on the validation data.
Seconds are of the processor, all cores together, so that what else the machine does changes them
little. It prints tables, and draws a picture in the same folder.
"""

import argparse
import json
import os
import pathlib
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from keras_tl import scale_temperature
from keras_tl.visualization.axes import COLORS, GRAY
from tests.benchmarks.quality.options import OPTIONS
from tests.benchmarks.quality.pairs import PAIRS, UNSEEN, MissingError
from tests.benchmarks.quality.ways import WAYS

FOLDER = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")

KNOWN = WAYS | OPTIONS
_ERRORS = ("calibration", "after_scaling")
# The ways in the picture, from the top.
PICTURED = (
    "head only",
    "keras_tl",
    "keras_tl, interpolate=0.5",
    "keras_tl, one frozen epoch",
    'keras_tl, layers="scales"',
    "everything, FrozenBackbone",
    "everything, plain",
)


def probabilities(model, x):
    logits = model.predict(x, batch_size=256, verbose=0)
    return np.asarray(keras.ops.softmax(logits))


def balanced_accuracy(predicted, y):
    found = predicted.argmax(axis=1)
    return float(np.mean([np.mean(found[y == label] == label) for label in np.unique(y)]))


def calibration_error(predicted, y, bins=15):
    """Expected calibration error (Guo et al. 2017): how far confidence is from accuracy."""
    confidence, right = predicted.max(axis=1), predicted.argmax(axis=1) == y
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(np.sum(right[bin_of == n]) - np.sum(confidence[bin_of == n])) for n in range(bins)]
    return float(np.sum(gaps) / len(y))


def run(pair, way, rate, seed):
    """Returns what one run gives."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    train, validation, tests = pair.data(seed)
    start, cpu = time.perf_counter(), time.process_time()
    model = KNOWN[way][0](pair, train, validation, rate)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    predicted = {name: probabilities(model, x) for name, (x, _) in tests.items()}
    first = next(iter(tests))
    val_loss = model.evaluate(*validation, verbose=0)[0]
    scale_temperature(model, *validation)
    scaled = probabilities(model, tests[first][0])
    return {
        "seconds": round(seconds, 1),
        "cpu": round(cpu, 1),
        "val_loss": val_loss,
        "calibration": calibration_error(predicted[first], tests[first][1]),
        "after_scaling": calibration_error(scaled, tests[first][1]),
        "scores": {name: balanced_accuracy(predicted[name], y) for name, (_, y) in tests.items()},
    }


def read(path):
    lines = path.read_text().splitlines() if path.exists() else []
    results = [json.loads(line) for line in lines]
    return {(one["pair"], one["way"], one["rate"], one["seed"]): one for one in results}


def run_all(names, ways, seeds, path):
    """Does the runs that there are not yet."""
    for name in names:
        try:
            pair = (PAIRS | UNSEEN)[name](path.parent)
        except MissingError as missing:
            print(f"{name}: left out. It needs `{missing}`", flush=True)
            continue
        there = [way for way in ways if way not in pair.without]
        for seed, way in ((seed, way) for seed in range(seeds) for way in there):
            for rate in KNOWN[way][1] or pair.rates:
                if (name, way, rate, seed) in read(path):
                    continue
                result = run(pair, way, rate, seed)
                with path.open("a") as file:
                    key = {"pair": name, "way": way, "rate": rate, "seed": seed}
                    file.write(json.dumps(key | result) + "\n")


def chosen(results, name):
    """Returns by way the runs that count, one a seed, each with the seconds of all its rates."""
    found = {}
    for way in KNOWN:
        mine = [one for one in results.values() if (one["pair"], one["way"]) == (name, way)]
        for seed in sorted({one["seed"] for one in mine}):
            tried = [one for one in mine if one["seed"] == seed]
            best = min(tried, key=lambda one: one["val_loss"])
            cpu = sum(one["cpu"] for one in tried)
            found.setdefault(way, []).append({**best, "cpu": cpu})
    return found


def table(results, name):
    """Returns the table of a pair, in Markdown."""
    found = chosen(results, name)
    tests = list(next(iter(found.values()))[0]["scores"])
    lines = [
        f"| {name}: way | seeds | {' | '.join(tests)} | calibration error | CPU seconds |",
        "|---" * (len(tests) + 4) + "|",
    ]
    for way, runs in found.items():
        cells = [_mean([one["scores"][test] for one in runs]) for test in tests]
        errors = [[one[of] for one in runs if of in one] for of in _ERRORS]
        cells.append(" -> ".join(f"{statistics.mean(some):.3f}" for some in errors if some))
        cells.append(f"{statistics.mean(one['cpu'] for one in runs):.0f}")
        lines.append(f"| {way} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(values):
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def draw(results, names, path):
    """Draws scores within the domain, a panel a pair and a row a way.

    Lines are standard deviations over the seeds, and processor seconds are beside them.
    """
    from matplotlib.figure import Figure

    found = {name: chosen(results, name) for name in names}
    rows = [way for way in PICTURED if any(way in runs for runs in found.values())]
    figure = Figure(figsize=(8, 1 + len(rows) / 2), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, (name, ways) in zip(panels, found.items(), strict=True):
        for row, way in enumerate(rows):
            if way not in ways:
                continue
            scores = [next(iter(one["scores"].values())) for one in ways[way]]
            spread = statistics.stdev(scores) if len(scores) > 1 else None
            color, mark = (COLORS[0], "o") if way.startswith("keras_tl") else (COLORS[5], "s")
            axes.errorbar(statistics.mean(scores), row, xerr=spread, fmt=mark, color=color)
            seconds = statistics.mean(one["cpu"] for one in ways[way])
            beside = axes.get_yaxis_transform()
            axes.text(1.02, row, f"{seconds:.0f} s", va="center", size=8, transform=beside)
        axes.set(title=name, xlabel="balanced accuracy")
        axes.grid(axis="x", color=GRAY, alpha=0.3)
        axes.tick_params(left=False)
    panels[0].set_yticks(range(len(rows)), rows)
    panels[0].invert_yaxis()
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--pairs", nargs="+", choices=PAIRS | UNSEEN, default=list(PAIRS))
    parser.add_argument("--ways", nargs="+", choices=KNOWN, default=list(WAYS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cache", type=pathlib.Path, default=FOLDER / "keras_tl")
    parser.add_argument("--show", action="store_true", help="no new runs")
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    path = arguments.cache / "quality.jsonl"
    if not arguments.show:
        run_all(arguments.pairs, arguments.ways, arguments.seeds, path)
    results = read(path)
    there = [name for name in arguments.pairs if chosen(results, name)]
    for name in there:
        print(f"\n{table(results, name)}")
    if there:
        draw(results, there, arguments.cache / "quality.png")


if __name__ == "__main__":
    main()
