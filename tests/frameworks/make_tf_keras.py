"""Make the files of tf.keras 2 and TensorFlow 1 that the tests read. Outside the suite and outside CI.

    python3 -m venv /tmp/keras
    /tmp/keras/bin/pip install keras==3.15.1 tensorflow-cpu==2.21.0 tf-keras==2.21.0 h5py==3.14.0
    /tmp/keras/bin/python -m tests.frameworks.make_tf_keras

Writes tests/frameworks/files/tf_keras/{files.zip,answers.json}, as make_keras does for Keras 3.
"""

import os
import shutil
from pathlib import Path
from typing import Any

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["TF_USE_LEGACY_KERAS"] = "1"

import numpy as np
import tensorflow as tf
import tf_keras as keras
from tensorflow.core.protobuf import saved_model_pb2
from tf_keras.protobuf import saved_metadata_pb2
from tf_keras.src.legacy_tf_layers.normalization import batch_normalization

from tests.frameworks import ten_steps
from tests.frameworks.keras_corpus import ALL, BARE, NAMED, Corpus, make_corpus, numbers

TARGET = Path(__file__).parent / "files" / "tf_keras"
L = keras.layers


def flat(corpus: Corpus) -> None:
    model = keras.Sequential([keras.Input((4, 4, 3)), L.Conv2D(2, 3, name="conv")], name="flat")
    for index in range(11):
        model.add(corpus.bn(f"norm{index}", momentum=0.9 - 0.01 * index, epsilon=0.01 + 0.01 * index))
    model.add(corpus.bn("virtual", virtual_batch_size=2))
    model.add(corpus.bn("axes", axis=[1, 3]))
    model.add(L.Flatten())
    model.add(corpus.bn("no_beta", center=False))
    model.add(corpus.bn("no_gamma", scale=False))
    model.add(corpus.bn("bare", center=False, scale=False))
    model.add(corpus.bn("renormed", renorm=True, renorm_momentum=0.5))
    corpus.finish("flat")
    corpus.write("flat", "flat.keras", model.save, **ALL)
    weights = {"ordered": True, "named": False, "configured": False, "ambiguous": True}
    corpus.write("flat", "flat.weights.h5", model.save_weights, **weights)
    corpus.write("flat", "flat.h5", model.save, **ALL)
    corpus.write("flat", "flat_weights_only.h5", model.save_weights, **NAMED)
    corpus.write(
        "flat", "flat_tf/w.index", lambda path: model.save_weights(str(path.with_suffix(""))), **NAMED
    )  # fmt: skip


def nested(corpus: Corpus) -> None:
    image = keras.Input((4, 4, 3))
    x = corpus.bn("first", epsilon=0.02)(L.Conv2D(2, 1, name="zconv")(image))
    inner = keras.Sequential(
        [keras.Input((4, 4, 2)), L.Conv2D(2, 1, name="c"), corpus.bn("inner_bn", momentum=0.8)], name="inner"
    )
    x = inner(x)
    x = corpus.bn("a_last", epsilon=0.03)(L.Dense(2)(L.Flatten()(x)))
    model = keras.Model(image, x, name="nested")
    model.compile("adam", "mse")
    model.fit(np.ones((4, 4, 4, 3)), np.ones((4, 2)), verbose=0)
    corpus.finish("nested")
    corpus.write("nested", "nested.keras", model.save, **ALL)
    corpus.write("nested", "nested.weights.h5", model.save_weights, **BARE)
    corpus.write("nested", "nested.h5", model.save, **ALL)
    corpus.write("nested", "nested_weights_only.h5", model.save_weights, **NAMED)
    corpus.write("nested", "nested_saved", lambda path: model.save(path, save_format="tf"), **ALL)
    corpus.write(
        "nested", "nested_saved_2020", lambda path: as_in_2020(path.parent / "nested_saved", path), **ALL
    )
    corpus.write(
        "nested",
        "nested_export/variables/variables.index",
        lambda path: model.export(path.parent.parent),
        **NAMED,
    )
    (corpus.folder / "nested_export" / "saved_model.pb").unlink()  # only large
    checkpoint = tf.train.Checkpoint(model=model)
    corpus.write(
        "nested", "checkpoints/ck-1.index", lambda path: checkpoint.save(path.parent / "ck"), **NAMED
    )


