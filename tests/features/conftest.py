"""What the tests of features on disk share."""

import pytest

from keras_tl import FrozenBackbone
from keras_tl.features import extraction
from tests import models


@pytest.fixture
def small_shards(monkeypatch):
    """Has a shard hold two batches."""
    monkeypatch.setattr(extraction, "SHARD_BATCHES", 2)


@pytest.fixture(scope="module")
def model():
    """A model with a frozen backbone, not compiled."""
    return models.functional_outer(FrozenBackbone(models.functional(["dense"])))


def contents(dataset):
    """The bytes of each tensor of each batch."""
    return [part.numpy().tobytes() for batch in dataset for part in batch]
