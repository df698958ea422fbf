"""What holds for the package as a whole."""

import doctest
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


# What users do not make themselves, and what in an example makes it.
MADE_BY = {
    "MemoryReport": "memory_report",
    "TrainableReport": "trainable_report",
    "Transition": ".transitions",
}


def example_of(one):
    """Returns what doctest runs of the section `Example:`."""
    section = re.search(r"\n *Example:\n\n(.*?)(?=\n *[A-Z]\w+:\n|\Z)", one.__doc__, re.DOTALL)
    return doctest.DocTestParser().get_examples(section[1]) if section else []


@pytest.mark.parametrize("one", PUBLIC, ids=lambda one: one.__name__)
def test_public_docstrings_have_an_example_that_runs(one):
    lines = example_of(one)
    shown = MADE_BY.get(one.__name__, one.__name__)
    assert any(shown in line.source + line.want for line in lines)
    assert not any(line.options.get(doctest.SKIP) for line in lines)


@pytest.mark.parametrize(
    "error",
    [one for one in PUBLIC if inspect.isclass(one) and issubclass(one, Exception)],
    ids=lambda one: one.__name__,
)
def test_the_example_of_an_error_shows_when_it_is_raised(error):
    caught = f"except {error.__name__}"
    lines = example_of(error)
    assert any(caught in line.source or error.__name__ in (line.exc_msg or "") for line in lines)


def test_examples_of_docstrings_are_run_with_the_tests(request):
    assert "--doctest-modules" in request.config.getini("addopts")
    assert "keras_tl" in request.config.getini("testpaths")


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