def as_in_2020(source: Path, target: Path) -> None:
    """A SavedModel as TensorFlow 2.0 to 2.4 wrote it: Keras' words are in saved_model.pb itself."""
    shutil.copytree(source, target)
    model = saved_model_pb2.SavedModel.FromString((source / "saved_model.pb").read_bytes())
    words = saved_metadata_pb2.SavedMetadata.FromString((source / "keras_metadata.pb").read_bytes())
    graph = model.meta_graphs[0]
    for node in words.nodes:
        graph.object_graph_def.nodes[node.node_id].user_object.metadata = node.metadata
    for part in ("graph_def", "collection_def", "signature_def"):  # only large
        graph.ClearField(part)
    graph.object_graph_def.ClearField("concrete_functions")
    (target / "saved_model.pb").write_bytes(model.SerializeToString())
    (target / "keras_metadata.pb").unlink()


def wrapped(corpus: Corpus) -> None:
    sequence = keras.Input((3, 4))
    x = L.TimeDistributed(corpus.bn("inside_time", epsilon=0.03), name="td")(sequence)
    x = corpus.bn("plain", epsilon=0.05)(x)
    model = keras.Model(sequence, x, name="wrapped")
    corpus.finish("wrapped")
    corpus.write("wrapped", "wrapped.keras", model.save, **ALL)
    corpus.write("wrapped", "wrapped.h5", model.save, ordered=True, named=False, configured=True)
    corpus.write("wrapped", "wrapped.weights.h5", model.save_weights, **BARE)


def low_precision(corpus: Corpus) -> None:
    """Under these policies tf.keras keeps float32, and Keras 3 does not."""
    keras.mixed_precision.set_global_policy("bfloat16")
    model = keras.Sequential([keras.Input((5,)), L.Dense(3), corpus.bn("low", momentum=0.9)], name="low")
    keras.mixed_precision.set_global_policy("float32")
    for layer in corpus.layers:
        layer.build((None, 3))
    corpus.finish("low")
    corpus.write("low", "low.h5", model.save, **ALL)
    corpus.write("low", "low.weights.h5", model.save_weights, ordered=True, named=False, configured=False)


def tensorflow_1(corpus: Corpus) -> None:
    """Two layers in two files, once in TensorFlow 1's own container and once as a SavedModel of it."""
    v1 = tf.compat.v1
    generator = np.random.default_rng(1)
    with tf.Graph().as_default(), v1.Session() as session:
        image = v1.placeholder(tf.float32, (None, 2, 2, 3))
        x, answers = image, []
        for name, epsilon in (("zz", 0.002), ("block/a_10", 1e-3), ("block/a_2", 1e-5)):
            with v1.variable_scope(name):
                four = {
                    leaf: v1.get_variable(leaf, (3,), use_resource=False)
                    for leaf in ("gamma", "beta", "moving_mean", "moving_variance")
                }
            y, _, _ = v1.nn.fused_batch_norm(
                x, four["gamma"], four["beta"], four["moving_mean"], four["moving_variance"],
                epsilon=epsilon, is_training=False,
            )  # fmt: skip
            answers.append((name, epsilon, four, x, y))
            x = y
        session.run(v1.global_variables_initializer())
        for _, _, four, _, _ in answers:
            for leaf, variable in four.items():
                low, high = (0.1, 3) if leaf == "moving_variance" else (-2, 2)
                session.run(v1.assign(variable, generator.uniform(low, high, 3).astype("f4")))
        layers = []
        for name, epsilon, four, x, y in answers:
            from tests.frameworks.keras_corpus import input_of

            shape = (2, 2, 2, 3)
            layers.append({
                "name": name, "momentum": 0.99, "epsilon": epsilon, "axis": [3], "shape": shape,
                "output": numbers(session.run(y, {x: input_of(shape)})),
                **{leaf: numbers(session.run(variable)) for leaf, variable in four.items()},
            })  # fmt: skip
        corpus.answers["nets"]["v1"] = layers
        named = {"ordered": True, "named": True, "configured": False}
        corpus.write(
            "v1",
            "v1/model.ckpt.index",
            lambda path: v1.train.Saver().save(session, str(path.with_suffix(""))),
            **named,
        )
        one = v1.train.Saver(write_version=v1.train.SaverDef.V1)
        corpus.write("v1", "v1_single/model.ckpt", lambda path: one.save(session, str(path)), **named)
        save = v1.saved_model.simple_save
        corpus.write("v1", "v1_saved", lambda path: save(session, str(path), {"x": image}, {"y": x}), **named)
    with tf.Graph().as_default(), v1.Session(config=v1.ConfigProto(device_count={"CPU": 2})) as session:
        for number, layer in enumerate(corpus.answers["nets"]["v1"]):
            for leaf in ("gamma", "beta", "moving_mean", "moving_variance"):
                # on two devices, so that two files are written
                with tf.device(f"/cpu:{(number + len(leaf)) % 2}"), v1.variable_scope(layer["name"]):
                    v1.get_variable(leaf, initializer=np.array(layer[leaf], "f4"))
        session.run(v1.global_variables_initializer())
        saver = v1.train.Saver(sharded=True)
        corpus.write(
            "v1",
            "v1_sharded/model.ckpt.index",
            lambda path: saver.save(session, str(path.with_suffix(""))),
            **named,
        )
    with tf.Graph().as_default(), v1.Session() as session:
        for layer in corpus.answers["nets"]["v1"]:
            with v1.variable_scope(layer["name"], partitioner=v1.fixed_size_partitioner(2)):
                for leaf in ("gamma", "beta", "moving_mean", "moving_variance"):
                    make = part_of(np.array(layer[leaf], "f4"))
                    v1.get_variable(leaf, (3,), initializer=make)
        session.run(v1.global_variables_initializer())
        corpus.write(
            "v1",
            "v1_divided/model.ckpt.index",
            lambda path: v1.train.Saver().save(session, str(path.with_suffix(""))),
            **named,
        )


