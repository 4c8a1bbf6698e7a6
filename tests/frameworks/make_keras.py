"""Make the files of Keras 3 that the tests read, with Keras' own answers. Outside the suite and outside CI.

    python3 -m venv /tmp/keras && /tmp/keras/bin/pip install keras==3.15.1 tensorflow-cpu==2.21.0 h5py==3.14.0
    /tmp/keras/bin/python -m tests.frameworks.make_keras

Writes tests/frameworks/files/keras/{files.zip,answers.json}. Every file has the layers of one network; in the
answers are its arrays, momentum and epsilon, and what Keras computes with each layer in eval mode.
"""

import json
import os
import shutil
import tempfile
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import h5py
import keras
import numpy as np
import tensorflow as tf

from tests.frameworks.keras_corpus import ALL, BARE, NAMED, Corpus, input_of, make_corpus

TARGET = Path(__file__).parent / "files" / "keras"
L = keras.layers


@keras.saving.register_keras_serializable("corpus")
class MyBatchNorm(L.BatchNormalization):
    """A class of somebody's."""


@keras.saving.register_keras_serializable("corpus")
class Block(L.Layer):
    """A layer that holds one under an attribute."""

    bn: Any

    def build(self, shape: Any) -> None:
        self.bn.build(shape)

    def call(self, x: Any, training: Any = None) -> Any:
        return self.bn(x, training=training)


def flat(corpus: Corpus) -> None:
    model = keras.Sequential([keras.Input((4, 4, 3)), L.Conv2D(2, 3, name="conv")], name="flat")
    for index in range(12):  # so that _10 and _2 are there
        model.add(corpus.bn(f"norm{index}", momentum=0.9 - 0.01 * index, epsilon=0.01 + 0.01 * index))
    model.add(L.Flatten())
    model.add(corpus.bn("no_beta", center=False))
    model.add(corpus.bn("no_gamma", scale=False))
    model.add(corpus.bn("bare", center=False, scale=False))
    model.add(corpus.bn("renormed", renorm=True, renorm_momentum=0.5))
    model.add(L.Normalization(mean=[1.0] * 8, variance=[2.0] * 8))  # a look-alike
    corpus.finish("flat")
    corpus.write("flat", "flat.keras", model.save, **ALL)
    corpus.write("flat", "flat_folder", lambda path: model.save(path, zipped=False), **ALL)
    weights = {"ordered": True, "named": True, "configured": False}
    weights["ambiguous"] = True  # of center=False and scale=False
    corpus.write("flat", "flat.weights.h5", model.save_weights, **weights)
    corpus.write(
        "flat", "sharded/flat.weights.json",
        lambda path: model.save_weights(path, max_shard_size=2.4e-7), **weights,
    )  # fmt: skip
    corpus.write("flat", "flat.h5", model.save, **ALL)
    corpus.write(
        "flat", "compressed.weights.h5",
        lambda path: compress(corpus.folder / "flat.weights.h5", path), **weights,
    )  # fmt: skip


def compress(source: Path, target: Path) -> None:
    """What h5repack would do."""
    with h5py.File(source) as old, h5py.File(target, "w") as new:

        def copy(name: str, node: Any) -> None:
            if isinstance(node, h5py.Dataset):
                options = {"compression": "gzip", "shuffle": True, "fletcher32": True} if node.shape else {}
                made = new.create_dataset(name, data=node[()], **options)
            else:
                made = new.require_group(name)
            for key, value in node.attrs.items():
                made.attrs[key] = value

        old.visititems(copy)


def nested(corpus: Corpus) -> None:
    image = keras.Input((4, 4, 3))
    x = corpus.bn("first", epsilon=0.02)(L.Conv2D(2, 1, name="zconv")(image))
    inner = keras.Sequential(
        [keras.Input((4, 4, 2)), L.Conv2D(2, 1, name="c"), corpus.bn("bn", momentum=0.8)], name="inner"
    )
    x = inner(x)
    inside = keras.Input((4, 4, 2))
    block = keras.Model(inside, corpus.bn("bn", momentum=0.7)(L.Conv2D(2, 1, name="c")(inside)), name="block")
    x = block(block(x))  # used twice, stored once
    shared = corpus.bn("axis_first", axis=1, momentum=0.6)
    x = shared(shared(x))
    x = L.Dense(2)(L.Flatten()(x))
    model = keras.Model(image, corpus.bn("a_last")(x), name="nested")
    model.compile("adam", "mse")
    model.fit(np.ones((4, 4, 4, 3)), np.ones((4, 2)), verbose=0)
    corpus.finish("nested")
    corpus.write("nested", "nested.keras", model.save, **ALL)
    corpus.write("nested", "nested.weights.h5", model.save_weights, **BARE)
    corpus.write("nested", "nested.h5", model.save, **ALL)
    corpus.write("nested", "nested_export", lambda path: model.export(path, verbose=False), **NAMED)
    corpus.write(
        "nested",
        "nested_saved/variables/variables.index",
        lambda path: tf.saved_model.save(model, path.parent.parent),
        **NAMED,
    )
    (corpus.folder / "nested_saved" / "saved_model.pb").unlink()  # only large
    corpus.write(
        "nested", "checkpoints/ck-1.index",
        lambda path: tf.train.Checkpoint(model=model).save(path.parent / "ck"), **NAMED,
    )  # fmt: skip


