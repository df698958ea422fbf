"""Every example runs in its small form, and shows what it is there to show."""

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import keras
import pytest

FOLDER = Path(__file__).parent.parent / "examples"
GUIDE = FOLDER / "guide"
# `digits.py` and `multi_host.py` have no smaller form: the README's command and the tests of
# distribution run them.
SHOWS = {
    "cached_features": r"features: [\d.]+ s \(\d+x\)(.|\n)*stages of the epochs: \[0, 0, 1, 1\]",
    "cats_vs_dogs": r"unfreezes \"xception\"(.|\n)*They are BatchNorm(.|\n)*on test: 0\.\d+",
    "custom_training_loop": r"2 layers join\n(.|\n)*bit for bit\naccuracy on held-out",
    "extract_with_ray": r"first worker died: \[0\]\n(.|\n)*of all workers: 3",
    "gradual_unfreezing": r"by hand\n(.|\n)*: block1_conv\n(.|\n)*, backbone_3 9e-05 to 0\.001\)",
    "keras_hub_task": r"unfreezes \"(.|\n)*predictions equal bit for bit: True",
    "keras_hub_text": r"stages \[0, 0, 1.*\n(.|\n)*stages \[0, 0, 1, 1, 2, 2\]",
    "resume": r"killed after 3 steps\n(.|\n)*after epoch 5, in stage 1(.|\n)*equal, bit for bit",
    "text": r"\| head only \| +0\.\d+ \|.*\n\| keras_tl  \| +0\.\d+ \|",
}
NEED_SKLEARN = ("custom_training_loop", "first_run", "gradual_unfreezing", "keras_hub_task")


# What each guide says at its end.
GUIDES = {
    "beside_other_tools": r"stages 0, 0, 1, 1\n(.|\n)*Each of them sees one `fit`",
    "by_hand": r"with_keras_tl: 3 lines(.|\n)*stages: \[0, 1\]\n.*equal, bit for bit",
    "coming_from_elsewhere": r"All 9 did here what they do there",
    "first_run": r"waits: val_loss(.|\n)*unfreezes \"digits\"(.|\n)*on held-out digits: 0\.\d+",
    "groups_and_rates": r"interpolated, 0\.5(.|\n)*three ways to come to a rate",
    "hub_tasks": r"Tasks train in stages as they are",
    "keras_guide": r"and 0 \(FrozenBackbone\)\n(.|\n)*The guide's cells hold with keras_tl",
    "recorded_features": r"another backbone: (.|\n)*refused: (.|\n)*and through the backbone",
    "resuming": r"Interrupted(.|\n)*nothing is trained(.|\n)*the same weights, bit for bit",
    "several_devices": r"stages \[0, 0, 1, 1\]",
    "unfreezing_in_stages": r"frozen again block2_dense(.|\n)*schedules went to JSON and back",
    "what_stays_frozen": r"1 weight that must not change(.|\n)*stale compile(.|\n)*bit for bit",
}
NO_NAMES = {"keras_tl", "examples", "tests", *sys.stdlib_module_names}


def run(name, *arguments, folder):
    command = [sys.executable, str(FOLDER / f"{name}.py"), *arguments]
    path = os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        timeout=300,
        check=False,
    )


def test_no_example_is_left_out():
    names = {path.stem for path in FOLDER.glob("*.py")}
    assert names == {*SHOWS, "digits", "efficientnet_lite", "multi_host"}
    assert {path.stem for path in GUIDE.glob("*.py")} == set(GUIDES)


def test_the_page_of_examples_names_each():
    page = (FOLDER / "README.md").read_text()
    listed = re.findall(r"^\| `(\w+)\.py` \|", page, flags=re.MULTILINE)
    assert sorted(listed) == sorted(path.stem for path in FOLDER.rglob("*.py"))


def test_no_example_hides_a_module():
    # `python examples/text.py` looks for modules in `examples` first.
    for path in FOLDER.rglob("*.py"):
        assert path.stem not in NO_NAMES
        assert importlib.util.find_spec(path.stem) is None, path


@pytest.mark.slow
@pytest.mark.parametrize("name", GUIDES)
def test_a_guide_shows_what_it_says(name, tmp_path):
    if name in NEED_SKLEARN:
        pytest.importorskip("sklearn")
    if name == "hub_tasks":
        pytest.importorskip("keras_hub")
    done = run(f"guide/{name}", "--small", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(GUIDES[name], done.stdout), done.stdout[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWS)
def test_runs_in_its_small_form(name, tmp_path):
    if name in NEED_SKLEARN:
        pytest.importorskip("sklearn")
    if name.startswith("keras_hub"):
        pytest.importorskip("keras_hub")
    if name == "extract_with_ray":
        pytest.importorskip("ray")
    if name == "custom_training_loop" and keras.backend.backend() != "tensorflow":
        pytest.skip("The training loop is TensorFlow's.")
    done = run(name, "--small", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(SHOWS[name], done.stdout), done.stdout[-2000:]


@pytest.mark.slow
def test_pictures_of_gradual_unfreezing(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    done = run("gradual_unfreezing", "--small", "--pictures", ".", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list(tmp_path.glob("*.png"))) == 6


@pytest.mark.slow
def test_a_folder_without_cats_and_dogs_is_said_to_be_none(tmp_path):
    done = run("cats_vs_dogs", "--data-dir", ".", folder=tmp_path)
    assert done.returncode == 1
    assert "must have two folders, Cat and Dog" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--data-dir", "--weights"])
def test_without_a_network_it_says_what_to_fetch_and_where_to_pass_it(
    option, tmp_path, monkeypatch
):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # Where nobody answers.
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    (tmp_path / "pictures").mkdir()
    runpy.run_path(str(FOLDER / "cats_vs_dogs.py"))["draw_pictures"](tmp_path / "pictures")
    given = [] if option == "--data-dir" else ["--data-dir", "pictures"]
    done = run("cats_vs_dogs", *given, folder=tmp_path)
    url = r"https://download\S+\.zip" if option == "--data-dir" else r"https://storage\S+\.h5"
    assert done.returncode == 1
    assert re.search(rf"Fetch\n  {url}\n.*: {option} \S+\n$", done.stderr, re.DOTALL)


@pytest.mark.slow
def test_pictures_of_the_user_stay_where_they_are(tmp_path):
    example = runpy.run_path(str(FOLDER / "cats_vs_dogs.py"))
    example["draw_pictures"](tmp_path, count=10)
    for number in range(20):
        (tmp_path / "Dog" / f"broken{number}.jpg").touch()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.jpg")}
    parts = example["load"](tmp_path, size=71, batch_size=4)
    shown = [len(images) for part in parts for images, _ in part]
    assert 0 < sum(shown) < 24, "24 files of 41, some of which are broken, are asked for"
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.jpg")} == before
