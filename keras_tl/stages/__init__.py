"""Training in stages: what a stage is, when it ends, and how a running `fit` gets into the next."""

from keras_tl.stages.stage import Stage

__all__ = ["Stage"]
