"""What holds for the package as a whole."""

import inspect
import re
from importlib import metadata
from pathlib import Path

import pytest

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


PUBLIC = [getattr(keras_tl, name) for name in keras_tl.__all__ if name != "__version__"]


@pytest.mark.parametrize("one", PUBLIC, ids=lambda one: one.__name__)
def test_public_docstrings_have_an_example(one):
    assert ">>> " in one.__doc__


def own_functions():
    """The public functions, and methods that are not Keras' own names."""
    for one in PUBLIC:
        if inspect.isfunction(one):
            yield one
        elif inspect.isclass(one):
            keras_names = {name for base in one.__mro__[1:] for name in vars(base)}
            names = set(vars(one)) - keras_names
            functions = (getattr(one, name) for name in sorted(names) if name[0] != "_")
            yield from (function for function in functions if inspect.isroutine(function))


@pytest.mark.parametrize("function", own_functions(), ids=lambda function: function.__qualname__)
def test_public_docstrings_say_what_is_taken_and_returned(function):
    signature = inspect.signature(function)
    taken = set(signature.parameters) - {"self"}
    assert ("Args:" in function.__doc__) == bool(taken)
    assert ("Returns:" in function.__doc__) == (signature.return_annotation != "None")
    described = re.findall(r"^ +\**(\w+): ", function.__doc__, flags=re.MULTILINE)
    assert taken <= set(described)
