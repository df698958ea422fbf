"""Every block of code in the README runs, in their order, as one script."""

import ast
import re
import runpy
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_tl import (
    FreezeGuard,
    FrozenBackbone,
    FrozenWeightsChangedError,
    UnfreezeAtConvergence,
)
from tests.conftest import only_on

EXAMPLES = Path(__file__).parent.parent / "examples"
README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
CLIENTS = "keras_hub", "tuner.", "mlflow"  # What is no dependency of the package or its tests.
IMAGES, LABELS = np.ones((8, 150, 150, 3), "float32"), np.array([[0], [1]] * 4)


def small_xception(include_top, weights):
    """Layers with names of Xception's, which is large and needs a download."""
    names = ["block1_conv1", "block13_sepconv1", "block14_sepconv1", "block14_sepconv2"]
    layers = [keras.layers.AveragePooling2D(50)]
    for name in names:
        layers.append(keras.layers.Conv2D(2, 1, activation="relu", name=name))
        layers.append(keras.layers.BatchNormalization(name=f"{name}_bn"))
    return keras.Sequential([keras.Input((150, 150, 3)), *layers], name="xception")


def new_model():
    """The model of the first block, and its backbone, as they are before `fit`."""
    backbone = FrozenBackbone(small_xception(include_top=False, weights=None))
    pooling = keras.layers.GlobalAveragePooling2D()
    model = keras.Sequential([keras.Input((150, 150, 3)), backbone, pooling, keras.layers.Dense(1)])
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile("adam", loss)
    return {"model": model, "backbone": backbone, "loss": loss}