def wrapped(corpus: Corpus) -> None:
    sequence = keras.Input((3, 4))
    x = L.TimeDistributed(corpus.bn("inside_time", epsilon=0.03), name="td")(sequence)
    block = Block(name="blk")
    block.bn = corpus.bn("bn", epsilon=0.04)
    x = block(x)
    x = corpus.bn("own_class", MyBatchNorm, epsilon=0.05)(x)
    model = keras.Model(sequence, x, name="wrapped")
    corpus.finish("wrapped")
    corpus.write("wrapped", "wrapped.keras", model.save, ordered=True, named=True, configured=False)
    corpus.write("wrapped", "wrapped.weights.h5", model.save_weights, **BARE)
    corpus.write("wrapped", "wrapped.h5", model.save, ordered=True, named=True, configured=False)
    corpus.write(
        "wrapped",
        "wrapped_ck/w.index",
        lambda path: tf.train.Checkpoint(model).write(path.with_suffix("")),
        **NAMED,
    )


def subclassed(corpus: Corpus) -> None:
    class Net(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.bn1, self.norm1, self._private = corpus.bn("x"), corpus.bn("y"), corpus.bn("z")
            self.blocks = [corpus.bn("l0"), corpus.bn("l1")]
            self.d = {"one": corpus.bn("d0"), "two": corpus.bn("d1")}
            self.zz = self.bn1

        def call(self, x: Any, training: Any = None) -> Any:
            for layer in (self.bn1, self.norm1, self._private, *self.blocks, *self.d.values()):
                x = layer(x, training=training)
            return x

    model = Net()
    model(np.ones((2, 3), "f4"))
    corpus.finish("subclassed")
    corpus.write("subclassed", "subclassed.keras", model.save, **BARE)
    corpus.write("subclassed", "subclassed.weights.h5", model.save_weights, **BARE)
    corpus.write(
        "subclassed",
        "subclassed_ck/s.index",
        lambda path: tf.train.Checkpoint(model).write(path.with_suffix("")),
        **BARE,
        only=["x", "y", "z"],  # Keras 3 leaves out of it what a list or a dict holds
    )
    corpus.write(
        "subclassed", "subclassed_export/variables/variables.index",
        lambda path: model.export(path.parent.parent, verbose=False), **BARE,
    )  # fmt: skip
    (corpus.folder / "subclassed_export" / "saved_model.pb").unlink()  # only large


def low_precision(corpus: Corpus, policy: str) -> None:
    keras.config.set_dtype_policy(policy)
    model = keras.Sequential([keras.Input((5,)), L.Dense(3), corpus.bn("low", momentum=0.9)], name=policy)
    corpus.finish(policy)
    keras.config.set_dtype_policy("float32")
    corpus.write(policy, f"{policy}.keras", model.save, **ALL)
    corpus.write(policy, f"{policy}.weights.h5", model.save_weights, **NAMED)
    corpus.write(policy, f"{policy}.h5", model.save, **ALL)
    corpus.write(
        policy,
        f"{policy}_ck/p.index",
        lambda path: tf.train.Checkpoint(model).write(path.with_suffix("")),
        **NAMED,
    )


def long_names(corpus: Corpus) -> None:
    inner = keras.Sequential([keras.Input((2,))], name="inner")
    for index in range(21):
        inner.add(corpus.bn(f"{'long_' * 160}{index}"))
    model = keras.Sequential([keras.Input((2,)), inner], name="long")
    corpus.finish("long")
    corpus.write("long", "long.h5", model.save, **ALL)


def not_of_keras(corpus: Corpus) -> None:
    with h5py.File(corpus.folder / "other.h5", "w") as file:
        file["scans/one"] = np.arange(6.0)
    hostile(corpus.folder / "hostile")


def hostile(folder: Path) -> None:
    """What Keras never writes: arrays that claim more than the file has, groups in circles, other files."""
    folder.mkdir()
    names = [f"layers/batch_normalization/vars/{index}" for index in range(4)]
    with h5py.File(folder / "giant.weights.h5", "w") as file:
        for name in names:
            file.create_dataset(name, (2**45,), "f4", chunks=(1024,))
    with h5py.File(folder / "bomb.weights.h5", "w") as file:
        for layer in range(2):
            for index in range(4):
                name = f"layers/batch_normalization_{layer}/vars/{index}"
                file.create_dataset(
                    name, data=np.zeros(5_000_000, "f4"), compression="gzip", compression_opts=9
                )
    with h5py.File(folder / "circle.weights.h5", "w") as file:
        for name in names:
            file[name] = np.ones(2, "f4")
        file["layers/again"] = file["layers"]
        file["layers/batch_normalization/top"] = file["/"]
    with h5py.File(folder / "laughs.weights.h5", "w") as file:  # 2^40 paths to one group
        below = file.create_group("end")
        for level in range(40):
            group = file.create_group(f"level{level}")
            group["left"] = group["right"] = below
            below = group
    with h5py.File(folder / "external.weights.h5", "w") as file:
        file.create_group("layers")
        file["layers/batch_normalization"] = h5py.ExternalLink(
            "beside.weights.h5", "/layers/batch_normalization"
        )
    shutil.copy(folder.parent / "bfloat16.weights.h5", folder / "beside.weights.h5")
    with h5py.File(folder / "elsewhere.weights.h5", "w") as file:
        for name in names:
            file.create_dataset(name, (4,), "f4", external=[("beside.weights.h5", 0, 16)])


def whole_networks(target: Path) -> None:
    """A ResNet as Keras applications make it, with few channels, and a network with all kinds of kernels."""
    from keras.src.applications import resnet

    def stages(x: Any) -> Any:
        x = resnet.stack_residual_blocks_v1(x, 2, 2, stride1=1, name="conv2")
        return resnet.stack_residual_blocks_v1(x, 3, 2, name="conv3")

    small = resnet.ResNet(
        stages, preact=False, use_bias=True, name="resnet", weights_name="small", input_shape=(32, 32, 3),
        classes=5, weights=None, classifier_activation=None,
    )  # fmt: skip
    mixed = keras.Sequential(
        [
            keras.Input((28, 28, 3)), L.Conv2D(4, 25, name="c"), L.BatchNormalization(name="n"), L.ReLU(),
            L.DepthwiseConv2D(2, depth_multiplier=2, name="d"), L.ReLU(),
            L.Conv2DTranspose(3, 2, use_bias=False, name="t"), L.BatchNormalization(name="m"), L.Flatten(),
            L.BatchNormalization(name="flat"), L.Dense(7, name="first"), L.ReLU(), L.Dense(2, name="last"),
        ],
        name="mixed",
    )  # fmt: skip
    image = keras.Input((8, 8, 3))  # halved three times, each with other zeros around it than PyTorch has
    x = L.Conv2D(4, 3, strides=2, padding="same", use_bias=False, name="same")(image)
    x = L.ReLU()(L.BatchNormalization(name="first")(x))
    x = L.ZeroPadding2D(((0, 1), (0, 1)), name="zeros")(x)
    x = L.DepthwiseConv2D(3, strides=2, use_bias=False, name="depthwise")(x)
    x = L.ReLU()(L.BatchNormalization(name="second")(x))
    x = L.Conv2D(5, 3, padding="same", name="alike")(x)
    halved = keras.Model(image, L.Dense(2, name="last")(L.GlobalAveragePooling2D()(x)), name="halved")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    generator, answers = np.random.default_rng(0), {}
    for model in (small, mixed, halved):
        for variable in model.weights:  # few different numbers, which compress well
            low, high = (2, 12) if variable.name in ("gamma", "moving_variance") else (-6, 7)
            variable.assign(generator.integers(low, high, variable.shape) / 8)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.keras"
            model.save(path)
            with zipfile.ZipFile(path) as old, zipfile.ZipFile(target / f"{model.name}.keras", "w") as new:
                for entry in old.infolist():
                    packed = zipfile.ZipInfo(entry.filename)
                    packed.compress_type = zipfile.ZIP_DEFLATED
                    new.writestr(packed, old.read(entry))
        shape = (2, *model.input_shape[1:])
        answers[model.name] = {
            "shape": shape,
            "output": np.asarray(model(input_of(shape), training=False)).tolist(),
            "variables": {
                f"{layer.name}/{variable.name}": list(variable.shape)
                for layer in model.layers
                for variable in layer.weights
            },
        }
    (target / "answers.json").write_text(json.dumps(answers) + "\n")


def main() -> None:
    low = [partial(low_precision, policy=policy) for policy in ("bfloat16", "float16")]
    make_corpus(keras, TARGET, (flat, nested, wrapped, subclassed, long_names, *low, not_of_keras))
    whole_networks(TARGET.parent / "keras_networks")


if __name__ == "__main__":
    main()
