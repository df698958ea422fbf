"""Extraction in processes that are killed, and in several at once."""

import multiprocessing
import random
import signal
import time

import pytest

from tests.features import extraction_process
from tests.shared import only_on

pytestmark = only_on("tensorflow", "Files are written alike on every backend.")

# The processes are forked from one that has imported all that they need and run nothing yet.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([extraction_process.__name__])


def start(folder, **settings):
    results, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(
        target=extraction_process.main, args=(sender, str(folder)), kwargs=settings
    )
    process.start()
    sender.close()  # So that a killed process ends what is received.
    return process, results


def digest(started):
    """What a process sent last, or None if it was killed; another failure is an error."""
    process, results = started
    process.join(timeout=300)
    if process.exitcode == -signal.SIGKILL:
        return None
    assert process.exitcode == 0
    sent = [results.recv() for _ in range(2) if results.poll()]
    return sent[-1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return digest(start(tmp_path_factory.mktemp("undisturbed")))


@pytest.mark.slow
def test_killed_while_it_writes_and_renames(tmp_path, undisturbed):
    # The first file is the manifest; a note that the part is finished is the last.
    for place in [("fsync", 1), ("replace", 1), ("fsync", 4), ("replace", 3), ("replace", 6)]:
        assert digest(start(tmp_path, kill=place)) is None, place
    assert digest(start(tmp_path)) == undisturbed
    assert not list(tmp_path.rglob("*.tmp"))


def test_two_processes_extract_into_one_folder_at_once(tmp_path, undisturbed):
    first, second = start(tmp_path, slow=True), start(tmp_path, slow=True)
    assert digest(first) == digest(second) == undisturbed
    assert digest(start(tmp_path)) == undisturbed


def test_processes_extract_parts_that_join(tmp_path, undisturbed):
    workers = [start(tmp_path, shard=(index, 2)) for index in range(2)]
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
            process, results = started = start(folder, slow=True)
            results.poll(timeout=300)  # Until it starts.
            time.sleep(chance.uniform(0, 1))
            process.kill()
            if (result := digest(started)) is not None:
                break
            kills += 1
            if chance.random() < 0.2:
                result = digest(start(folder, slow=True))
                break
        assert result == undisturbed
