"""What keras_tl touches inside Keras, and what it says where a later Keras has it no more."""

import ast
import importlib
import inspect
import pkgutil
import re
import textwrap
from pathlib import Path

import keras
import pytest

import keras_tl
from keras_tl import FrozenBackbone
from keras_tl.internals import imported, layers, optimizers
from keras_tl.internals.checked import UnsupportedKerasError, checked
from keras_tl.internals.graphs import called_in_inference_mode, operation_of
from keras_tl.internals.layers import set_layer_flag, sublayers
from keras_tl.internals.models import compile_arguments, renew_functions, set_initial_epoch
from keras_tl.stages import switching

SOURCES = sorted(Path(keras_tl.__file__, "..", "internals").resolve().glob("*.py"))


def functions_that_touch_keras(source):
    """Yields functions that read or set a private attribute of anything but their own object."""
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef):
            touched = [
                node.attr
                for node in ast.walk(function)
                if isinstance(node, ast.Attribute)
                and node.attr.startswith("_")
                and not node.attr.startswith("__")
                and not (isinstance(node.value, ast.Name) and node.value.id == "self")
            ]
            if touched:
                yield function, touched


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_each_touch_names_the_versions_it_was_checked_with(path):
    for function, touched in functions_that_touch_keras(path.read_text()):
        decorators = [ast.unparse(decorator) for decorator in function.decorator_list]
        assert "checked(SINCE_3_15)" in decorators, (function.name, touched)


def model():
    wrapper = FrozenBackbone(keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)]))
    model = keras.Sequential([wrapper, keras.layers.Dense(1)])
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    return model


@pytest.mark.parametrize(
    ("touch", "lacking"),
    [
        (lambda: sublayers(object()), "_flatten_layers"),
        (lambda: set_layer_flag(object(), True), "_trainable"),
        (lambda: set_initial_epoch(object(), 1), "_initial_epoch"),
        (lambda: compile_arguments(object()), "_compile_config"),
        (lambda: operation_of(object()), "_keras_history"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_part_that_keras_lacks_is_named_with_the_versions_that_have_it(touch, lacking):
    message = f"Keras {keras.__version__}, which lacks .*'{lacking}'.*3.15.0 to 3.16.0"
    with pytest.raises(UnsupportedKerasError, match=message):
        touch()


def test_a_method_that_keras_calls_no_more_is_not_replaced_in_silence():
    optimizer = model().optimizer
    with pytest.raises(UnsupportedKerasError, match="_method_of_the_past"):
        optimizers._replace(optimizer, "_method_of_the_past", print)
    assert not hasattr(optimizer, "_method_of_the_past")


def test_a_switch_with_a_keras_that_lacks_a_part_leaves_the_model_as_it_was():
    trained = model()
    optimizer = trained.optimizer
    vars(trained).pop("_compile_config")
    lacks = pytest.raises(UnsupportedKerasError, match="_compile_config")
    with lacks, switching.all_or_nothing(trained):
        switching.renew_training(trained, 1e-4)
    assert trained.optimizer is optimizer


def test_an_error_of_the_users_own_model_stays_what_it_is():
    class Broken(keras.Model):
        def make_train_function(self, force=False):
            return self.of_another_class

    broken = Broken()
    broken.compile("adam", "mse")
    with pytest.raises(AttributeError, match="of_another_class"):
        renew_functions(broken, keep_evaluation=False)


def test_an_error_in_a_function_that_a_touch_calls_stays_what_it_is():
    def missing():
        return object().missing

    with pytest.raises(AttributeError, match="missing"):
        checked("3.15.0")(lambda: missing())()
    with pytest.raises(UnsupportedKerasError, match="missing"):
        checked("3.15.0")(missing)()
    with pytest.raises(AttributeError, match="NoneType"):
        checked("3.15.0")(lambda: None.missing)()


def test_importing_with_a_keras_that_lacks_a_module_says_so(monkeypatch):
    monkeypatch.delattr("keras.src.ops.function.Function")
    with pytest.raises(UnsupportedKerasError, match="cannot work with Keras .* 'Function'"):
        importlib.reload(imported)


def classes_of_keras():
    """Yields the classes of keras_tl, outside of internals, that are classes of Keras."""
    for module in pkgutil.walk_packages(keras_tl.__path__, "keras_tl."):
        if ".internals" not in module.name:
            for one in vars(importlib.import_module(module.name)).values():
                if inspect.isclass(one) and one.__module__ == module.name:
                    bases = [base for base in one.__mro__ if base.__module__.startswith("keras.")]
                    if bases:
                        yield one, bases


def test_no_class_reads_a_private_attribute_of_the_keras_class_that_it_is():
    for one, bases in classes_of_keras():
        own = {name for base in one.__mro__ if base not in bases for name in vars(base)}
        text = ast.parse(textwrap.dedent(inspect.getsource(one)))
        used = {
            node.attr
            for node in ast.walk(text)
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
            and re.match("_[^_]", node.attr)
        }
        of_keras = {
            attribute
            for base in bases
            if base.__module__ != "keras.src.saving.keras_saveable"
            for attribute in re.findall(r"self\.(_[a-z]\w*)", inspect.getsource(base))
        }
        assert not (used & of_keras) - own, one


def test_what_is_not_decayed_is_not_forgotten_where_keras_notes_it_elsewhere(monkeypatch):
    monkeypatch.setattr(keras.Optimizer, "exclude_from_weight_decay", lambda self: None)
    with pytest.raises(UnsupportedKerasError, match="_exclude_from_weight_decay"):
        optimizers.copy_weight_decay_exclusions(keras.optimizers.SGD(), keras.optimizers.SGD())


def test_a_call_context_that_keras_keeps_elsewhere_is_missed(monkeypatch):
    monkeypatch.setattr(keras.Layer, "_get_call_context", lambda self: None)
    layers._check_call_context.cache_clear()
    try:
        with pytest.raises(UnsupportedKerasError, match="current_call_ctx"):
            layers.call_context_kept().__enter__()
    finally:
        layers._check_call_context.cache_clear()


def test_a_layer_called_once_in_inference_mode_is_not_always_so():
    always, once = keras.layers.BatchNormalization(), keras.layers.BatchNormalization()
    inputs = keras.Input((4,))
    held = always(once(inputs, training=False), training=False)
    model = keras.Model(inputs, once(always(held, training=False)))
    assert called_in_inference_mode(model) == [always]
