"""A whole transfer-learning run against Lightning's `BackboneFinetuning`, and by hand in Keras.

    python -m pip install -e ".[peers]"                     # torch and Lightning
    python -m tests.benchmarks.peers
    python -m tests.benchmarks.peers --cores 1              # where other work runs beside it
    KERAS_BACKEND=jax python -m tests.benchmarks.peers --repeats 5

Seven convolutions on 1,024 random images at 96x96: three epochs of the head on the frozen backbone
and three of the whole network, with the same batches, optimizer and rates, and as many weights that
train in each epoch, which is asserted. Each way is in a process of its own, in turn, and is timed
from the making of the network to the end of training: what a framework traces and compiles counts,
what it imports does not. Nothing is validated, logged or saved.

Where other work runs beside it, torch's threads spin while they wait for each other, and the times
say nothing: run it on one core there. Processor seconds then tell more than the clock.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys

import keras

from tests.benchmarks.peers.task import Task
from tests.benchmarks.timing import print_table

PACKAGE = "tests.benchmarks.peers"
LIGHTNING = "Lightning's `BackboneFinetuning`"
BY_HAND = "two `fit`s by hand"
COMMANDS = {
    "`fit` with `UnfreezeAtConvergence`": ("keras_ways", "fit"),
    "`fine_tune`": ("keras_ways", "fine_tune"),
    BY_HAND: ("keras_ways", "by_hand"),
    LIGHTNING: ("lightning_way",),
}
TARGET = "<= 0.7"


def missing():
    """Returns what to do before this can run, or an empty string."""
    absent = [name for name in ("torch", "lightning") if importlib.util.find_spec(name) is None]
    if not absent:
        return ""
    command = f'`{sys.executable} -m pip install -e ".[peers]"`'
    return f"Not installed: {', '.join(absent)}. {command} brings what this benchmark compares."


def run(way):
    """Runs a way in a process of its own. Returns what it measured."""
    module, *arguments = COMMANDS[way]
    command = [sys.executable, "-m", f"{PACKAGE}.{module}", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def check_same_work(way, found, task):
    """Raises an AssertionError if another number of weights trained than the task says."""
    expected = task.trained_each_epoch()
    trained = found["trained"]
    assert trained == expected, f"{way}: {trained} numbers trained in each epoch, not {expected}."


def stay_on(cores):
    """Keeps this process, and those that it starts, on so many cores."""
    if cores is None:
        return
    if not hasattr(os, "sched_setaffinity"):
        sys.exit(f"`--cores` needs Linux: {sys.platform} cannot keep a process on some cores.")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])


def rows(runs, kind, target):
    """Returns the rows of the table of ratios of seconds, by the clock or of the processor."""

    def over(way, other):
        ratios = [one[way][kind] / one[other][kind] for one in runs]
        return f"{way} / {other}", target if other == LIGHTNING and way != BY_HAND else "", ratios

    return [
        *(over(way, LIGHTNING) for way in COMMANDS if way != LIGHTNING),
        *(over(way, BY_HAND) for way in COMMANDS if way not in (LIGHTNING, BY_HAND)),
    ]


def print_seconds(runs):
    """Prints the medians of what the ratios are of."""
    print("| way | seconds | processor seconds, all cores |\n|---|---|---|")
    for way in COMMANDS:
        seconds, cpu = (
            statistics.median(one[way][kind] for one in runs) for kind in ("seconds", "cpu")
        )
        print(f"| {way} | {seconds:.1f} | {cpu:.1f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cores", type=int, help="how many to run on; all by default")
    arguments = parser.parse_args()
    if missing():
        sys.exit(missing())
    stay_on(arguments.cores)
    runs = []
    for _ in range(arguments.repeats):
        runs.append({way: run(way) for way in COMMANDS})
        for way, found in runs[-1].items():
            check_same_work(way, found, Task())
    print(f"Keras on {keras.backend.backend()}. By the clock:\n")
    print_table(rows(runs, "seconds", TARGET))
    print("Of the processor:\n")
    print_table(rows(runs, "cpu", ""))
    print_seconds(runs)


if __name__ == "__main__":
    main()
