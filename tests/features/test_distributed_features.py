"""Features under `keras.distribution` on JAX, in processes of their own."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.distributed_run import EPSILON, LEARNING_RATE
from tests.shared import only_on
from tests.test_jax_distribution import free_port

pytestmark = only_on("jax", "keras.distribution trains on JAX.")

SAMPLES, BATCH, EPOCHS = 24, 8, 5

# As in `test_jax_distribution`: what a batch is summed up in pieces may change, in each step.
TOLERANCE = EPOCHS * SAMPLES // BATCH * BATCH * (LEARNING_RATE / EPSILON) * 2**-24
ROUNDING = 1e-6


def run(folder, jobs, *, processes=1, devices=1):
    """Does jobs in processes that train together. Returns the results of each."""
    settings = {
        "jobs": jobs,
        "processes": processes,
        "address": f"127.0.0.1:{free_port()}",
        "distributed": processes * devices > 1,
    }
    environment = {
        **os.environ,
        "KERAS_BACKEND": "jax",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    module = "tests.features.distributed_process"
    command = [sys.executable, "-m", module, str(folder), json.dumps(settings)]
    errors = [folder / f"errors-{process}.txt" for process in range(processes)]
    started = []
    try:
        for process, path in enumerate(errors):
            with path.open("w") as file:
                one = subprocess.Popen(
                    [*command, str(process)], stdout=file, stderr=file, env=environment
                )
            started.append(one)
        codes = [one.wait(900) for one in started]
    finally:
        for one in started:
            one.kill()
            one.wait()
    assert not any(codes), "\n".join(path.read_text()[-3000:] for path in errors)
    paths = [folder / f"result-{process}.json" for process in range(processes)]
    return [json.loads(path.read_text()) for path in paths]


def assert_same_training(result, expected):
    assert result["stage"] == expected["stage"] == [0, 0, 1, 1, 1]
    np.testing.assert_allclose(result["val_loss"], expected["val_loss"], rtol=0, atol=TOLERANCE)
    for values, others in zip(result["weights"], expected["weights"], strict=True):
        np.testing.assert_allclose(values, others, rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def two_devices(tmp_path_factory):
    jobs = ["fit", "in_memory", "uneven"]
    (result,) = run(tmp_path_factory.mktemp("devices"), jobs, devices=2)
    return result


@pytest.mark.covers("distribution: DataParallel")
def test_stages_train_on_features_as_fit_does_on_two_devices(two_devices):
    result = two_devices["in_memory"]
    assert result["recorded"] == [[0, True], [1, True]]
    assert_same_training(result, two_devices["fit"])


@pytest.mark.slow
@pytest.mark.covers("distribution: ModelParallel")
def test_stages_train_on_features_of_weights_that_are_spread_over_devices(two_devices, tmp_path):
    result = run(tmp_path, ["spread_weights"], devices=2)[0]["spread_weights"]
    assert result["recorded"] == [[0, True], [1, True]]
    assert_same_training(result, two_devices["fit"])


@pytest.mark.covers("distribution: DataParallel")
def test_a_batch_that_devices_cannot_share_is_an_error_before_training(two_devices):
    assert two_devices["uneven"].startswith("ValueError: `keras.distribution` divides each batch")
    assert "8 (1 of them), 3 (1 of them)" in two_devices["uneven"]


PAIR = [
    *("fit", "in_memory", "on_disk", "head", "alone", "resumed", "own_data", "little_room"),
    *("spread_weights", "random_for_one", "views", "errors"),
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return run(tmp_path_factory.mktemp("pair"), PAIR, processes=2)


SLOW = [pytest.mark.slow, pytest.mark.covers("distribution: two processes")]


def slow(function):
    for mark in SLOW:
        function = mark(function)
    return function


@slow
@pytest.mark.parametrize("job", ["in_memory", "on_disk", "own_data"])
def test_processes_train_on_features_as_fit_does(pair, two_devices, job):
    chief, other = (result[job] for result in pair)
    for name in ("weights", "val_loss", "stage", "recorded"):
        assert chief[name] == other[name], name
    assert chief["recorded"] == [[0, True], [1, True]]
    assert_same_training(chief, pair[0]["fit"])
    assert_same_training(chief, two_devices["fit"])


@slow
def test_each_process_writes_its_part_and_no_unfinished_file_of_another(pair):
    for index, result in enumerate(pair):
        files = result["on_disk"]["files"]
        written = {name for event, name in files if event == "os.rename" and ".tmp" not in name}
        parts = {name for name in written if name.startswith("part-")}
        assert parts and all(name.startswith(f"part-000{index}-of-0002") for name in parts)
        others = [name for _, name in files if f"part-000{1 - index}" in name and ".tmp" in name]
        assert others == []
        removed = [name for event, name in files if event == "os.remove"]
        assert not [name for name in removed if f"part-000{1 - index}" in name]


@slow
def test_a_part_that_is_lost_is_recorded_again_and_the_others_stay(pair):
    for result in pair:
        assert result["resumed"] == {"same": True, "kept": True}


@slow
def test_all_processes_have_the_features_of_all_data(pair):
    expected = pair[0]["alone"]
    for result in pair:
        np.testing.assert_allclose(result["head"]["features"], expected, rtol=0, atol=ROUNDING)
        assert result["head"] == pair[0]["head"]
        assert len(result["head"]["one batch"]) == BATCH  # Fewer batches than processes.


@slow
def test_processes_draw_other_random_numbers(pair):
    first, second = pair[0]["views"]
    assert np.abs(np.subtract(first, second)).min() > 0
    assert pair[0]["views"] == pair[1]["views"]


@slow
def test_a_process_with_its_own_data_has_its_own_folder(pair):
    for result in pair:
        assert set(result["own_data"]["folders"]) <= {"process-0-of-2", "process-1-of-2"}
    assert len(pair[1]["own_data"]["folders"]) == 2


@slow
def test_all_decide_by_the_process_with_the_least_room(pair):
    for result in pair:
        assert result["little_room"]["recorded"] == [[0, False], [1, False]]
    assert pair[0]["little_room"]["weights"] == pair[1]["little_room"]["weights"]


@slow
def test_all_train_through_the_model_if_the_data_of_one_is_random(pair):
    for result in pair:
        assert result["random_for_one"]["recorded"] == [[0, False]]
    assert pair[0]["random_for_one"]["weights"] == pair[1]["random_for_one"]["weights"]


@slow
def test_all_train_through_a_model_of_which_none_has_all_weights(pair, two_devices):
    for result in pair:
        assert result["spread_weights"]["recorded"] == [[0, False]]
        assert_same_training(result["spread_weights"], two_devices["fit"])


@slow
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("other data", "these read other samples or in another order"),
        ("not shared", "must be one folder on a disk that all processes share"),
        ("arrays", "must be provided as a `tf.data.Dataset`"),
        ("shard", "Leave `shard` out"),
        ("rest", "8 (2 of them), 4 (1 of them)"),
    ],
)
def test_what_cannot_work_is_an_error_in_all_before_training(pair, case, message):
    for result in pair:
        assert message in result["errors"][case]
