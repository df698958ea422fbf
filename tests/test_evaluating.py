"""What is asked of a model leaves no trace in it."""

import keras
import numpy as np
import pytest

from keras_tl.internals.evaluating import evaluated
from tests.shared import values_of

X = np.ones((12, 2), "float32")


class Refuses(keras.layers.Layer):
    """Fails on a batch of a size of which it was told."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def call(self, x):
        if x.shape[0] == self.size:
            raise RuntimeError("refused")
        return x


@pytest.mark.eager
@pytest.mark.parametrize("size, step", [(8, "first"), (4, "last")])
@pytest.mark.parametrize("fitted", [True, False])
def test_a_failure_leaves_the_model_its_values(size, step, fitted):
    layers = [Refuses(size), keras.layers.Dense(1), keras.layers.BatchNormalization()]
    model = keras.Sequential([keras.Input((2,)), *layers])
    model.compile("adam", "mse", metrics=["mae"])
    if fitted:
        model.fit(X, X[:, :1], batch_size=6, verbose=0)
    before = values_of(model)
    with pytest.raises(Exception, match="refused"):
        evaluated(model, x=X, y=X[:, :1], batch_size=8)
    assert values_of(model) == before
    found = evaluated(model, x=X, y=X[:, :1], batch_size=6)
    assert found == model.evaluate(X, X[:, :1], batch_size=6, verbose=0, return_dict=True)
    model.fit(X, X[:, :1], batch_size=6, verbose=0)
