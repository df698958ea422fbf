"""Hypothesis strategies for tiny models, their optimizers and their training."""

import functools

import keras
from hypothesis import strategies as st

from tests import models

FEATURES = 4


@st.composite
def layer_kinds(draw, min_size=1, max_size=4):
    """Kinds of layers in a row, with at least one that has weights to train."""
    kinds = draw(
        st.lists(
            st.sampled_from(
                ["dense", "batchnorm", "dropout", "layernorm", "conv", "nested", "shared"]
            ),
            min_size=min_size,
            max_size=max_size,
        )
    )
    return [*kinds, "dense"]


def backbone_makers():
    """A function that makes a backbone from `(batch, FEATURES)` to `(batch, FEATURES)`.

    The test calls it: initializers draw random numbers, which hypothesis keeps out of strategies.
    """
    builders = st.sampled_from([models.functional, models.sequential, models.Subclassed])
    return st.builds(functools.partial, builders, layer_kinds())


@st.composite
def optimizers(draw):
    """An optimizer that is not built, of the kinds people fine-tune with."""
    make = draw(
        st.sampled_from(
            [
                lambda rate: keras.optimizers.SGD(rate, momentum=0.9),
                lambda rate: keras.optimizers.Adam(rate),
                lambda rate: keras.optimizers.AdamW(rate, weight_decay=0.01),
                lambda rate: keras.optimizers.RMSprop(rate),
            ]
        )
    )
    return make(draw(st.sampled_from([1e-3, 1e-2, 5e-2])))


losses = st.sampled_from(["mse", "mae", "huber"])

outer_models = st.sampled_from([models.functional_outer, models.SubclassedOuter])
