"""FrozenBackbone in the test that Keras puts its own layers through."""

import keras
import pytest

from keras_tl import FrozenBackbone
from tests import models

testing = pytest.importorskip("keras.src.testing")


class KerasLayerContract(testing.TestCase):
    def run_on(self, backbone, **expected):
        self.run_layer_test(
            FrozenBackbone,
            init_kwargs={"backbone": backbone},
            input_shape=(3, models.FEATURES),
            expected_output_shape=(3, models.FEATURES),
            expected_num_trainable_weights=0,
            expected_num_losses=0,
            supports_masking=True,
            custom_objects={"FrozenBackbone": FrozenBackbone},
            **expected,
        )

    def test_functional(self):
        backbone = models.functional(["dense", "batchnorm"])
        self.run_on(backbone, expected_num_non_trainable_weights=6, expected_num_seed_generators=0)

    def test_sequential_with_dropout(self):
        backbone = models.sequential(["dense", "dropout"])
        self.run_on(backbone, expected_num_non_trainable_weights=2, expected_num_seed_generators=1)

    def test_single_layer(self):
        layer = keras.layers.Dense(models.FEATURES)
        self.run_on(layer, expected_num_non_trainable_weights=2)