def part_of(values: np.ndarray) -> Any:
    """An initializer of a variable that is divided: what belongs into one of its parts."""

    def make(shape: tuple[int, ...], dtype: Any = None, partition_info: Any = None) -> Any:
        (start,) = partition_info.var_offset
        return tf.constant(values[start : start + shape[0]], dtype)

    return make


def record_ten_steps_of_tensorflow_1() -> None:
    """By tf.compat.v1.layers, which TensorFlow keeps in tf_keras."""
    v1, make = tf.compat.v1, batch_normalization
    with tf.Graph().as_default(), v1.Session() as session:
        images = v1.placeholder(tf.float32, (8, 2, 2, 3))
        features = v1.placeholder(tf.float32, (8, 5))
        make(images, momentum=0.875, epsilon=0.01, training=True, name="images")
        make(features, momentum=0.75, epsilon=0.02, training=True, name="features")
        update = v1.get_collection(v1.GraphKeys.UPDATE_OPS)
        session.run(v1.global_variables_initializer())

        def train(steps: range) -> None:
            for step in steps:
                first = ten_steps.channels_last(ten_steps.batch(step, ten_steps.IMAGES))
                session.run(update, {images: first, features: ten_steps.batch(step, ten_steps.FEATURES)})

        train(ten_steps.BEFORE)
        v1.train.Saver().save(session, str(ten_steps.FOLDER / "tensorflow_1"), write_meta_graph=False)
        train(ten_steps.AFTER)
        values = {variable.op.name: session.run(variable) for variable in v1.global_variables()}
    told = [
        ten_steps.layer(
            name, shape, mean=values[f"{name}/moving_mean"], var=values[f"{name}/moving_variance"],
            momentum=momentum, eps=eps,
        )
        for name, shape, momentum, eps in (
            ("images", ten_steps.IMAGES, 0.125, 0.01), ("features", ten_steps.FEATURES, 0.25, 0.02),
        )
    ]  # fmt: skip
    (ten_steps.FOLDER / "checkpoint").unlink()  # which file is the newest
    ten_steps.write("tensorflow_1", "tensorflow_1.index", told)


def main() -> None:
    make_corpus(keras, TARGET, (flat, nested, wrapped, low_precision, tensorflow_1))
    record_ten_steps_of_tensorflow_1()


if __name__ == "__main__":
    main()
