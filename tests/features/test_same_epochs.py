"""Whether each epoch of `fit` reads the same samples is decided before anything is recorded."""

import keras
import pytest
import tensorflow as tf

from keras_tl.features.same_epochs import check_training_data, check_validation_data
from keras_tl.features.splitting import UncacheableError
from tests.shared import regression_data

X, Y = regression_data(24)


def generator():
    while True:
        yield X[:8], Y[:8]


def repeated(batches=3):
    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(8).take(batches).repeat()


class Numbered(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        at = slice(8 * index, 8 * index + 8)
        return X[at], Y[at]


class Changing(Numbered):
    def on_epoch_end(self):
        pass


class Endless(Numbered):
    num_batches = None


def check(x, y=None, *, steps, random=False):
    batch_size = None if y is None else 8
    check_training_data(x, y, None, batch_size=batch_size, steps=steps, random=random)


@pytest.mark.parametrize(
    "data, steps",
    [((repeated(),), 3), ((repeated(),), 6), ((X, Y), 3), ((X, Y), None), ((Numbered(),), 3)],
)
def test_epochs_that_are_whole_passes_are_the_same(data, steps):
    check(*data, steps=steps)


@pytest.mark.parametrize(
    "data, steps, why",
    [
        ((repeated(),), 2, "has no known length. Pass `steps_per_epoch=the number of batches in"),
        ((repeated(),), 4, "has no known length"),
        ((X, Y), 2, "With `steps_per_epoch=2`.*has 3 batches. Pass `steps_per_epoch=3`"),
        ((Numbered(),), 2, "has 3 batches"),
        ((generator(),), 2, "continues in a generator"),
        ((Changing(),), None, "has its own on_epoch_end"),
        ((Endless(),), 3, "a Endless without an end"),
    ],
)
def test_epochs_that_may_differ_name_the_argument(data, steps, why):
    with pytest.raises(UncacheableError, match=why):
        check(*data, steps=steps)


def test_validation_data_begins_anew_except_in_a_generator():
    for data in (None, repeated(), (X, Y), Numbered()):
        check_validation_data(data, steps=2)
    with pytest.raises(UncacheableError, match="Validation with `validation_steps=2` continues"):
        check_validation_data(generator(), steps=2)
    with pytest.raises(UncacheableError, match="has its own on_epoch_end"):
        check_validation_data(Changing(), steps=2)


def test_the_targets_tell_where_inputs_are_random():
    def noisy(with_targets):
        data = repeated()
        numbers = tf.data.Dataset.random(seed=0)
        data = tf.data.Dataset.zip(data, numbers)
        mapped = data.map(lambda pair, number: (pair[0] + tf.cast(number, "float32"), pair[1]))
        return mapped if with_targets else mapped.map(lambda x, y: x)

    check(noisy(True), steps=3, random=True)
    for data, random in ((noisy(True), False), (noisy(False), True)):
        with pytest.raises(UncacheableError, match="has no known length"):
            check(data, steps=3, random=random)
