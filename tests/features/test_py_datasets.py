"""A PyDataset with workers is read, and its workers end, however the reading does."""

import faulthandler
import threading

import keras
import numpy as np
import pytest

from keras_tl import FeatureCache, FrozenBackbone, fine_tune
from tests import models
from tests.shared import regression_data

pytestmark = pytest.mark.eager

X, Y = regression_data(32)


@pytest.fixture(autouse=True)
def _cannot_hang():
    faulthandler.dump_traceback_later(400, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def no_change(index, x):
    return x


class Batches(keras.utils.PyDataset):
    def __init__(self, batch=no_change, workers=2, **settings):
        super().__init__(workers=workers, max_queue_size=2, **settings)
        self.batch = batch
        self.events = []

    def __len__(self):
        return 8

    def __getitem__(self, index):
        at = slice(4 * index, 4 * index + 4)
        return self.batch(index, X[at]), Y[at]


class Noting(Batches):
    def on_epoch_begin(self):
        self.events.append("begin")

    def on_epoch_end(self):
        self.events.append("end")


@pytest.fixture(scope="module")
def model():
    model = models.functional_outer(FrozenBackbone(models.functional(["dense"])))
    model.compile("sgd", "mse")
    return model


@pytest.fixture(autouse=True)
def _no_worker_stays():
    before = set(threading.enumerate())
    yield
    new = [one for one in threading.enumerate() if one not in before and one.is_alive()]
    assert [one.name for one in new if one.name.startswith("Worker_")] == []


def augmented(index, x):
    return x + np.random.normal(size=x.shape).astype("float32")


def broken(index, x):
    if index >= 3:
        raise OSError("no such file")
    return x


def test_in_the_order_of_the_data(model):
    features = FeatureCache(model)(Batches(), shuffle=False, verbose=0)
    assert np.concatenate([y for _, y in features]).tobytes() == Y.tobytes()


def test_the_first_batches_alone(model):
    data = Batches()
    for _ in range(2):
        features = FeatureCache(model)(data, steps=3, shuffle=False, verbose=0)
        assert np.concatenate([y for _, y in features]).tobytes() == Y[:12].tobytes()


def test_augmented_data_is_refused_and_trained_on(model):
    data = Batches(augmented)
    with pytest.raises(ValueError, match="with other values each time"):
        FeatureCache(model)(data, verbose=0)
    model.fit(data, verbose=0)
    data, model = Batches(augmented), keras.models.clone_model(model)
    model.compile("sgd", "mse")
    run = {"epochs": 2, "max_frozen_epochs": 1, "verbose": 0}
    assert fine_tune(model, data, **run).history["stage"] == [0, 1]


def test_an_error_in_the_data_ends_the_workers(model):
    data = Batches(broken)
    with pytest.raises(Exception, match="no such file"):
        FeatureCache(model)(data, verbose=0)
    data.batch = no_change
    model.fit(data, verbose=0)


def test_an_interruption_of_the_extraction_ends_the_workers(model, monkeypatch):
    from keras_tl.features.extraction import Samples

    def interrupt(batch):
        raise KeyboardInterrupt

    data = Batches()
    with monkeypatch.context() as patch:
        patch.setattr(Samples, "of", interrupt)
        with pytest.raises(KeyboardInterrupt):
            FeatureCache(model)(data, verbose=0)
    model.fit(data, verbose=0)


def test_every_pass_begins_and_ends(model):
    for workers in (1, 2):
        data = Noting(workers=workers)
        FeatureCache(model)(data, verbose=0)
        assert data.events
        assert data.events == ["begin", "end"] * (len(data.events) // 2)


def test_workers_that_are_processes(model):
    data = Batches(workers=1, use_multiprocessing=True)
    features = FeatureCache(model)(data, shuffle=False, verbose=0)
    assert np.concatenate([y for _, y in features]).tobytes() == Y.tobytes()
