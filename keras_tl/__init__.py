"""Drop-in Keras 3 callbacks and layers for transfer learning.

- Train a head on a frozen backbone, then fine-tune it, in one `fit`: `UnfreezeAtConvergence`, with
  a list of `Stage` for several switches. Or in one call, which records what is frozen: `fine_tune`.
- Keep BatchNormalization and dropout of the backbone as they should be: `FrozenBackbone`.
- Prove that what should stay frozen has: `FreezeGuard`. See what trains: `trainable_report`,
  `plot_trainable`, `memory_report`. See how it went: `plot_stages`.
- Find and set learning rates: `find_learning_rate`, `layerwise_learning_rates`, `GroupOptimizer`.
- Record features once, and train on them: `FeatureCache`.
- Afterwards: `interpolate_weights`, `scale_temperature`; `unwrap` to deploy without this package.
- For a training loop of your own: `ConvergenceMonitor`, `renew_optimizer`.
"""

from keras_tl.calibration import scale_temperature
from keras_tl.callbacks import FreezeGuard, UnfreezeAtConvergence
from keras_tl.errors import (
    FrozenWeightsChangedError,
    StaleCacheError,
    StaleCompileError,
    UncacheableError,
)
from keras_tl.features import FeatureCache
from keras_tl.fine_tuning import fine_tune
from keras_tl.internals.checked import UnsupportedKerasError
from keras_tl.interpolation import interpolate_weights
from keras_tl.layers import FrozenBackbone
from keras_tl.learning_rate_finder import LearningRateRange, find_learning_rate
from keras_tl.memory import MemoryReport, memory_report
from keras_tl.optimizers import GroupOptimizer
from keras_tl.optimizers.learning_rates import layerwise_learning_rates
from keras_tl.reporting import TrainableReport, trainable_report
from keras_tl.stages.convergence import ConvergenceMonitor
from keras_tl.stages.stage import Stage
from keras_tl.stages.switching import renew_optimizer
from keras_tl.stages.transition import Transition
from keras_tl.unwrapping import unwrap
from keras_tl.version import __version__
from keras_tl.visualization import plot_stages, plot_trainable

__all__ = [
    "ConvergenceMonitor",
    "FeatureCache",
    "FreezeGuard",
    "FrozenBackbone",
    "FrozenWeightsChangedError",
    "GroupOptimizer",
    "LearningRateRange",
    "MemoryReport",
    "Stage",
    "StaleCacheError",
    "StaleCompileError",
    "TrainableReport",
    "Transition",
    "UncacheableError",
    "UnfreezeAtConvergence",
    "UnsupportedKerasError",
    "__version__",
    "find_learning_rate",
    "fine_tune",
    "interpolate_weights",
    "layerwise_learning_rates",
    "memory_report",
    "plot_stages",
    "plot_trainable",
    "renew_optimizer",
    "scale_temperature",
    "trainable_report",
    "unwrap",
]
