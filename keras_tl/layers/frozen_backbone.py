"""A layer that keeps a pretrained backbone frozen, and in inference mode when it no longer is."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_tl.backbone import freezing
from keras_tl.backbone.hand_frozen import NOTHING, HandFrozen, frozen_by_hand
from keras_tl.backbone.selecting import (
    Selection,
    batchnorm_layers,
    flatten_layers,
    no_such_layer,
    unlisted_in,
)
from keras_tl.internals.graphs import operations_in_graph, outputs_in_graph
from keras_tl.internals.layers import (
    NOT_OF_A_LAYER,
    HeldInInference,
    assigned_in_call,
    call_context_kept,
    catches_inputs,
    not_watched,
    set_layer_flag,
    take_call_signature,
    training_by_name,
    was_called,
)
from keras_tl.internals.models import renew_sharing, renews_sharing
from keras_tl.internals.rematerialization import Rematerialized
from keras_tl.internals.saved_weights import read_without_wrapper
from keras_tl.messages import how_to_get_a_model, some

_INFERENCE_MODES = ("always", "batchnorm")


@dataclasses.dataclass(frozen=True)
class _CallArguments:
    """What a layer is called with, tensors by shape and dtype, where that is more than one input.

    A layer that takes more cannot be built by the shape of its first input.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(
        cls, layer: keras.Layer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _CallArguments | None:
        kwargs = {
            name: value
            for name, value in kwargs.items()
            if name != "training" and value is not None
        }
        # Keras gives the shapes of what `*inputs` catches as those of one input, a tuple.
        if len(args) == 1 and not kwargs and not catches_inputs(layer):
            return None
        return cls(*keras.tree.map_structure(_spec_of, (args, kwargs)))

    def call(self, layer: keras.Layer) -> None:
        args, kwargs = keras.tree.map_structure(_symbolic, (self.args, self.kwargs))
        layer(*args, **kwargs, training=False)

    def to_config(self) -> dict[str, Any]:
        return keras.saving.serialize_keras_object({"args": list(self.args), "kwargs": self.kwargs})

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> _CallArguments:
        config = keras.saving.deserialize_keras_object(config)
        return cls(tuple(config["args"]), config["kwargs"])


def _spec_of(value: Any) -> Any:
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        return value
    return keras.InputSpec(shape=value.shape, dtype=keras.backend.standardize_dtype(value.dtype))


def _symbolic(value: Any) -> Any:
    if not isinstance(value, keras.InputSpec):
        return value
    return keras.KerasTensor(value.shape, value.dtype)


@keras.saving.register_keras_serializable(package="keras_tl")
class FrozenBackbone(keras.layers.Layer):
    """Wraps a pretrained backbone so that its BatchNormalization statistics never move.

    The backbone starts frozen. It is always called in inference mode, also after `unfreeze`, which
    a `training=False` written into a Functional model does not achieve in Keras 3: `fit` overrides
    it. The layers around the wrapper notice nothing: Dropout in the head is active in `fit` as
    ever.

    What you froze by hand before wrapping stays frozen: single weights always, and whole layers of
    a backbone of which others train, unless a selection names them (see `unfreeze`). A backbone
    that is frozen as a whole says nothing by that, and is unfrozen as a whole.

    It hides nothing of the backbone: it is called with the same arguments (masks, a second tensor,
    states), and gradients pass through it to its inputs and to layers before it, frozen or not. It
    has the backbone's public attributes and methods besides its own, so that a KerasHub task can be
    built on it; but not those that compile and train a model. Symbolic tensors (`output`,
    `pyramid_outputs`) are outputs of a wrapper, such that a model that is made of them holds it.
    Through a frozen wrapper `enable_lora` adds weights that are frozen too: `unfreeze("lora")`
    trains them. A compiled backbone keeps its loss and metrics to itself, as when it is nested
    plainly. On TensorFlow, a `tf.GradientTape` does not watch weights that are frozen, which spares
    time and memory: for the gradient to one, call `tape.watch(weight.value)` before the layer is
    called.

    Args:
        backbone: A Keras layer or model (Functional, Sequential, subclassed), of which the wrapper
            takes the dtype policy. It is frozen at once.
        output_layers: A layer's name or a list of names. The outputs of these layers are returned
            instead of the backbone's own (a list gives a list), and layers that do not lead to them
            are left out. Only for Functional and Sequential backbones. Defaults to `None`.
        inference_mode: `"always"` calls all of the backbone with `training=False`. `"batchnorm"`
            keeps only BatchNormalization layers in inference mode, and the rest (Dropout,
            stochastic depth) follows `training` once something is unfrozen. Moving statistics are
            constant in both. Defaults to `"always"`, which is needed for a torch module or a
            SavedModel in a layer: Keras does not know its BatchNorm.
        rematerialize: Bool. Whether activations of what trains in the backbone are computed again
            in the backward pass, block by block, instead of being kept: so an unfrozen backbone
            needs less memory, and its steps take longer, by up to one more forward pass. Nothing
            changes while it is frozen. Only for Functional and Sequential backbones, and
            `inference_mode="always"`. Defaults to `False`. See below.
        name: String. The layer's name.
        **layer_kwargs: Arguments of `keras.layers.Layer`. `trainable=True` unfreezes all of the
            backbone, BatchNormalization included, as `layer.trainable = True` does.

    With `rematerialize=True`, the backbone's graph is cut where little passes from one block to the
    next, and `keras.remat` is applied to each segment after the first weight that trains. A layer
    that is made of layers, such as a transformer block, is not cut itself. Gradients are equal bit
    for bit on TensorFlow and torch; on JAX, and where a weight is used in several places (shared
    layers, embeddings), they are equal but for rounding. Between forward and backward pass of a
    MobileNetV2 (batches of 16 at 128 x 128), JAX keeps 109 MiB in place of 423. On the CPU, the
    peak of a step falls by 41% on TensorFlow (54% for a small BERT) and by 20% on torch; on JAX by
    nothing, for XLA undoes it there. Weights, gradients and optimizer need what they did. Random
    numbers and states are as the first time. To rematerialize layers of your own, make them in a
    `keras.RematScope` instead.

    Call arguments:
        As the backbone's, and `training`, which does not reach layers called later.

    Input shape:
        As the backbone's.

    Output shape:
        As the backbone's, or those of `output_layers`.

    Raises:
        ValueError: If `backbone` is not a Keras layer, `inference_mode` is unknown, or
            `output_layers` names a layer that the backbone does not have or that is not in its
            graph, or `rematerialize` is True of a backbone without a graph.

    Example:

    >>> backbone = keras.applications.MobileNetV2((96, 96, 3), include_top=False, weights=None)
    >>> inputs = keras.Input((96, 96, 3))
    >>> x = FrozenBackbone(backbone)(inputs)
    >>> x = keras.layers.GlobalAveragePooling2D()(x)
    >>> model = keras.Model(inputs, keras.layers.Dense(1)(x))
    >>> [weight.name for weight in model.trainable_weights]
    ['kernel', 'bias']

    References:

    - [Transfer learning and fine-tuning](https://keras.io/guides/transfer_learning/)
    - Chen et al., 2016, "Training Deep Nets with Sublinear Memory Cost" (`rematerialize`)
    """

    def __init__(
        self,
        backbone: keras.Layer,
        *,
        output_layers: str | Sequence[str] | None = None,
        inference_mode: str = "always",
        rematerialize: bool = False,
        name: str | None = None,
        **layer_kwargs: Any,
    ):
        if not isinstance(backbone, keras.Layer):
            raise ValueError(
                f"`backbone` must be a Keras layer or model. Received: backbone={backbone!r} "
                f"(of type {type(backbone).__name__}).{how_to_get_a_model(backbone)}"
            )
        if inference_mode not in _INFERENCE_MODES:
            raise ValueError(
                f"`inference_mode` must be one of {_INFERENCE_MODES}. Received: {inference_mode!r}."
            )
        if rematerialize:
            _check_can_rematerialize(backbone, inference_mode)
        trainable = layer_kwargs.pop("trainable", False)
        layer_kwargs.setdefault("dtype", backbone.dtype_policy)
        # The backbone casts its inputs itself, if at all: a cast here could only lose bits.
        super().__init__(name=name, trainable=False, autocast=False, **layer_kwargs)
        if output_layers is not None:
            backbone = _truncate(backbone, output_layers)
        self.backbone = backbone
        self.output_layers = (
            output_layers if isinstance(output_layers, (str, type(None))) else list(output_layers)
        )
        self.inference_mode = inference_mode
        self.rematerialize = rematerialize
        self.supports_masking = True
        take_call_signature(self, backbone)
        _warn_of_losses_taken_over(backbone)
        self._call_arguments: _CallArguments | None = None
        self.hand_frozen = frozen_by_hand(backbone)
        self._saved: _Saved | None = None
        self._parts = _Parts({})
        self._holds_batchnorm = False
        self._hold(backbone)
        freezing.freeze(backbone)
        if trainable:
            self.trainable = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = training_by_name(self, args, kwargs)
        if not self.built:
            self._call_arguments = _CallArguments.of(self, args, kwargs)
        # Around `super().__call__`: it stores an explicit `training` for the layers after this one
        # before it calls `call`, where it would be too late to put it back.
        with call_context_kept():
            outputs = super().__call__(*args, **kwargs)
            if self.inference_mode == "batchnorm" and not self._holds_batchnorm:
                self._check_holds_batchnorm(args, kwargs)
        return outputs

    def _check_holds_batchnorm(self, args: Any, kwargs: dict[str, Any]) -> None:
        """Raises a ValueError if statistics of BatchNormalization would move."""
        kwargs = {name: value for name, value in kwargs.items() if name != "training"}
        args, kwargs = keras.tree.map_structure(
            lambda value: _symbolic(_spec_of(value)), (args, kwargs)
        )
        weights = [one for layer in batchnorm_layers(self.backbone) for one in layer.weights]
        try:
            with self._batchnorm_in_inference:
                assigned = {id(one) for one in assigned_in_call(self.backbone, *args, **kwargs)}
        except Exception:  # noqa: BLE001  As in `predict` on JAX, which has the values elsewhere.
            return
        moving = [one.path for one in weights if id(one) in assigned]
        if moving:
            raise ValueError(
                '`inference_mode="batchnorm"` cannot keep these statistics constant, whose layers '
                f"have a `call` of their own that moves them: {some(moving)}. Use "
                '`inference_mode="always"`.'
            )
        self._holds_batchnorm = True

    def build(self, input_shape: Any) -> None:
        self._build_backbone(input_shape)
        if self.rematerialize:
            _check_has_graph(self.backbone)
        self._hold(self.backbone)
        if self._saved is not None:
            self._restore(self._saved)
        elif not self.trainable:
            # Layers that the backbone made in its own `build` are trainable until now.
            freezing.freeze(self.backbone)

    def call(self, *args: Any, training: bool | None = None, **kwargs: Any) -> Any:
        args, kwargs = training_by_name(self, args, {"training": training, **kwargs})
        # By weight, as the model around it does: neither the wrapper's flag nor a layer's counts.
        weights = self.backbone.weights
        frozen = [weight for weight in weights if not weight.trainable]
        if len(frozen) == len(weights) or self.inference_mode == "always":
            kwargs["training"] = False
        with (
            # Again, for the `training=False` of the inner call: `call` may be called directly.
            call_context_kept(),
            not_watched(frozen),
            # Also where `training=False` does not reach: in the mode "batchnorm", and in a backbone
            # whose own `call` insists on `training=True`.
            self._batchnorm_in_inference,
            self._in_segments,
        ):
            return self.backbone(*args, **kwargs)

    def _hold(self, backbone: keras.Layer) -> None:
        """Makes the contexts of a call for the layers that the backbone has now."""
        if self.inference_mode == "batchnorm":
            _check_can_hold_batchnorm(backbone)
        self._batchnorm_in_inference = HeldInInference(batchnorm_layers(backbone))
        self._in_segments: Any = contextlib.nullcontext()
        if self.rematerialize:
            self._in_segments = Rematerialized(
                backbone, self._batchnorm_in_inference, self.add_loss
            )

    def compute_output_shape(self, *shapes: Any, **named_shapes: Any) -> Any:
        return self.backbone.compute_output_shape(*shapes, **named_shapes)

    def compute_output_spec(self, *args: Any, training: bool | None = None, **kwargs: Any) -> Any:
        return self.backbone.compute_output_spec(*args, **kwargs)

    def compute_mask(self, inputs: Any, previous_mask: Any) -> None:
        """Returns None: the outputs carry the masks that the backbone gave them, or none."""

    @property
    def metrics(self) -> list[keras.Metric]:
        """List of the wrapper's own metrics, of which it has none.

        A model looks up those of the layers in the backbone itself, and passes over models, whose
        compiled loss and metrics would take the place of its own.
        """
        return []

    @property
    def input(self) -> Any:
        """The symbolic input of the first call, or the backbone's if there was none."""
        return super().input if was_called(self) else self.backbone.input

    @property
    def output(self) -> Any:
        """The symbolic output of the first call, which is one on the backbone's input if need be.

        Not the backbone's own output: a model that is made of it would not hold the wrapper.
        """
        if not was_called(self):
            self(self.backbone.input)
        return super().output

    def __getattr__(self, name: str) -> Any:
        """Returns what the backbone has of that name, which the wrapper lacks."""
        try:
            return super().__getattr__(name)  # type: ignore[misc]  # Which layers have on torch.
        except AttributeError:
            pass
        lacks = f"{type(self).__name__!r} object has no attribute {name!r}"
        # Not what Keras keeps in a layer, nor, while one is unpickled, what is not there yet.
        if name == "backbone" or name.startswith("_"):
            raise AttributeError(lacks, name=name, obj=self)
        if name in NOT_OF_A_LAYER:
            lacks += f". As a layer it is not trained or saved by itself: see `backbone.{name}`."
            raise AttributeError(lacks, name=name, obj=self)
        backbone = self.backbone
        try:
            value = getattr(backbone, name)
        except AttributeError as error:
            of = f"the backbone {backbone.name!r} (of type {type(backbone).__name__})"
            raise AttributeError(f"{lacks}, and nor has {of}.", name=name, obj=self) from error
        if inspect.ismethod(value) and value.__self__ is backbone:
            return self._leaving_frozen(value)
        return self._symbolic(name, value)

    def _leaving_frozen(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """A method of the backbone that does not unfreeze a frozen one, as `enable_lora` does."""

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return method(*args, **kwargs)
            finally:
                if not self.trainable:
                    freezing.freeze(self.backbone)

        return call

    def _symbolic(self, name: str, value: Any) -> Any:
        """An attribute of the backbone, with outputs of a wrapper for tensors of its graph."""
        tensors = [x for x in keras.tree.flatten(value) if isinstance(x, keras.KerasTensor)]
        if not tensors:
            return value
        around = _by_id(self.backbone.inputs, self.input)
        if not all(id(x) in around for x in tensors):
            around |= _by_id(self.backbone.outputs, self.output)
        if not all(id(x) in around for x in tensors):
            if name not in self._parts.calls:
                self._parts.calls[name] = self._part(name, tensors)(self.input)
            around = _by_id(tensors, self._parts.calls[name])
        return keras.tree.map_structure(lambda x: around.get(id(x), x), value)

    def _part(self, name: str, tensors: list[Any]) -> FrozenBackbone:
        """A wrapper of the same layers that returns other tensors of the backbone's graph."""
        model = keras.Model(self.backbone.inputs, tensors, name=f"{self.backbone.name}_{name}")
        with freezing.trainable_flags_kept(self.backbone):
            part = type(self)(
                model, inference_mode=self.inference_mode, rematerialize=self.rematerialize
            )
        part.hand_frozen = self.hand_frozen
        set_layer_flag(model, self.trainable)
        set_layer_flag(part, self.trainable)
        return part

    def unfreeze(
        self, layers: Selection = "all", *, train_batchnorm: bool = False
    ) -> list[keras.Layer]:
        """Makes the selected layers of the backbone trainable.

        Takes effect in a running `fit` only through `UnfreezeAtConvergence`; outside `fit`, compile
        the model again. Weights that were never trainable stay so, and so do kernels that LoRA has
        frozen and single weights that were frozen by hand before wrapping.

        Whole layers that were frozen by hand, or by `enable_lora` of a KerasHub backbone around
        those with LoRA, stay frozen unless a name, an expression or a function selects them.
        `"all"`, `"scales"` and an int do not (an int passes over them), nor does an expression or a
        function that selects all that `"all"` does. A selected layer brings what was frozen in it
        only if all of it was.

        Args:
            layers: Which layers. `"all"`; `"lora"`, only the weights that `enable_lora` of layers
                or of a KerasHub backbone added; `"scales"`, only biases and scales (BitFit): what
                has one dimension at most, or is named `bias`, `gamma` or `beta`; an int n, the n
                layers nearest the output that have weights to train; a regular expression that
                must match a layer's whole name (nested layers are named `outer/inner`); a list of
                such names; or a function from a layer to a bool. A selected layer brings the layers
                in it.
            train_batchnorm: Bool. Whether selected BatchNormalization layers train their gamma and
                beta, of `"scales"` too: a MobileNet has no others. Their moving statistics stay
                constant either way.

        Returns:
            The list of layers that became trainable, from input to output.

        Raises:
            ValueError: If `layers` selects nothing that could be trained. The message lists the
                closest names.

        Example:

        >>> backbone = FrozenBackbone(keras.applications.MobileNetV2(weights=None))
        >>> [layer.name for layer in backbone.unfreeze("Conv_1")]
        ['Conv_1']
        """

        def change() -> list[keras.Layer]:
            unfrozen = freezing.unfreeze(
                self.backbone, layers, train_batchnorm=train_batchnorm, hand_frozen=self.hand_frozen
            )
            set_layer_flag(self, True)
            return unfrozen

        self._renew_sharing_if_changed_by(change)
        return change()

    def freeze(self, layers: Selection = "all") -> None:
        """Makes the selected layers of the backbone not trainable.

        Takes effect when the model is compiled again.

        Args:
            layers: Which layers; see `unfreeze`.

        Raises:
            ValueError: If `layers` selects nothing. The message lists the closest names.

        Example:

        >>> backbone = FrozenBackbone(keras.applications.MobileNetV2(weights=None))
        >>> _ = backbone.unfreeze()
        >>> backbone.freeze("block_1_.*")
        """

        def change() -> None:
            freezing.freeze(self.backbone, layers)
            set_layer_flag(self, bool(self.trainable_weights))

        self._renew_sharing_if_changed_by(change)
        change()

    def _renew_sharing_if_changed_by(self, change: Callable[[], Any]) -> None:
        """Has models that share weights compile anew, if there is a flag that is to change.

        Before it changes, for the values of a `fit` that runs go by position. And only if it does:
        to look for the models takes longer than to try.
        """
        if not renews_sharing():
            return
        before = freezing.get_trainable_flags(self)
        with freezing.trainable_flags_kept(self):
            change()
            changed = freezing.get_trainable_flags(self) != before
        if changed:
            renew_sharing(self.weights)

    def get_build_config(self) -> dict[str, Any] | None:
        config = super().get_build_config()
        if config is not None and self._call_arguments is not None:
            config["call_arguments"] = self._call_arguments.to_config()
        return config

    def build_from_config(self, config: dict[str, Any]) -> None:
        if "call_arguments" in config:
            self._call_arguments = _CallArguments.from_config(config["call_arguments"])
        super().build_from_config(config)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.pop("trainable")
        config.update(
            backbone=keras.saving.serialize_keras_object(self.backbone),
            output_layers=self.output_layers,
            inference_mode=self.inference_mode,
            rematerialize=self.rematerialize,
            **dataclasses.asdict(self._saved or self._to_save()),
        )
        return config

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> FrozenBackbone:
        config = copy.deepcopy(config)
        saved = _Saved(config.pop("hand_frozen", ()), config.pop("trainable_flags", None))
        backbone = config.pop("backbone")
        if not isinstance(backbone, keras.Layer):
            backbone = keras.saving.deserialize_keras_object(
                backbone, custom_objects=custom_objects
            )
        layer = cls(backbone, **config)
        if _is_wholly_built(layer.backbone):
            layer._restore(saved)
        else:
            layer.hand_frozen = NOTHING
            layer._saved = saved
            set_layer_flag(layer, saved.trainable_flags is not None)
        return layer

    def load_own_variables(self, store: Any) -> None:
        """Loads nothing, for there is nothing besides the backbone's weights."""
        # A file of the same model without the wrapper may have the backbone's own weights here.
        if not read_without_wrapper(store, self.backbone, "backbone"):
            super().load_own_variables(store)

    def _build_backbone(self, input_shape: Any) -> None:
        """Has the backbone make its weights, if it has not yet."""
        if self._call_arguments is not None:
            if not _is_wholly_built(self.backbone):
                self._call_arguments.call(self.backbone)
        elif not self.backbone.built:
            inputs = keras.tree.map_shape_structure(keras.KerasTensor, input_shape)
            self.backbone(inputs, training=False)

    def _to_save(self) -> _Saved:
        flags = None
        if any(weight.trainable for weight in self.backbone.weights):
            flags = dataclasses.asdict(freezing.get_trainable_flags(self.backbone))
        return _Saved(self.hand_frozen.to_config(self.backbone), flags)

    def _restore(self, saved: _Saved) -> None:
        """Freezes and unfreezes what was when this configuration was made."""
        self._saved = None
        # Not what is frozen in the backbone now: its configuration may hold the flags of a stage.
        self.hand_frozen = HandFrozen.from_config(self.backbone, saved.hand_frozen)
        if saved.trainable_flags is None:
            freezing.freeze(self.backbone)
            return
        set_layer_flag(self, True)
        lost = freezing.restore_trainable_flags(self.backbone, saved.trainable_flags)
        set_layer_flag(self, bool(self.trainable_weights))
        if lost:
            warnings.warn(
                f'In the saved backbone "{self.backbone.name}" some of what trained is not in the '
                f"one that was made from its configuration: {some(lost)}. The rest is as it was. "
                "Was LoRA enabled, which this backbone does not write down? Its updates are in the "
                "saved kernels: call `enable_lora` again to train more of them, or `unfreeze`.",
                stacklevel=2,
            )


@dataclasses.dataclass(frozen=True)
class _Saved:
    """What a configuration says of the flags. As a dataclass, Keras does not track what is in it.

    Attributes:
        hand_frozen: What `HandFrozen.from_config` takes.
        trainable_flags: What `freezing.restore_trainable_flags` takes, None if nothing trains.
    """

    hand_frozen: Any
    trainable_flags: Any


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What was returned for attributes that hold tensors of the backbone's graph, by their names.

    As a dataclass, Keras does not track what is in it: those wrappers belong to whose graph they
    are in.
    """

    calls: dict[str, Any]


def _by_id(tensors: Any, others: Any) -> dict[int, Any]:
    """The tensors that stand for others, by the ids of these."""
    pairs = zip(keras.tree.flatten(tensors), keras.tree.flatten(others), strict=True)
    return {id(tensor): other for tensor, other in pairs}


def _check_has_graph(backbone: keras.Layer) -> None:
    if operations_in_graph(backbone) is None:
        raise ValueError(
            "`rematerialize=True` needs a Functional or Sequential backbone, in whose graph blocks "
            f'can be found. Received "{backbone.name}" of type {type(backbone).__name__}. Make its '
            "layers in a `keras.RematScope`, with `rematerialize=False`."
        )


def _check_can_hold_batchnorm(backbone: keras.Layer) -> None:
    """Raises a ValueError if there may be BatchNorm in what is not made of Keras' layers."""
    unlisted = unlisted_in(backbone)
    if unlisted:
        raise ValueError(
            '`inference_mode="batchnorm"` cannot keep statistics constant that Keras does not list '
            f"among a layer's weights: {some([one.path for one in unlisted])}. Use "
            '`inference_mode="always"`.'
        )


def _check_can_rematerialize(backbone: keras.Layer, inference_mode: str) -> None:
    if not isinstance(backbone, keras.Sequential):  # Which may not be built yet.
        _check_has_graph(backbone)
    if inference_mode != "always":
        raise ValueError(
            '`rematerialize=True` needs `inference_mode="always"`: what is random in a layer may '
            "not be the same when it is computed again. Received: "
            f"inference_mode={inference_mode!r}."
        )


def _is_wholly_built(layer: keras.Layer) -> bool:
    """Whether all in the layer is built, which Keras takes for granted in a model it has loaded."""
    return all(one.built for one in flatten_layers(layer))


def _warn_of_losses_taken_over(backbone: keras.Layer) -> None:
    """Warns of compiled models that Keras does not tell from the model around them.

    A model passes over the metrics of models in it, but not over those of a layer, which has the
    metrics of all that is in it.
    """
    for layer in flatten_layers(backbone):
        if isinstance(layer, keras.Model):
            continue
        seen = {id(metric) for metric in layer.metrics}
        for inner in flatten_layers(layer):
            if isinstance(inner, keras.Model) and seen & {id(one) for one in inner.metrics}:
                warnings.warn(
                    f'The layer "{layer.name}" (a {type(layer).__name__}) holds the compiled model '
                    f'"{inner.name}". In a layer that is no `keras.Model`, Keras takes its loss '
                    "and metrics for those of the model that you train, with FrozenBackbone or "
                    f'without. Load "{inner.name}" with `compile=False`, or set its `compiled` '
                    "to False.",
                    stacklevel=3,
                )


def _truncate(backbone: keras.Layer, output_layers: str | Sequence[str]) -> keras.Model:
    """Returns a model of the same layers that ends at the named ones."""
    names = [output_layers] if isinstance(output_layers, str) else list(output_layers)
    if not getattr(backbone, "inputs", None):
        raise ValueError(
            f"`output_layers={output_layers!r}` needs a Functional or a built Sequential backbone, "
            f'whose layers have outputs. Received "{backbone.name}" of type '
            f"{type(backbone).__name__}. Have its `call` return the features instead."
        )
    if not names:
        raise ValueError("`output_layers=[]` names no layer. Pass one name, a list, or None.")
    tensors = [_output_of(backbone, name) for name in names]
    outputs = tensors[0] if isinstance(output_layers, str) else tensors
    inputs = backbone.inputs if isinstance(backbone, keras.Sequential) else backbone.input
    return keras.Model(inputs, outputs, name=backbone.name)


def _output_of(backbone: keras.Model, name: str) -> Any:
    if name not in [layer.name for layer in backbone.layers]:
        raise ValueError(
            f"{no_such_layer(backbone, name, 'output_layers')} Pass the name of a layer that is "
            "directly in the backbone, or a list of such names."
        )
    outputs = outputs_in_graph(backbone, backbone.get_layer(name))
    if len(outputs) != 1:
        raise ValueError(
            f'`output_layers="{name}"` has no one output: the backbone "{backbone.name}" calls '
            f"that layer {len(outputs)} times. Name a layer that is called once."
        )
    return outputs[0]
