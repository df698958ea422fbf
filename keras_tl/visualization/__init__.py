"""Pictures, with matplotlib (the extra `plot`)."""

from keras_tl.visualization.learning_rate_range import plot_learning_rate_range
from keras_tl.visualization.stages import plot_stages
from keras_tl.visualization.trainable import plot_trainable

__all__ = ["plot_learning_rate_range", "plot_stages", "plot_trainable"]
