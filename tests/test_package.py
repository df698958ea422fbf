"""What holds for the package as a whole."""

import re
from importlib import metadata
from pathlib import Path

import keras_tl

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "keras_tl").rglob("*.py"))


def test_public_names_are_importable_from_the_top():
    assert {"FrozenBackbone", "UnfreezeAtConvergence"} <= set(keras_tl.__all__)
    assert all(hasattr(keras_tl, name) for name in keras_tl.__all__)


def test_version_is_written_once():
    assert metadata.version("keras_tl") == keras_tl.__version__
    literal = re.escape(keras_tl.__version__)
    written = [
        p.name for p in [*SOURCES, ROOT / "pyproject.toml"] if re.search(literal, p.read_text())
    ]
    assert written == ["version.py"]


def sources_with(pattern):
    return {path for path in SOURCES if re.search(pattern, path.read_text(), flags=re.MULTILINE)}


def test_only_internals_names_a_backend_or_imports_from_inside_keras():
    inside = r"keras\.src|^\s*(?:import|from) (?:jax|torch)\b|backend\.backend\(\)"
    assert {path.parent.name for path in sources_with(inside)} == {"internals"}


def test_only_internals_and_features_which_are_tf_data_import_tensorflow():
    touching = sources_with(r"^\s*(?:import|from) tensorflow\b")
    assert {path.parent.name for path in touching} == {"internals", "features"}


def test_public_docstrings_have_an_example():
    for name in set(keras_tl.__all__) - {"__version__"}:
        assert ">>> " in getattr(keras_tl, name).__doc__, name
