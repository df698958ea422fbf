"""Many short fits in one process leak neither memory nor threads."""

import gc
import os
import pathlib
import subprocess
import sys
import tempfile
import threading

import keras
import pytest

from keras_tl import FreezeGuard, FrozenBackbone, UnfreezeAtConvergence
from tests import models
from tests.shared import regression_data

FITS, WARM = 200, 20


def resident():
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main():
    """Prints how much memory has grown since the first fits, as a ratio, and by how many threads.

    Eagerly, and with FreezeGuard only if asked: TensorFlow itself keeps some of each function that
    it compiles, four megabytes of the step of a plain `fit` and a twentieth of one of a guard.
    """
    guards = [FreezeGuard(verbose=0)] if "guard" in sys.argv else []
    folder = tempfile.mkdtemp()
    x, y = regression_data()
    for number in range(FITS):
        keras.utils.clear_session()
        wrapper = FrozenBackbone(models.functional(["dense", "batchnorm", "dense"]))
        model = models.functional_outer(wrapper, [keras.layers.Dropout(0.3)])
        model.compile("adam", "mse", run_eagerly=True)
        switch = UnfreezeAtConvergence(
            1e-3,
            head_learning_rate=1e-3,
            max_frozen_epochs=1,
            warmup_steps=1,
            backup_dir=folder,
            verbose=0,
        )
        fit = {"validation_data": (x, y), "callbacks": [switch, *guards], "verbose": 0}
        model.fit(x, y, batch_size=8, epochs=2, **fit)
        gc.collect()
        if number == WARM:
            first = resident(), threading.active_count()
    print(resident() / first[0], threading.active_count() - first[1])


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/statm").exists(), reason="asks Linux")
def test_two_hundred_fits():
    result = subprocess.run(
        [sys.executable, "-m", "tests.test_leaks"], capture_output=True, text=True, check=True
    )
    ratio, threads = result.stdout.split()[-2:]
    print(f"memory grew to {ratio}, threads by {threads}")
    assert float(ratio) < 1.02
    assert int(threads) == 0


if __name__ == "__main__":
    main()
