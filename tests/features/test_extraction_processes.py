"""Extraction in processes that are killed, and in several at once."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import only_on

pytestmark = only_on("tensorflow", "Files are written alike on every backend.")


def start(folder, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.features.extraction_process", str(folder), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
    )


def digest(process):
    """What a process printed last, or None if it was killed; another failure is an error."""
    printed, errors = process.communicate(timeout=300)
    if process.returncode == -signal.SIGKILL:
        return None
    assert process.returncode == 0, errors[-2000:]
    return printed.split()[-1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return digest(start(tmp_path_factory.mktemp("undisturbed")))


def test_killed_while_it_writes_and_renames(tmp_path, undisturbed):
    # The first file is the manifest; a note that the part is finished is the last.
    for place in ("fsync:1", "replace:1", "fsync:4", "replace:3", "replace:6"):
        assert digest(start(tmp_path, f"kill={place}")) is None, place
    assert digest(start(tmp_path)) == undisturbed
    assert not list(tmp_path.rglob("*.tmp"))


def test_two_processes_extract_into_one_folder_at_once(tmp_path, undisturbed):
    first, second = start(tmp_path, "slow"), start(tmp_path, "slow")
    assert digest(first) == digest(second) == undisturbed
    assert digest(start(tmp_path)) == undisturbed


def test_processes_extract_parts_that_join(tmp_path, undisturbed):
    workers = [start(tmp_path, f"shard={index}/2") for index in range(2)]
    assert None not in [digest(worker) for worker in workers]
    assert digest(start(tmp_path)) == undisturbed


@pytest.mark.slow
def test_killed_thirty_times(tmp_path, undisturbed):
    chance = random.Random(0)
    kills = runs = 0
    while kills < 30:
        folder = tmp_path / str(runs)
        runs += 1
        while True:
            process = start(folder, "slow")
            assert process.stdout.readline() in ("begins\n", "")
            time.sleep(chance.uniform(0, 1))
            process.kill()
            if (result := digest(process)) is not None:
                break
            kills += 1
            if chance.random() < 0.2:
                result = digest(start(folder, "slow"))
                break
        assert result == undisturbed
