"""Under MirroredStrategy, in a process of its own: collectives of two runs in one would collide."""

import os
import subprocess
import sys
import textwrap

import pytest

from tests.shared import only_on

pytestmark = [
    only_on("tensorflow", "MirroredStrategy is TensorFlow's."),
    pytest.mark.covers("distribution: MirroredStrategy, two devices"),
]

PREPARATION = """
    import hashlib
    import numpy as np, keras, tensorflow as tf
    from keras_tl import FreezeGuard, FrozenBackbone, FrozenWeightsChangedError
    from keras_tl import GroupOptimizer, StaleCompileError, UnfreezeAtConvergence
    from tests import models
    from tests.shared import as_bytes, regression_data

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        wrapper = FrozenBackbone(models.functional(["dense", "batchnorm", "dense"]))
        model = models.functional_outer(wrapper)
        model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"])
    x, y = regression_data()
    fit = dict(batch_size=8, epochs=4, validation_data=(x, y), verbose=0)
"""

# What breaks first, in one process: to start one takes longer than all that it trains.
ALL_IN_ONE = """
    from keras_tl import FeatureCache, Stage
    from tests.shared import Recorder, Scripted, values_of

    kernel = wrapper.backbone.weights[0]
    replicas = kernel.value.values
    assert len(replicas) == 2
    # On the second replica alone.
    fault = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda *_: replicas[1].assign_add(np.ones((4, 4), "float32"))
    )
    try:
        model.fit(x, y, callbacks=[fault, FreezeGuard()], **fit)
    except FrozenWeightsChangedError as error:
        change, = error.changes
        assert (change.path, change.cause) == (kernel.path, "overwritten")
        assert round(change.largest_change, 5) == 1.0, change
    else:
        raise AssertionError("not seen")
    replicas[1].assign(replicas[0])

    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(7)  # A last batch of two.
    features = FeatureCache(model)(data, shuffle=False, verbose=0)
    found = np.concatenate([batch.numpy() for batch, _ in features])
    np.testing.assert_allclose(found, wrapper(x), rtol=1e-5, atol=1e-6)

    before = dict(as_bytes(wrapper.weights))
    stages = [Stage("all", 0.01, head_learning_rate=0.01)]
    callback = UnfreezeAtConvergence(stages=stages, max_frozen_epochs=2)
    scripted, recorder = Scripted("val_loss", [4.0, 3.0, 2.0, 1.0, 2.0]), Recorder(values_of)
    callbacks = [scripted, recorder, callback, FreezeGuard(check="batch")]
    history = model.fit(x, y, callbacks=callbacks, **fit | {"epochs": 5}).history
    assert history["stage"] == [0, 0, 1, 1, 1], history
    assert values_of(model) == recorder.records[3] != recorder.records[4]
    after = dict(as_bytes(wrapper.weights))
    moved = [path.split("/")[-1] for path in before if before[path] != after[path]]
    assert sorted(moved) == ["bias", "bias", "kernel", "kernel"], moved
    groups = model.optimizer.groups.items()
    steps = {name: int(keras.ops.convert_to_numpy(one.iterations)) for name, one in groups}
    assert steps == {"head": 12, "backbone_1": 6}, steps
    assert model.optimizer._distribution_strategy.num_replicas_in_sync == 2
    print("done")
"""

SWITCH = """
    before = dict(as_bytes(wrapper.weights))
    callback = UnfreezeAtConvergence(0.01, max_frozen_epochs=2, restore_best_weights=False)
    guard = FreezeGuard(check="batch")
    history = model.fit(x, y, callbacks=[callback, guard], **fit).history
    assert history["stage"] == [0, 0, 1, 1], history
    after = dict(as_bytes(wrapper.weights))
    moved = {path.split("/")[-1] for path in before if before[path] != after[path]}
    assert moved == {"kernel", "bias"}, moved
    assert model.optimizer._distribution_strategy.num_replicas_in_sync == 2
    print("done")
"""

