"""That the ways that are compared do the same work; how long they take is not tested."""

import subprocess
import sys

import keras
import numpy as np
import pytest

from tests.benchmarks.peers import __main__ as peers
from tests.benchmarks.peers import keras_ways
from tests.benchmarks.peers.task import Task, measured

TINY = Task(samples=4, size=16, batch=2, epochs=1, convolutions=((3, 2), (4, 1)))


@pytest.fixture
def lightning_way():
    pytest.importorskip("torch")
    pytest.importorskip("lightning")
    from tests.benchmarks.peers import lightning_way

    return lightning_way


@pytest.mark.parametrize("way", keras_ways.WAYS)
def test_ways_in_keras_train_what_the_task_says(way):
    found = measured(keras_ways.WAYS[way], TINY)
    peers.check_same_work(way, found, TINY)
    assert found["seconds"] > 0


def test_lightning_trains_what_the_task_says(lightning_way):
    peers.check_same_work("Lightning", measured(lightning_way.finetuning, TINY), TINY)


def test_another_number_of_weights_is_said():
    with pytest.raises(AssertionError, match=r"^by hand: \[1, 2\] numbers trained"):
        peers.check_same_work("by hand", {"trained": [1, 2]}, TINY)


def test_networks_are_the_same_function(lightning_way):
    import torch

    images, _ = TINY.data()
    model = keras_ways.model_on(keras_ways.backbone_of(TINY), TINY)
    network = lightning_way.Network(TINY)
    for ours, theirs in zip(model.get_weights(), network.parameters(), strict=True):
        # Kernels of convolutions are (height, width, in, out) and (out, in, height, width).
        moved = ours.transpose(3, 2, 0, 1) if ours.ndim == 4 else ours.T
        theirs.data = torch.from_numpy(np.ascontiguousarray(moved))
    expected = keras.ops.convert_to_numpy(model(images))
    found = network(torch.from_numpy(images).permute(0, 3, 1, 2)).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_lightning_way_brings_no_other_framework(lightning_way):
    module = lightning_way.__name__
    code = f"import sys, {module}; print({{'keras', 'tensorflow', 'jax'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_missing_lightning_is_said_with_its_command(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["peers"])
    said = r'lightning\. `.* -m pip install -e "\.\[peers\]"`'
    with pytest.raises(SystemExit, match=said):
        peers.main()


def test_ratios_are_of_runs_in_turn_and_ours_have_the_target():
    seconds = dict(zip(peers.COMMANDS, (6.0, 4.0, 8.0, 10.0), strict=True))
    runs = [{way: {"seconds": value} for way, value in seconds.items()}]
    found = [(target, ratios) for _, target, ratios in peers.rows(runs, "seconds", "<= 0.7")]
    assert found == [
        ("<= 0.7", [0.6]),
        ("<= 0.7", [0.4]),
        ("", [0.8]),
        ("", [0.75]),
        ("", [0.5]),
    ]
