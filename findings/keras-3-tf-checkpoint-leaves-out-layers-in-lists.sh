#!/usr/bin/env bash
# tf.train.Checkpoint of a Keras 3 model leaves out every layer that the model keeps in a list or a dict.
#
# Keras 3 does its own tracking, and TensorFlow does not see into its lists and dicts. A model of a class of
# one's own with `self.blocks = [...]` is saved without the blocks: no error and no warning. Restoring it leaves
# them as they were, and assert_consumed() and assert_existing_objects_matched() pass. tf.keras 2 saves them,
# and so does Keras 3 itself (save_weights). With BatchNorm the running statistics are lost as the weights are.
#
# Versions: keras 3.15.1, tf-keras 2.21.0, tensorflow-cpu 2.21.0. Found 29 November 2026.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  keras==3.15.1 tf-keras==2.21.0 tensorflow-cpu==2.21.0
cat >"$folder/save.py" <<'PYTHON'
import sys

import keras
import numpy as np
import tensorflow as tf
import tf_keras

print("keras", keras.__version__, "tf_keras", tf_keras.__version__, "tensorflow", tf.__version__)


def restored(library, path: str) -> float:
    class Network(library.Model):
        def __init__(self) -> None:
            super().__init__()
            self.first = library.layers.BatchNormalization()
            self.blocks = [library.layers.BatchNormalization()]

        def call(self, x, training=None):
            return self.blocks[0](self.first(x, training=training), training=training)

    network = Network()
    network(np.ones((2, 3), "f4"))
    mean = network.blocks[0].moving_mean
    mean.assign([7.0, 7.0, 7.0])
    tf.train.Checkpoint(network).write(path)
    mean.assign([0.0, 0.0, 0.0])
    status = tf.train.Checkpoint(network).read(path)
    status.assert_consumed()
    status.assert_existing_objects_matched()
    keys = sorted(key for key, _ in tf.train.list_variables(path) if "moving_mean" in key)
    print(f"{library.__name__}: running mean 7 was saved and {mean.numpy()[0]:.0f} came back; in the file: {keys}")
    return float(mean.numpy()[0])


assert restored(keras, sys.argv[1] + "/keras_3") == 0, "the behaviour has changed"
assert restored(tf_keras, sys.argv[1] + "/keras_2") == 7, "the behaviour has changed"
PYTHON
KERAS_BACKEND=tensorflow TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" -W ignore "$folder/save.py" "$folder"
