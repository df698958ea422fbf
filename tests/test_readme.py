"""Every block of code in the README runs, in their order, as one script."""

import re
import runpy
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_tl import FrozenBackbone, UnfreezeAtConvergence
from tests.shared import Scripted

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
CLIENTS = ("keras_hub",)  # No dependency of the package or its tests.
IMAGES = np.ones((8, 150, 150, 3), "float32")


def small_network(name, size):
    """Stands in for an architecture that is large and has weights to download."""

    def make(input_shape=(size, size, 3), include_top=False, weights=None):
        layers = [keras.layers.AveragePooling2D(size // 3)]
        layers += [keras.layers.Conv2D(2, 1, activation="relu"), keras.layers.BatchNormalization()]
        return keras.Sequential([keras.Input((size, size, 3)), *layers], name=name)

    return make


def draw_photos(folder):
    """Writes pictures of two classes, without a package for pictures."""
    for number, kind in enumerate(("cats", "dogs")):
        (folder / kind).mkdir(parents=True)
        for count in range(10):
            picture = np.full((20, 20, 3), 100 * number + 10 * count, "uint8")
            data = tf.io.encode_jpeg(picture).numpy()
            (folder / kind / f"{count}.jpg").write_bytes(data)


def save_models():
    """Writes the files that the README loads."""
    inputs = keras.Input((8, 8, 3))
    features = keras.layers.Flatten(name="features")(keras.layers.Conv2D(2, 3)(inputs))
    keras.Model(inputs, keras.layers.Dense(5)(features)).save("mine.keras")
    keras.applications.MobileNetV2().save_weights("mobilenet.weights.h5")


@pytest.fixture
def names(monkeypatch, tmp_path):
    """What a reader of the README has, as the names of a script."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(keras.applications, "Xception", small_network("xception", 150))
    monkeypatch.setattr(keras.applications, "MobileNetV2", small_network("mobilenet", 96))
    draw_photos(tmp_path / "photos")
    return {}


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


def test_the_first_block_runs(names):
    first, *others = python_blocks()
    assert len(others) > 3
    with pytest.warns(UserWarning, match="still frozen"):
        exec(first, names)  # noqa: S102
    assert len(names["history"].epoch) > 3
    assert Path("photos.keras").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:UnfreezeAtConvergence")
def test_all_python_blocks_run(names):
    save_models()
    for block in python_blocks(without=CLIENTS):
        exec(block, names)  # noqa: S102
    saved = [keras.models.load_model(f"{name}.keras") for name in ("photos", "plain")]
    np.testing.assert_array_equal(*(model.predict(IMAGES, verbose=0) for model in saved))
    assert [layer.name for layer in names["backbone"].backbone.layers][-1] == "features"


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md"])
def test_links_to_files_lead_somewhere(file):
    page = ROOT / file
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert links
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_it_is_read_in_five_minutes():
    assert len(README.splitlines()) <= 200


def client_block(word):
    (block,) = [code for language, code in BLOCKS if language == "python" and word in code]
    return block


@pytest.mark.slow
@pytest.mark.clients
def test_a_task_of_keras_hub(monkeypatch, tmp_path):
    hub = pytest.importorskip("keras_hub").models
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    example = runpy.run_path(str(EXAMPLES / "keras_hub_task.py"))
    backbone, preprocessor = example["make_parts"](small=True)
    monkeypatch.setattr(hub.Backbone, "from_preset", lambda name: backbone)
    monkeypatch.setattr(hub.ImageClassifierPreprocessor, "from_preset", lambda name: preprocessor)
    images, labels = example["digits"](24)
    given = {"images": images, "labels": labels, "val": (images, labels), "keras": keras}
    given |= {"FrozenBackbone": FrozenBackbone, "UnfreezeAtConvergence": UnfreezeAtConvergence}
    with pytest.warns(UserWarning, match="still frozen"):
        exec(client_block("keras_hub").replace("epochs=50", "epochs=2"), given)  # noqa: S102
    expected = given["task"].predict(images, verbose=0)
    loaded = keras.models.load_model("digits.keras")
    np.testing.assert_array_equal(loaded.predict(images, verbose=0), expected)


def test_the_switch_looks_as_shown(capsys):
    shown = next(code for _, code in BLOCKS if "UnfreezeAtConvergence unfreezes" in code)
    model = keras.Sequential([FrozenBackbone(keras.layers.Dense(2)), keras.layers.Dense(1)])
    model.compile("adam", "mse", run_eagerly=True)
    x, y = np.ones((4, 2)), np.ones((4, 1))
    callback = UnfreezeAtConvergence(monitor="score", mode="min", fine_tune_patience=3)
    script = Scripted("score", [1, 2, 2, 2, 1])
    model.fit(x, y, epochs=5, callbacks=[script, callback], verbose=2)
    printed = re.sub(r"\d+", "0", capsys.readouterr().out)
    for line in shown.splitlines():
        assert re.sub(r"\d+", "0", line[:16]) in printed
    assert re.sub(r"\d+", "0", shown.splitlines()[0]).replace("val_loss", "score") in printed
