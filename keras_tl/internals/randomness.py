"""The global random generators."""

from __future__ import annotations

import random
from collections.abc import Callable

import keras
import numpy as np

from keras_tl.internals.checked import SINCE_3_15, checked
from keras_tl.internals.imported import global_state
from keras_tl.internals.values import on_host


def global_seed() -> int | None:
    """Returns the seed given to `keras.utils.set_random_seed`, None where it was not called."""
    return global_state.get_global_attribute("global_random_seed")


def random_state() -> Callable[[], None]:
    """Returns a function that puts all global random generators back to where they are now.

    Those of Python, NumPy and Keras, and that of the backend where it has one: TensorFlow draws the
    seeds of operations from a generator in its eager context.
    """
    python, legacy = random.getstate(), np.random.get_state()
    generator = global_state.get_global_attribute("global_seed_generator")
    seed = None if generator is None else on_host(generator.state)
    restore_backend = _backend_random_state()

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(legacy)
        global_state.set_global_attribute("global_seed_generator", generator)
        if generator is not None:
            generator.state.assign(seed)
        restore_backend()

    return restore


@checked(SINCE_3_15)
def _backend_random_state() -> Callable[[], None]:
    """Returns a function that puts back the backend's own generator. JAX has none."""
    if keras.backend.backend() == "tensorflow":
        from tensorflow.python.eager import context

        if context.global_seed() is None:
            return lambda: None  # Without a seed there is no generator.
        generator = context.context()._rng
        state = generator.getstate()
        return lambda: generator.setstate(state)
    if keras.backend.backend() == "torch":
        import torch

        state = torch.random.get_rng_state()
        return lambda: torch.random.set_rng_state(state)
    return lambda: None
