"""What the scripts for Keras 3 and tf_keras share: layers with known statistics, and the framework's answers.

Imports neither: each script hands over its own.
"""

import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.frameworks import ten_steps


def numbers(array: Any) -> list[float]:
    """As float32 prints them: the shortest text of the same number."""
    return [float(str(value)) for value in np.asarray(array, "f4").reshape(-1)]


def input_of(shape: tuple[int, ...]) -> np.ndarray:
    """Numbers that are exact in every type, made again by the test."""
    return ((np.arange(int(np.prod(shape))) * 7 % 23 - 9) / 4).astype("f4").reshape(shape)


def set_statistics(layer: Any, generator: np.random.Generator) -> None:
    """Give each array of a layer other numbers, so that none can be taken for another."""
    for leaf, low, high in (
        ("gamma", 0.5, 2), ("beta", -2, 2), ("moving_mean", -3, 3), ("moving_variance", 0.05, 5),
        ("moving_stddev", 6, 7), ("renorm_mean", 8, 9), ("renorm_stddev", 10, 11),
    ):  # fmt: skip
        variable = getattr(layer, leaf, None)
        if variable is not None:
            variable.assign(generator.uniform(low, high, tuple(variable.shape)).astype("f4"))


def answer(layer: Any) -> dict[str, Any]:
    """What the framework has in a layer, and what it computes with it in eval mode."""
    axis = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
    # with virtual batches tf.keras counts the axis that it inserts for them
    axis = [int(one) - (getattr(layer, "virtual_batch_size", None) is not None) for one in axis]
    features = list(getattr(layer.moving_mean, "shape", ()))
    rank = layer.input_spec.ndim or max(layer.input_spec.axes) + 1
    sizes = dict(layer.input_spec.axes)
    shape = tuple(sizes.get(index, sizes.get(index - rank, 2)) for index in range(rank))
    output = np.asarray(layer(input_of(shape), training=False)).astype("f4")
    arrays = {
        leaf: numbers(value)
        for leaf in ("gamma", "beta", "moving_mean", "moving_variance")
        if (value := getattr(layer, leaf, None)) is not None
    }
    return {
        "name": layer.name, "momentum": layer.momentum, "epsilon": layer.epsilon, "axis": axis,
        "stored_shape": features, "computes_in": layer.compute_dtype, "shape": shape,
        "output": numbers(output), **arrays,
    }  # fmt: skip


class Corpus:
    """Collects the layers of the network that is being made, and what was written."""

    def __init__(self, folder: Path, kind: Any) -> None:
        self.folder, self.kind = folder, kind
        self.layers: list[Any] = []
        self.answers: dict[str, dict[str, Any]] = {"nets": {}, "files": {}}

    def bn(self, name: str, kind: Any = None, **config: Any) -> Any:
        """A layer of the network."""
        self.layers.append((kind or self.kind)(name=name, **config))
        return self.layers[-1]

    def finish(self, net: str) -> None:
        """Give all layers their numbers, and ask Keras for its answers."""
        generator = np.random.default_rng(len(self.answers["nets"]))
        for layer in self.layers:
            set_statistics(layer, generator)
        self.answers["nets"][net] = [answer(layer) for layer in self.layers]
        self.layers = []

    def write(self, net: str, name: str, save: Callable[[Path], Any], **told: Any) -> None:
        """One file or directory; told: whether it tells the order, names and hyperparameters."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path)
        self.answers["files"][name] = {"net": net, **told}


ALL = {"ordered": True, "named": True, "configured": True}
NAMED = {"ordered": True, "named": True, "configured": False}
BARE = {"ordered": False, "named": False, "configured": False}


def make_corpus(keras: Any, target: Path, parts: Sequence[Callable[[Corpus], None]]) -> None:
    """Each part of the files, all of them packed into `target`, and the ten steps of its name."""
    keras.utils.set_random_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        corpus = Corpus(Path(folder), keras.layers.BatchNormalization)
        for make in parts:
            make(corpus)
        pack(corpus.folder, target, corpus.answers)
    record_ten_steps(keras, target.name)


def pack(folder: Path, target: Path, answers: dict[str, Any]) -> None:
    """All files in one archive (HDF5 is mostly zeros), and the answers beside it."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    with zipfile.ZipFile(target / "files.zip", "w", zipfile.ZIP_LZMA) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                # a fixed date: the same files give the same archive
                entry = zipfile.ZipInfo(path.relative_to(folder).as_posix())
                entry.compress_type = zipfile.ZIP_LZMA
                archive.writestr(entry, path.read_bytes())
    (target / "answers.json").write_text(json.dumps(answers, separators=(",", ":")) + "\n")


def record_ten_steps(keras: Any, name: str) -> None:
    """A network of layers of images and of features, and what ten more steps make of them."""
    layers = keras.layers
    images = layers.BatchNormalization(name="images", momentum=0.875, epsilon=0.01)
    features = layers.BatchNormalization(name="features", momentum=0.75, epsilon=0.02)
    renormed = layers.BatchNormalization(name="renormed", momentum=0.75, epsilon=0.02, renorm=True)
    model = keras.Sequential(
        [keras.Input((2, 2, 3)), images, layers.Flatten(), layers.Dense(5), features, renormed],
        name="ten_steps",
    )

    def train(steps: range) -> None:
        for step in steps:
            images(ten_steps.channels_last(ten_steps.batch(step, ten_steps.IMAGES)), training=True)
            for layer in (features, renormed):
                layer(ten_steps.batch(step, ten_steps.FEATURES), training=True)

    ten_steps.FOLDER.mkdir(parents=True, exist_ok=True)
    train(ten_steps.BEFORE)
    model.save(ten_steps.FOLDER / f"{name}.keras")
    train(ten_steps.AFTER)
    told = [
        ten_steps.layer(
            layer.name, shape, mean=layer.moving_mean, var=layer.moving_variance,
            momentum=1 - layer.momentum, eps=layer.epsilon,
        )
        for layer in (images, features, renormed)
        for shape in (ten_steps.IMAGES if layer is images else ten_steps.FEATURES,)
    ]  # fmt: skip
    ten_steps.write(name, f"{name}.keras", told)