GUARD = """
    kernel = wrapper.backbone.weights[0]
    replicas = kernel.value.values
    assert len(replicas) == 2
    before = as_bytes([kernel])

    def overwrite(epoch, logs):
        # On the second replica alone.
        replicas[1].assign_add(np.ones((4, 4), "float32"))

    fault = keras.callbacks.LambdaCallback(on_epoch_end=overwrite)
    try:
        model.fit(x, y, callbacks=[fault, FreezeGuard()], **fit)
    except FrozenWeightsChangedError as error:
        change, = error.changes
        assert (change.path, change.cause) == (kernel.path, "overwritten")
        assert round(change.largest_change, 5) == 1.0, change
    else:
        raise AssertionError("not seen")

    replicas[1].assign(replicas[0])
    with model.distribute_strategy.scope():
        model.compile(keras.optimizers.Adam(0.01, use_ema=True), "mse")
    guard = FreezeGuard(action="restore")
    model.fit(x, y, callbacks=[fault, guard], **fit)
    assert guard.restored == {kernel.path: 4}, guard.restored
    assert all(replica.numpy().tobytes() == before[0][1] for replica in replicas)
    model.fit(x, y, callbacks=[FreezeGuard()], **fit)

    wrapper.unfreeze()
    try:
        model.fit(x, y, callbacks=[FreezeGuard()], **fit)
    except StaleCompileError as error:
        assert len(error.not_training) == 4
    else:
        raise AssertionError("not seen")
    print("done")
"""


HEAD_GOES_ON = """
    callback = UnfreezeAtConvergence(
        0.001, head_learning_rate=0.01, max_frozen_epochs=2, restore_best_weights=False
    )
    model.fit(x, y, callbacks=[callback, FreezeGuard()], **fit)
    groups = model.optimizer.groups.values()
    iterations = [int(keras.ops.convert_to_numpy(one.iterations)) for one in groups]
    assert iterations == [8, 4], iterations
    print("done")
"""

STAGES = """
    from keras_tl import Stage, find_learning_rate, layerwise_learning_rates

    before = as_bytes(model.weights)
    found = find_learning_rate(model, x, y, batch_size=8, steps=10, layers="all",
        max_learning_rate=0.1, stop_at=1e9, verbose=0)
    assert len(found.losses) == 10
    assert as_bytes(model.weights) == before
    rates = layerwise_learning_rates(wrapper, 0.001, 0.5)
    stages = [
        Stage(1, 0.01, head_learning_rate=0.01, epochs=1),
        Stage("all", rates, head_learning_rate=0.01, epochs=1),
        Stage("all", rates),
    ]
    callback = UnfreezeAtConvergence(stages=stages, max_frozen_epochs=1, warmup_steps=1)
    history = model.fit(x, y, callbacks=[callback, FreezeGuard(check="batch")], **fit).history
    assert history["stage"] == [0, 1, 2, 3], history
    print("done")
"""

FEATURES = """
    import tempfile
    from keras_tl import FeatureCache, fine_tune

    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(7)  # A last batch of two.
    cache = FeatureCache(model, cache_dir=tempfile.mkdtemp())
    features = cache(data, shuffle=False, verbose=0)
    found = np.concatenate([batch.numpy() for batch, _ in features])
    np.testing.assert_allclose(found, wrapper(x), rtol=1e-5, atol=1e-6)
    assert np.concatenate([targets for _, targets in features]).tobytes() == y.tobytes()
    history = fine_tune(model, x, y, max_frozen_epochs=2, **fit).history
    assert history["stage"] == [0, 0, 1, 1], history
    print("done")
"""

DIGEST = """
    wrapper.unfreeze()
    for weight in model.weights:
        weight.assign(np.linspace(0.1, 0.9, int(np.prod(weight.shape))).reshape(weight.shape))
    with model.distribute_strategy.scope():
        groups = {name: keras.optimizers.Adam(0.01) for name in ("backbone", "head")}
        optimizer = MAKE
        model.compile(optimizer, "mse")
    model.fit(x, y, shuffle=False, **fit)
    print(hashlib.sha256(b"".join(value for _, value in as_bytes(model.weights))).hexdigest())
"""


def run(script):
    """Runs a script and returns the last line that it printed."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PREPARATION + script)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.splitlines()[-1]


def test_guard_features_stages_and_best_weights_under_mirrored_strategy():
    assert run(ALL_IN_ONE) == "done"


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    [SWITCH, GUARD, HEAD_GOES_ON, STAGES, FEATURES],
    ids=["switch", "guard", "groups", "stages", "features"],
)
def test_under_mirrored_strategy(script):
    assert run(script) == "done"


@pytest.mark.slow
def test_groups_of_one_kind_train_as_one_optimizer():
    together = run(DIGEST.replace("MAKE", 'GroupOptimizer(groups, assign={"backbone": wrapper})'))
    assert together == run(DIGEST.replace("MAKE", "keras.optimizers.Adam(0.01)"))
