"""Builds the API reference from the docstrings: `python .ci/api_reference/build.py build/api`."""

import inspect
import pathlib
import re
import sys

import keras
import pdoc

import keras_tl


def name_keras_classes():
    """Has signatures name Keras' classes as users do, and not by the files that they are in."""
    schedules = keras.optimizers.schedules
    for module in (keras.callbacks, keras.metrics, keras.optimizers, schedules, keras):
        for name, one in vars(module).items():
            if inspect.isclass(one) and one.__name__ == name:
                one.__module__ = module.__name__


def faults(page):
    """Returns what is wrong with a page: links that lead nowhere, and names inside Keras."""
    targets = set(re.findall(r'\bid="([^"]+)"', page))
    links = set(re.findall(r'href="#([^"]+)"', page)) - targets
    text = re.sub(r'<div class="pdoc-code codehilite">.*?</div>', "", page, flags=re.DOTALL)
    inside = set(re.findall(r"keras\.src[\w.]*", re.sub(r"<[^>]+>", "", text)))
    return sorted(links | inside)


def main():
    folder = pathlib.Path(sys.argv[1])
    name_keras_classes()
    pdoc.render.configure(docformat="google", template_directory=pathlib.Path(__file__).parent)
    pdoc.pdoc(keras_tl.__name__, "!keras_tl.", output_directory=folder)
    found = faults((folder / "keras_tl.html").read_text())
    if found:
        sys.exit(f"Mend in the docstrings what the API reference cannot link or name: {found}")


if __name__ == "__main__":
    main()
