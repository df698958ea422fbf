"""A run that is killed and started again ends as one that was not (invariant 8)."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tests import killed_run
from tests.shared import only_on

pytestmark = only_on("tensorflow", "Files are written alike on every backend.")


def start(folder, *place):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.killed_run", str(folder), *place],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
    )


def killed(process):
    """Waits for the end. Returns whether it was a kill; another failure is an error."""
    _, errors = process.communicate(timeout=300)
    if process.returncode == -signal.SIGKILL:
        return True
    assert process.returncode == 0, errors[-2000:]
    return False


def result_in(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    killed_run.main(folder)
    result = result_in(folder)
    assert len(result["history"]["loss"]) == killed_run.EPOCHS
    assert len(result["transitions"]) == 3
    return result


def check(folder, undisturbed):
    result = result_in(folder)
    assert result["weights"] == undisturbed["weights"]
    assert result["transitions"] == undisturbed["transitions"]
    for name, values in result["history"].items():
        assert values == undisturbed["history"][name][-len(values) :]
    assert os.listdir(folder) == ["result.json"]


@pytest.mark.slow
def test_killed_where_a_snapshot_becomes_current_and_in_a_switch(tmp_path, undisturbed):
    for place in ("rename:4", "switch:2"):
        assert killed(start(tmp_path, place)), place
    killed_run.main(tmp_path)
    check(tmp_path, undisturbed)


@pytest.mark.slow
def test_killed_at_each_kind_of_moment(tmp_path, undisturbed):
    # While it writes, makes the new snapshot the current one, removes an old one, restores,
    # switches, and in the middle of an epoch.
    for place in ("write:4", "rename:4", "remove:5", "switch:2", "restore:1", "batch:4"):
        assert killed(start(tmp_path, place)), place
    assert not killed(start(tmp_path))
    check(tmp_path, undisturbed)


@pytest.mark.slow
def test_killed_fifty_times(tmp_path, undisturbed):
    chance = random.Random(0)
    places = [f"{where}:{call}" for where in ("write", "rename", "remove") for call in range(1, 12)]
    places += [f"batch:{call}" for call in range(1, 9)]
    places += [f"{where}:{call}" for where in ("switch", "restore") for call in (1, 2)]
    kills = runs = 0
    while kills < 50:
        folder = tmp_path / str(runs)
        folder.mkdir()
        runs += 1
        while True:
            process = start(folder, *([chance.choice(places)] if chance.random() < 0.6 else []))
            assert process.stdout.readline() in ("begins\n", "")
            # At any moment of a run, which takes some two seconds from here.
            time.sleep(chance.uniform(0, 4))
            process.kill()
            if not killed(process):
                break
            kills += 1
        check(folder, undisturbed)
