"""Cases that the test suites of peers hold, told in terms of Keras.

From PyTorch Lightning (`BackboneFinetuning`), finetuning-scheduler, fastai, and their users'
threads. Where another file has the test, it is named; what does not apply says why.

Lightning
 1. The backbone joins while a schedule on the head runs: test_head_learning_rate (a schedule goes
    on bit for bit). Its rate may ramp: `warmup_steps` in test_stages. A ramp by epochs that then
    moves together with the head's does not apply: a stage has one setting of rates.
 2. An optimizer built on all weights although the backbone is frozen: here.
 3. BatchNormalization frozen with the rest, on demand or not: test_unfreeze_at_convergence; nested
    lists of layers: test_selecting.
 4. A group without a rate gets a tenth of the first: does not apply, `learning_rate` has a default.
 5. Weights added that are in a group already: does not apply, groups are made from what is
    trainable, and a weight in two groups is an error (test_group_optimizer).
 6. Groups survive a file: test_group_optimizer, test_stages. A schedule past its end: here.
 7. A layer with weights beside its sublayers: here.
 8. Restoring before the optimizer's state is loaded: `load_model` makes layers, flags and groups
    before it, test_stages.
 9. A backbone without weights, or that is not in the model: here, test_unfreeze_at_convergence.
finetuning-scheduler
10. A default schedule, written down and read back: test_stages (`Stage.by_depth`, `to_dict`).
11. Errors in a schedule: test_stages, and here (a stage that selects nothing). Keys and a rate for
    stage 0 do not apply, as a schedule is a list without stage 0; nor does one weight in two
    stages, as a stage names all that trains in it.
12. Switches by convergence, by epochs or either: test_stages. A mode that ignores convergence does
    not apply: `epochs` without `patience` does that for a stage.
13. A maximal depth: does not apply, pass a shorter list. A model that is past its end: here.
14. The best weights of a stage restored at its end: test_properties_best_weights, with stages.
15. A value that is NaN or infinite: test_stages. Thresholds do not apply: EarlyStopping has them.
16. Optimizer and schedule made anew at each switch: test_stages, test_switching. A plateau callback
    without a monitor does not apply: Keras' has a default.
17. Statistics of frozen BatchNormalization: kept, always (test_properties_immutability).
18. The model's own freezing differs from stage 0: here.
19. Shared weights are unfrozen once: here.
20. No EarlyStopping needed: test_unfreeze_at_convergence. Two of ours: here.
21. All workers agree: test_distribution.
22. No code runs from files: `to_dict` refuses functions (test_stages); a saved GroupOptimizer
    holds names and no functions (test_group_optimizer).
fastai
23. `freeze_to(n)` and slices of rates: here.
24. BatchNormalization trains in frozen groups: not so here, on purpose (fact 1 of the README).
25. `lr_find`: test_learning_rate_finder.
Users' threads
26. A resumed run must come back unfrozen, and train: test_stages (its blocks move).
27. Data-parallel workers and parameters that were frozen when training began: test_distribution.
28. Minimal rates of a plateau callback when a group joins: here.
29. Why a frozen stage at all: cited in the README.
"""

import keras
import numpy as np
import pytest

from keras_tl import (
    FrozenBackbone,
    GroupOptimizer,
    Stage,
    UnfreezeAtConvergence,
)
from keras_tl import layerwise_learning_rates as rates_by_layer
from tests import models
from tests.shared import as_bytes, regression_data, values_of

X, Y = regression_data()


def build(backbone=None, optimizer=None):
    wrapper = FrozenBackbone(backbone or models.functional(["dense", "batchnorm", "dense"]))
    model = models.functional_outer(wrapper)
    model.compile(optimizer or keras.optimizers.Adam(0.01), "mse")
    return model, wrapper


def fit(model, *callbacks, epochs=3):
    return model.fit(
        X,
        Y,
        batch_size=8,
        epochs=epochs,
        validation_data=(X, Y),
        callbacks=list(callbacks),
        verbose=0,
    ).history


def switch(**arguments):
    settings = {"max_frozen_epochs": 1, "restore_best_weights": False, "verbose": 0}
    return UnfreezeAtConvergence(**settings | arguments)


@pytest.mark.eager
@pytest.mark.parametrize("head", [None, 1e-2])
@pytest.mark.skipif(keras.backend.backend() == "jax", reason="Keras on JAX refuses to train then.")
def test_an_optimizer_built_on_all_weights(head):
    model, wrapper = build()
    wrapper.unfreeze()
    model.optimizer.build(model.trainable_variables)
    wrapper.freeze()
    model.compile(model.optimizer, "mse")
    before = as_bytes(wrapper.weights)
    fit(model, switch(learning_rate=1e-3, head_learning_rate=head))
    assert as_bytes(wrapper.weights) != before
    if head:
        groups = {v.path: model.optimizer.group_of(v) for v in model.trainable_variables}
        assert sorted(groups.values()) == ["backbone"] * 4 + ["head"] * 2


