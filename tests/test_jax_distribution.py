"""Distributed over devices and processes on JAX, in processes of its own."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.distributed_run import (
    BATCH,
    DIES_IN,
    EPOCHS,
    EPSILON,
    LEARNING_RATE,
    PATIENCE,
    SAMPLES,
)
from tests.shared import only_on

pytestmark = only_on("jax", "keras.distribution trains on JAX.")

# All that distributing may change is the order in which a batch is summed up. A sum of `BATCH`
# numbers of order one then differs by at most `BATCH` roundings; Adam makes at most
# `LEARNING_RATE / EPSILON` of a difference in a gradient, at each step; and all may add up: 4e-5.
# A sample left out, or a worker that trains by itself, makes a difference of 1e-2 and more.
STEPS = EPOCHS * SAMPLES // BATCH
TOLERANCE = STEPS * BATCH * (LEARNING_RATE / EPSILON) * np.finfo("float32").eps / 2

# In seconds. To fail takes some more than to notice that another process has died.
ENDS_WITHIN = PATIENCE + 30

SLOW = pytest.mark.slow


class Run:
    """The processes of a run, which have started.

    Args:
        folder: Where the results go, and what the processes print.
        runs: List of pairs of a schedule and a layout, trained one after the other.
        processes: How many processes train together.
        devices: How many devices each has.
        backups: List with the name of the backup's folder for each process.
        dies: Which process dies, and how.
        fits: How many fits of the same model follow each other.
    """

    def __init__(self, folder, runs, *, processes=1, devices=1, backups=None, dies=None, fits=1):
        self.folder = folder
        settings = {
            "runs": runs,
            "processes": processes,
            "address": f"127.0.0.1:{free_port()}",
            "backups": backups,
            "dies": dies,
            "fits": fits,
        }
        self.processes = [
            self._start(json.dumps(settings), process, devices) for process in range(processes)
        ]

    def _start(self, settings, process, devices):
        environment = {
            **os.environ,
            "KERAS_BACKEND": "jax",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        }
        command = [sys.executable, "-m", "tests.distributed_run", str(self.folder), settings]
        with (
            open(self._path("printed", process), "w") as printed,
            open(self._path("errors", process), "w") as errors,
        ):
            return subprocess.Popen(
                [*command, str(process)], stdout=printed, stderr=errors, env=environment
            )

    def _path(self, what, process):
        return self.folder / f"{what}-{process}.txt"

    def errors(self, process):
        """What a process has written to its standard error."""
        return self._path("errors", process).read_text()

    def said(self, process):
        """The lines that a process has printed, but those of the library for the network."""
        lines = self._path("printed", process).read_text().splitlines()
        return [line for line in lines if not line.startswith("[Gloo]")]

    def codes(self):
        """Waits for the end. Returns the exit codes."""
        return [process.wait(300) for process in self.processes]

    def outcomes(self):
        """Waits for the end. Returns what came out, of each process."""
        failed = [self.errors(index)[-2000:] for index, code in enumerate(self.codes()) if code]
        assert not failed, "\n".join(failed)
        paths = [self.folder / f"result-{index}.json" for index in range(len(self.processes))]
        return [json.loads(path.read_text()) for path in paths]

    def results(self):
        """Waits for the end. Returns the result of the only run, of each process."""
        return [one for outcome in self.outcomes() for one in outcome["runs"]]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def start():
    """`Run`, whose processes do not outlive the tests."""
    runs = []

    def start(*arguments, **keywords):
        runs.append(Run(*arguments, **keywords))
        return runs[-1]

    yield start
    for run in runs:
        for process in run.processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    """Returns a function for a run with some settings that nothing happens to, made once."""
    made = {}

    def run(**settings):
        key = json.dumps(settings, sort_keys=True)
        if key not in made:
            made[key] = start(tmp_path_factory.mktemp("run"), **settings)
        return made[key]

    return run


FOUR_DEVICES = [("groups", "data"), ("stages", (2, 2))]
TWO_DEVICES = [("one rate", "data"), ("groups", (1, 2)), ("stages", "data")]


@pytest.fixture(scope="module")
def devices_of_one_process(undisturbed):
    """Returns a function from a number of devices to the runs on them, and those on one device."""

    def run(devices):
        layouts = {4: FOUR_DEVICES, 2: TWO_DEVICES}[devices]
        runs = [(name, layout) for name, own in layouts for layout in (None, own)]
        (outcome,) = undisturbed(runs=runs, devices=devices).outcomes()
        return dict(zip(runs, outcome["runs"], strict=True))

    return run


def assert_same_training(result, alone):
    """Asserts that a run is that of one device, but for rounding."""
    assert result["stage"] == alone["stage"]
    assert [one[:3] for one in result["transitions"]] == [one[:3] for one in alone["transitions"]]
    np.testing.assert_allclose(result["measured"], alone["measured"], rtol=0, atol=TOLERANCE)
    for values, expected in zip(result["weights"], alone["weights"], strict=True):
        np.testing.assert_allclose(values, expected, rtol=0, atol=TOLERANCE)


def covers(settings):
    _, layout = settings
    name = "DataParallel" if layout == "data" else "ModelParallel"
    return pytest.mark.covers(f"distribution: {name}")


@pytest.mark.parametrize(
    ("devices", "schedule", "layout"),
    [pytest.param(4, *one, marks=covers(one)) for one in FOUR_DEVICES]
    + [pytest.param(2, *one, marks=[SLOW, covers(one)]) for one in TWO_DEVICES],
)
def test_devices_train_as_one_does(devices_of_one_process, devices, schedule, layout):
    results = devices_of_one_process(devices)
    alone, result = results[schedule, None], results[schedule, layout]
    assert_same_training(result, alone)
    assert (result["devices"], alone["devices"]) == (devices, 1)
    assert bool(result["spread"]) == (layout != "data")
    reasons = {"stages": ["max_frozen_epochs", "epochs"]}.get(schedule, ["converged"])
    assert [one[2] for one in alone["transitions"]] == reasons


TOGETHER = [
    ("data", 1),
    pytest.param("data", 2, marks=SLOW),
    # Each process holds a half of the model, and none all of it.
    pytest.param((1, 2), 1, marks=SLOW),
    pytest.param((2, 2), 2, marks=SLOW),
]


def pair(layout, devices=1, backups=("backup", "backup"), dies=None):
    """The settings for two processes that train together."""
    runs = [("groups", layout)]
    return {"runs": runs, "processes": 2, "devices": devices, "backups": backups, "dies": dies}


@pytest.mark.covers("distribution: two processes")
@pytest.mark.parametrize(("layout", "devices"), TOGETHER)
def test_processes_train_as_one_does(undisturbed, devices_of_one_process, layout, devices):
    chief, other = undisturbed(**pair(layout, devices)).results()
    # Though the other process sees other values of `val_loss`, it decides as the first one does.
    for name in ("digest", "measured", "stage", "transitions"):
        assert chief[name] == other[name], name
    assert_same_training(chief, devices_of_one_process(4)["groups", None])
    assert chief["devices"] == 2 * devices
    assert bool(chief["spread"]) == (layout != "data")


@pytest.mark.covers("distribution: two processes")
@pytest.mark.parametrize(("layout", "devices"), TOGETHER)
def test_one_process_writes_and_prints(undisturbed, layout, devices):
    run = undisturbed(**pair(layout, devices))
    chief, other = run.outcomes()
    says = ["Epoch 4: UnfreezeAtConvergence unfreezes", "UnfreezeAtConvergence restored the best"]
    said = [line for line in run.said(0) if not line.startswith("  ")]
    for line, begin in zip(said, [*says, "FreezeGuard: all"], strict=True):
        assert line.startswith(begin)
    assert run.said(1) == []
    assert chief["changes"].count("os.rename") >= EPOCHS
    assert other["changes"] == []
    assert not (run.folder / "backup").exists()


@SLOW
@pytest.mark.covers("distribution: two processes")
@pytest.mark.parametrize(("layout", "victim"), [("data", 1), ("data", 0), ((1, 2), 1)])
def test_a_killed_process_ends_the_other_and_both_resume(
    undisturbed, start, tmp_path, layout, victim
):
    run = start(tmp_path, **pair(layout, dies=(victim, "kill")))
    assert run.processes[victim].wait(300) == -signal.SIGKILL
    killed = time.monotonic()
    assert run.processes[1 - victim].wait(300) != 0
    assert time.monotonic() - killed < ENDS_WITHIN
    assert "another task died" in run.errors(1 - victim)

    resumed = start(tmp_path, **pair(layout))
    expected = undisturbed(**pair(layout)).results()[0]
    for result in resumed.results():
        assert result["digest"] == expected["digest"]
        assert result["transitions"] == expected["transitions"]
        assert result["measured"] == expected["measured"][DIES_IN:]
    assert f"resumes after epoch {DIES_IN}, in stage 1" in resumed.said(0)[0]


@SLOW
def test_a_process_that_fails_ends_the_other(start, tmp_path):
    run = start(tmp_path, **pair("data", dies=(1, "error")))
    assert 0 not in run.codes()
    assert "It dies." in run.errors(1)


@SLOW
def test_a_backup_that_not_all_processes_see_is_an_error_in_all(start, tmp_path):
    assert 0 not in start(tmp_path, **pair("data", dies=(1, "kill"))).codes()
    run = start(tmp_path, **pair("data", backups=("backup", "elsewhere")))
    assert run.codes() == [1, 1]
    for process in range(2):
        assert f"They see, from the first on: epoch {DIES_IN}, none." in run.errors(process)


@SLOW
def test_a_fit_does_not_find_the_backup_of_the_one_before(start, tmp_path):
    run = start(tmp_path, **pair("data"), fits=2)
    assert run.codes() == [0, 0]
    assert not any("resumes after" in line for line in run.said(0))


@SLOW
def test_a_folder_that_cannot_be_written_to_is_an_error_in_all(start, tmp_path):
    (tmp_path / "backup").write_text("A file.")
    run = start(tmp_path, **pair("data"))
    assert run.codes() == [1, 1]
    assert "cannot be written to" in run.errors(0)
    assert "Another process of this run has failed" in run.errors(1)


@SLOW
def test_the_example_trains_in_two_processes_and_prints_once():
    command = [sys.executable, "examples/multi_host.py"]
    example = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert example.returncode == 0, example.stderr[-2000:]
    said = [line for line in example.stdout.splitlines() if not line.startswith("[Gloo]")]
    assert ["unfreezes" in line for line in said].count(True) == 1
    assert said[-1].startswith("Accuracy on held-out images: 0.9")
    assert said[-1].endswith("(processes: 2, devices: 2).")
    assert len(said) == len(set(said))
