"""The backbone run once over a data set, and the head trained on what it gave."""

from keras_tl.features.feature_cache import FeatureCache

__all__ = ["FeatureCache"]