@pytest.mark.eager
def test_a_schedule_that_is_past_its_end():
    schedule = keras.optimizers.schedules.PolynomialDecay(1e-2, 2, end_learning_rate=1e-3)
    model, _ = build()
    history = fit(model, switch(learning_rate=schedule), epochs=4)
    np.testing.assert_allclose(history["learning_rate"][1:], [1e-3] * 3, rtol=1e-5)


class Parent(keras.layers.Layer):
    """A layer with a weight of its own beside a sublayer."""

    def __init__(self):
        super().__init__()
        self.child = keras.layers.Dense(4)

    def build(self, input_shape):
        self.own = self.add_weight(shape=(4,), initializer="ones", name="own")
        self.child.build(input_shape)

    def call(self, x):
        return self.own * self.child(x)


@pytest.mark.eager
def test_a_parents_own_weights_go_with_its_children():
    backbone = keras.Sequential([keras.Input((4,)), Parent()])
    model, wrapper = build(backbone)
    assert wrapper.trainable_weights == []
    before = as_bytes(wrapper.weights)
    fit(model, switch(learning_rate=1e-2))
    moved = [a != b for a, b in zip(before, as_bytes(wrapper.weights), strict=True)]
    assert moved == [True, True, True]
    wrapper.freeze()
    assert wrapper.trainable_weights == []


def test_a_backbone_without_weights():
    model, _ = build(keras.layers.ReLU())
    with pytest.raises(ValueError, match="have no weights to train"):
        fit(model, switch())


@pytest.mark.parametrize("stages", [["all", "nothing.*"], [1, ["nowhere"]]])
def test_a_stage_that_selects_nothing_is_refused_before_the_first_step(stages):
    model, _ = build()
    before = values_of(model)
    with pytest.raises(ValueError, match="matches no layer of the backbone"):
        fit(model, switch(stages=[Stage(layers, 1e-3) for layers in stages]))
    assert values_of(model) == before


@pytest.mark.eager
def test_a_model_past_the_end_of_its_schedule_goes_on_in_the_last_stage():
    model, _ = build()
    stages = [Stage(1, 1e-3, epochs=1), Stage("all", 1e-4, epochs=1)]
    fit(model, switch(stages=stages))
    shorter = switch(stages=stages[1:])
    assert fit(model, shorter, epochs=1)["stage"] == [1]


@pytest.mark.eager
def test_says_which_layers_train_in_stage_0_already(capsys):
    model, wrapper = build()
    (layer,) = wrapper.unfreeze(1)
    model.compile("adam", "mse")
    callback = switch(verbose=1)
    history = fit(model, callback)
    assert history["stage"] == [0, 1, 1]
    assert f"these layers train in stage 0 already: {layer.name}." in capsys.readouterr().out


@pytest.mark.eager
def test_shared_weights_are_unfrozen_once():
    shared = keras.layers.Dense(4, name="shared")
    inputs = keras.Input((4,))
    backbone = keras.Model(inputs, shared(keras.layers.Dense(4, name="other")(shared(inputs))))
    model, wrapper = build(backbone)
    callback = switch(
        stages=[Stage("shared", 1e-3, head_learning_rate=1e-2, epochs=1), Stage("all", 1e-3)]
    )
    fit(model, callback, epochs=2)
    assert [t.layers for t in callback.transitions] == [("shared",)]
    assert len(wrapper.trainable_weights) == 2
    assert isinstance(model.optimizer, GroupOptimizer)
    assert model.optimizer.group_of(shared.kernel) == "backbone_1"


@pytest.mark.eager
def test_two_of_ours_are_refused():
    model, _ = build()
    before = values_of(model)
    with pytest.raises(ValueError, match="two UnfreezeAtConvergence callbacks"):
        fit(model, switch(), switch())
    assert values_of(model) == before


def test_freeze_to_n_and_a_slice_of_rates():
    backbone = keras.Sequential([keras.Input((4,)), *[keras.layers.Dense(4) for _ in range(3)]])
    wrapper = FrozenBackbone(backbone)
    names = [layer.name for layer in backbone.layers]
    for n in (1, 2, 3):
        wrapper.freeze()
        assert [layer.name for layer in wrapper.unfreeze(n)] == names[-n:]
    # slice(1e-6, 1e-4) over three groups: the rates are a factor of ten apart.
    rates = rates_by_layer(wrapper, 1e-4, decay=(1e-6 / 1e-4) ** (1 / 2))
    np.testing.assert_allclose(list(rates.values()), [1e-6, 1e-5, 1e-4])


@pytest.mark.eager
def test_minimal_rates_of_a_plateau_callback_hold_after_a_group_joined():
    model, _ = build()
    plateau = keras.callbacks.ReduceLROnPlateau(
        "loss", min_delta=1e9, patience=1, factor=0.1, min_lr=1e-4
    )
    callback = switch(learning_rate=1e-3, head_learning_rate=1e-2)
    history = fit(model, callback, plateau, epochs=6)
    np.testing.assert_allclose(min(history["learning_rate_backbone"][1:]), 1e-4, rtol=1e-5)
    ratio = np.array(history["learning_rate_head"]) / np.array(history["learning_rate"])
    np.testing.assert_allclose(ratio[1:], 10, rtol=1e-4)