@pytest.fixture
def data(monkeypatch, tmp_path):
    """What a reader of the README has."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(keras.applications, "Xception", small_xception)
    batches = tf.data.Dataset.from_tensor_slices((IMAGES, LABELS)).batch(4)
    arrays = {"x": IMAGES, "y": LABELS, "x_val": IMAGES.copy(), "y_val": LABELS}
    return {"train": batches, "val": batches, "epochs": 3, **arrays}


def test_every_block_has_a_language():
    assert {language for language, _ in BLOCKS} == {"python", "bash", "text"}


def python_blocks(*, without=()):
    """The blocks of Python, compiled, but for those with a word of `without`."""
    blocks = [code for language, code in BLOCKS if language == "python"]
    return [
        compile(code, f"block {number} of the README", "exec")
        for number, code in enumerate(blocks, start=1)
        if not any(word in code for word in without)
    ]


@pytest.mark.filterwarnings("ignore:UnfreezeAtConvergence")
def test_all_python_blocks_compile_and_the_first_runs(data):
    first, *others = python_blocks()
    assert len(others) > 9
    exec(first, {**data, **new_model()})  # noqa: S102


@pytest.mark.slow
@only_on("tensorflow", "The training loop is TensorFlow's.")
@pytest.mark.filterwarnings("ignore:UnfreezeAtConvergence")
def test_all_python_blocks_run(data):
    pytest.importorskip("matplotlib")
    namespace = {"base": small_xception(include_top=False, weights=None)}
    for block in python_blocks(without=CLIENTS):
        namespace.update(data, **new_model())
        exec(block, namespace)  # noqa: S102
    assert Path("stages.png").stat().st_size > 1000
    _, history = namespace["by_hand"](namespace["base"], data["train"], data["val"])
    assert len(history["loss"]) > 3


def client_block(word):
    (block,) = [code for language, code in BLOCKS if language == "python" and word in code]
    return block


@pytest.mark.slow
@pytest.mark.clients
@only_on("tensorflow", "The block exports TensorFlow's graph.")
def test_from_a_task_to_a_model_that_is_deployed(monkeypatch, tmp_path):
    hub = pytest.importorskip("keras_hub").models
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    example = runpy.run_path(str(EXAMPLES / "keras_hub_task.py"))
    backbone, preprocessor = example["make_parts"](small=True)
    monkeypatch.setattr(hub.Backbone, "from_preset", lambda name: backbone)
    monkeypatch.setattr(hub.ImageClassifierPreprocessor, "from_preset", lambda name: preprocessor)
    images, labels = example["digits"](24)
    code = client_block("keras_hub").replace("epochs=50", "epochs=2")
    namespace = {"images": images, "labels": labels, "val": (images, labels), "keras": keras}
    exec(code, namespace)  # noqa: S102
    prepared = preprocessor(images)
    expected = namespace["task"].predict(images, verbose=0)
    loaded = keras.models.load_model("digits.keras")
    np.testing.assert_array_equal(loaded.predict(prepared, verbose=0), expected)
    served = tf.saved_model.load("digits")
    np.testing.assert_allclose(served.serve(prepared), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.clients
@only_on("tensorflow", "They call `fit` alike on every backend.")
def test_beside_a_tuner_and_scikit_learn(monkeypatch, tmp_path):
    tuners = pytest.importorskip("keras_tuner")
    sklearn = pytest.importorskip("sklearn")
    pytest.importorskip("sklearn.model_selection")
    monkeypatch.chdir(tmp_path)
    keras.utils.set_random_seed(0)
    x, y = np.random.normal(size=(24, 4)).astype("float32"), np.ones((24, 1), "float32")

    def build(hp=None, **data):
        base = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        model = keras.Sequential([keras.Input((4,)), FrozenBackbone(base), keras.layers.Dense(1)])
        model.compile("adam", "mse")
        return model

    tuner = tuners.RandomSearch(build, "val_loss", max_trials=1, directory="search")
    given = {"x": x, "y": y, "x_val": x, "y_val": y, "build": build, "tuner": tuner}
    given |= {"keras": keras, "sklearn": sklearn, "UnfreezeAtConvergence": UnfreezeAtConvergence}
    with pytest.warns(UserWarning, match="still frozen"):
        exec(client_block("tuner.").replace("50", "2"), given)  # noqa: S102
    assert [one.status for one in tuner.oracle.trials.values()] == ["COMPLETED"]


def test_the_counted_lines_are_those_of_the_code_by_hand():
    (function,) = ast.parse(next(code for _, code in BLOCKS if "first.history" in code)).body
    begins = next(i for i, one in enumerate(function.body) if "EarlyStopping" in ast.unparse(one))
    counts = {"layers": 0, "compile": 0, "other": 0}
    for one in function.body[begins:-1]:
        lines = one.end_lineno - one.lineno + 1
        compiles = ast.unparse(one).startswith("model.compile")
        kind = "layers" if isinstance(one, ast.For) else "compile" if compiles else "other"
        counts[kind] += lines
    rows = {
        "other": "Unfreeze when the head has converged",
        "layers": "Constant BatchNormalization statistics",
        "compile": "The right weights train",
    }
    for kind, row in rows.items():
        cells = next(line for line in README.splitlines() if line.startswith(f"| {row}")).split("|")
        assert int(cells[3]) == counts[kind], row


def test_an_error_of_freeze_guard_looks_as_shown():
    shown = next(code for _, code in BLOCKS if code.startswith("FreezeGuard: 2 weights"))
    inputs = keras.Input((2,))
    norm = keras.layers.BatchNormalization(name="batch_normalization")
    model = keras.Model(inputs, norm(inputs))
    norm.trainable = False
    with pytest.raises(FrozenWeightsChangedError) as error, FreezeGuard(verbose=0).watching(model):
        norm.moving_mean.assign([1.0, 1.0])
        norm.moving_variance.assign([2.0, 2.0])
    lines, expected = str(error.value).splitlines(), shown.splitlines()
    assert lines[0] == expected[0]
    assert lines[2].split("  ")[0] == expected[2].split("  ")[0]
    assert [line.split()[0] for line in lines[3:5]] == [line.split()[0] for line in expected[3:5]]


def test_the_switch_looks_as_shown(capsys):
    from keras_tl import UnfreezeAtConvergence

    shown = next(code for _, code in BLOCKS if "UnfreezeAtConvergence unfreezes" in code)
    model = keras.Sequential([FrozenBackbone(keras.layers.Dense(2)), keras.layers.Dense(1)])
    model.compile("adam", "mse", run_eagerly=True)
    x, y = np.ones((4, 2)), np.ones((4, 1))
    callback = UnfreezeAtConvergence(monitor="loss", max_frozen_epochs=1, fine_tune_patience=3)
    model.fit(x, y, epochs=2, callbacks=[callback], verbose=0)
    block = capsys.readouterr().out.split("\n")[: len(shown.splitlines())]
    assert [line[:16].rstrip() for line in block[1:]] == [
        line[:16].rstrip() for line in shown.splitlines()[1:]
    ]
