"""Prepares the processes that run tests.

The one that hands tests out to the others, with `-n`, imports neither Keras nor a backend: the
others would wait for it.
"""

import os
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
# There are as many processes as cores, and arrays are tiny: to hand an operation to another thread
# takes longer than to run it.
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")

# On JAX, tests compile the same small programs over and over: the processes of a run share them.
# A folder of the run's own, as another version of JAX would compile something else.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="keras_tl_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# Programs that import what may not be installed. There are no examples in them to run.
collect_ignore = ["benchmarks/peers/lightning_way.py", "features/distributed_process.py"]


def pytest_configure(config):
    """Adds what tests share, in a process that runs tests."""
    hands_out = config.getoption("numprocesses", None) and not hasattr(config, "workerinput")
    if not hands_out:
        config.pluginmanager.import_plugin("tests.shared")
