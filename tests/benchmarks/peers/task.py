"""What all ways train: data, network and rates, without any framework.

Each way runs in a process of its own, which gives back what `measured` says as a line of JSON.
"""

import dataclasses
import itertools
import json
import time

import numpy as np

CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Task:
    """A run: epochs of the head on a frozen backbone, then as many of the whole network.

    The backbone is convolutions of 3x3 with ReLU and without padding, then an average over what is
    left of the image; the head is a dense layer.
    """

    samples: int = 1024
    size: int = 96
    batch: int = 32
    epochs: int = 3
    # Filters and stride of each convolution.
    convolutions: tuple = ((32, 2), (32, 1), (64, 2), (64, 1), (128, 2), (128, 1), (128, 1))
    head_rate: float = 1e-3
    backbone_rate: float = 1e-5

    def data(self):
        """Returns random images, channels last, and their classes."""
        random = np.random.default_rng(0)
        images = random.normal(size=(self.samples, self.size, self.size, 3)).astype("float32")
        return images, random.integers(0, CLASSES, self.samples)

    def trained_each_epoch(self):
        """Returns how many numbers are to train in each epoch."""
        filters = [3, *(count for count, _ in self.convolutions)]
        head = (filters[-1] + 1) * CLASSES
        backbone = sum((9 * taken + 1) * given for taken, given in itertools.pairwise(filters))
        return [head] * self.epochs + [head + backbone] * self.epochs


def measured(way, task):
    """Returns the seconds, by the clock and of the processor, and what trained in each epoch."""
    images, labels = task.data()
    start, cpu = time.perf_counter(), time.process_time()
    trained = way(task, images, labels)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {"seconds": seconds, "cpu": cpu, "trained": trained}


def print_measured(way):
    print(json.dumps(measured(way, Task())), flush=True)
