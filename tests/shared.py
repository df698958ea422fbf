"""Settings and builders that all tests share."""

import contextlib
import gc
import os
from importlib import metadata

# What is imported stays: to search it for garbage while it grows takes a second in each process.
gc.disable()

import hypothesis
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter
from keras.src.trainers.data_adapters.array_slicing import convert_to_sliceable

from keras_tl.features import extraction, probe, splitting
from keras_tl.internals.batches import predictions

gc.freeze()
gc.enable()

hypothesis.settings.register_profile(
    "keras_tl",
    deadline=None,
    derandomize=True,
    database=None,
    # Shrinking an example that trains a model takes minutes.
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("keras_tl")


# Which part of the examples a property draws, and at least how many.
_share, _least = 0.2, 2


def pytest_configure(config):
    """Draws all examples where the slow tests run too, and few to show that it holds elsewhere."""
    global _share, _least
    selected = config.option.markexpr.replace("not slow", "")
    if "slow" in selected or not config.option.markexpr:
        _share = 1.0
    elif "covers" in selected or keras.backend.backend() != "tensorflow":
        # The matrix of backends and versions, of which most compile longer.
        _share, _least = 0.1, 1


def examples(count):
    """How many examples a property draws; KERAS_TL_EXAMPLES times as many."""
    return max(_least, round(count * _share * float(os.environ.get("KERAS_TL_EXAMPLES", "1"))))


def slow_on(*backends):
    """Marks a test that takes long on some backends, and is ordinary on the others."""
    return pytest.mark.slow if keras.backend.backend() in backends else ()


def seeded_dropout(rate):
    """Dropout that two runs from the same seeds share.

    On torch Keras draws it from a global generator, whatever the layer's seed, from which other
    steps of a run draw too: there it is off.
    """
    return keras.layers.Dropout(0.0 if keras.backend.backend() == "torch" else rate)


def only_on(backend, reason):
    """Marks a test of what one backend does, and says why the others do not."""
    return pytest.mark.skipif(keras.backend.backend() != backend, reason=reason)


def pytest_collection_modifyitems(items):
    """Writes into the results what each test covers, for `tests.matrix`."""
    # Begun last, the longest test would keep one process busy while the others are done.
    items.sort(key=lambda item: item.path.name != "test_distribution.py")
    backend = {"tensorflow": "TensorFlow", "jax": "JAX"}.get(keras.backend.backend(), "torch")
    title = f"{backend}, Keras {keras.__version__}, TensorFlow {metadata.version('tensorflow')}"
    for item in items:
        for mark in item.iter_markers("covers"):
            item.user_properties += [("covers", mark.args[0]), ("ran_on", title)]


@pytest.fixture(autouse=True, scope="module")
def _old_objects_are_not_searched():
    """Leaves what stays of a module's tests out of garbage collections.

    TensorFlow keeps much of each training step, and to search it all again and again takes minutes.
    """
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _input_pipelines_do_not_tune_themselves():
    """Spares tf.data the thread that looks for its best settings, which is slow to end.

    Each pass over data starts one, and then waits for it: up to a tenth of a second in which
    nothing runs, for batches that take a thousandth. To rewrite the pipeline first takes as long as
    to read it. What it gives is the same.
    """
    with pytest.MonkeyPatch.context() as monkeypatch:
        whole, as_it_is = tf.data.Dataset.__iter__, tf.data.Options()
        as_it_is.autotune.enabled = False
        as_it_is.experimental_optimization.apply_default_optimizations = False
        monkeypatch.setattr(
            tf.data.Dataset, "__iter__", lambda data: whole(data.with_options(as_it_is))
        )
        yield


@pytest.fixture(autouse=True)
def _short_input_pipelines(monkeypatch):
    """Gives arrays to TensorFlow in one step where Keras takes nine, in the ordinary run.

    To make and close Keras' pipeline costs more than an epoch of a small model, and it is made anew
    for each pass. The batches are the same; which rows are shuffled where is another draw.
    """
    if _share == 1.0 or keras.backend.backend() != "tensorflow":
        return
    whole = ArrayDataAdapter.get_tf_dataset

    def short(adapter):
        arrays = adapter._inputs
        plain = all(isinstance(one, np.ndarray) for one in keras.tree.flatten(arrays))
        if not plain or adapter._shuffle == "batch" or tf.distribute.has_strategy():
            return whole(adapter)
        arrays = keras.tree.lists_to_tuples(convert_to_sliceable(arrays, "tensorflow"))
        samples = tf.data.Dataset.from_tensor_slices(arrays)
        if adapter._shuffle:
            samples = samples.shuffle(adapter._num_samples)
        return samples.batch(adapter._batch_size)

    monkeypatch.setattr(ArrayDataAdapter, "get_tf_dataset", short)


@pytest.fixture(autouse=True, scope="module")
def _eager_module(request):
    """Has fixtures of a module with the mark `eager` run as its tests do.

    Traced steps round otherwise on some processors.
    """
    marks = getattr(request.module, "pytestmark", [])
    marks = marks if isinstance(marks, list) else [marks]
    with _untraced(any(mark.name == "eager" for mark in marks)):
        yield


@pytest.fixture(autouse=True)
def _eager(request):
    """Runs the steps of a test with the mark `eager` without tracing them, on TensorFlow."""
    with _untraced(request.node.get_closest_marker("eager") is not None):
        yield


@contextlib.contextmanager
def _untraced(eager):
    before = tf.config.functions_run_eagerly()
    if eager and keras.backend.backend() == "tensorflow":
        tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(before)


@pytest.fixture(autouse=True)
def _seeded():
    keras.utils.set_random_seed(0)


@pytest.fixture
def batches_extracted(monkeypatch):
    """A list that gets an entry for each batch of the data that goes through a backbone once."""
    extracted, original = [], predictions

    def counted(model, batches):
        for one in original(model, batches):
            if not isinstance(batches, list):  # Which is a check on a batch, or a sample.
                extracted.append(one)
            yield one

    for module in (extraction, probe, splitting):
        monkeypatch.setattr(module, "predictions", counted)
    return extracted


def as_bytes(weights):
    """The exact contents of the weights."""
    return [(w.path, np.asarray(keras.ops.convert_to_numpy(w)).tobytes()) for w in weights]


def values_of(model):
    """The exact contents of a model, whatever its layers are called."""
    return [np.asarray(keras.ops.convert_to_numpy(w)).tobytes() for w in model.weights]


def regression_data(samples=16, features=4, seed=0):
    """Inputs and targets of a small regression."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(samples, features)).astype("float32")
    y = (x[:, :1] * x[:, 1:2] + 0.1 * random.normal(size=(samples, 1))).astype("float32")
    return x, y


class Recorder(keras.callbacks.Callback):
    """Calls a function at each epoch's end and keeps what it returns."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.records = []

    def on_epoch_end(self, epoch, logs=None):
        self.records.append(self.function(self.model))


class Scripted(keras.callbacks.Callback):
    """Writes given values into the logs, as if they had been measured."""

    def __init__(self, name, values):
        super().__init__()
        self.name = name
        self.values = values

    def on_epoch_end(self, epoch, logs=None):
        logs[self.name] = self.values[epoch]


SEVERAL_STEPS = pytest.mark.skipif(
    keras.backend.backend() == "torch",
    reason="Keras on torch takes one step at a time: `steps_per_execution` must be 1.",
)


def forget_compiled():
    """Has torch compile from the start again, as in a new process.

    What it has compiled often it runs uncompiled from then on, which rounds in another way.
    """
    if keras.backend.backend() == "torch":
        import torch

        torch.compiler.reset()
