"""Every touch of a Keras internal, and every backend named, in keras_tl.

Nothing else in the package reads an underscore attribute of a Keras object or names a backend. Each
function says what it touches and why no public route serves, and `checked` with which versions.
"""

from keras_tl.internals.batches import (
    batches_of,
    predictions,
)
from keras_tl.internals.callback_list import callbacks_beside, summary_writer
from keras_tl.internals.checked import UnsupportedKerasError
from keras_tl.internals.graphs import (
    bottlenecks,
    called_again,
    called_in_inference_mode,
    cut_after,
    graph_inputs,
    graph_outputs,
    operation_of,
    outputs_in_graph,
)
from keras_tl.internals.imported import clip_by_global_norm
from keras_tl.internals.layers import (
    HeldInInference,
    call_context_kept,
    mask_of,
    own_state,
    own_trainable_weights,
    seed_states,
    set_layer_flag,
    set_weight_flag,
    stop_gradient,
    sublayers,
)
from keras_tl.internals.models import (
    compile_arguments,
    compiled_state,
    flags_when_compiled,
    has_own_train_step,
    initial_epoch,
    install_optimizer,
    losses_of,
    own_methods,
    renew_functions,
    set_compiled_state,
    set_initial_epoch,
    strategy_scope,
)
from keras_tl.internals.optimizers import (
    averages,
    continue_averages,
    copy_optimizer_state,
    copy_weight_decay_exclusions,
    optimizer_config,
    optimizer_weights,
    scale_learning_rates,
    schedule_of,
    steps_of,
    without_loss_scale,
)
from keras_tl.internals.processes import (
    in_all,
    is_chief,
    of_all,
    of_chief,
)
from keras_tl.internals.randomness import (
    random_state,
)
from keras_tl.internals.values import (
    compiled_reading,
    copy_value,
    device_of,
    fused,
    held_values,
    on_device,
    on_host,
    replicas,
)

__all__ = [
    "HeldInInference",
    "UnsupportedKerasError",
    "averages",
    "batches_of",
    "bottlenecks",
    "call_context_kept",
    "callbacks_beside",
    "called_again",
    "called_in_inference_mode",
    "clip_by_global_norm",
    "compile_arguments",
    "compiled_reading",
    "compiled_state",
    "continue_averages",
    "copy_optimizer_state",
    "copy_value",
    "copy_weight_decay_exclusions",
    "cut_after",
    "device_of",
    "flags_when_compiled",
    "fused",
    "graph_inputs",
    "graph_outputs",
    "has_own_train_step",
    "held_values",
    "in_all",
    "initial_epoch",
    "install_optimizer",
    "is_chief",
    "losses_of",
    "mask_of",
    "of_all",
    "of_chief",
    "on_device",
    "on_host",
    "operation_of",
    "optimizer_config",
    "optimizer_weights",
    "outputs_in_graph",
    "own_methods",
    "own_state",
    "own_trainable_weights",
    "predictions",
    "random_state",
    "renew_functions",
    "replicas",
    "scale_learning_rates",
    "schedule_of",
    "seed_states",
    "set_compiled_state",
    "set_initial_epoch",
    "set_layer_flag",
    "set_weight_flag",
    "steps_of",
    "stop_gradient",
    "strategy_scope",
    "sublayers",
    "summary_writer",
    "without_loss_scale",
]
