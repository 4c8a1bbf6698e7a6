#!/usr/bin/env bash
# OpenVINO on a CPU computes convolution, max pooling, GELU as convolution, GELU, max pooling.
#
# That is right for activations that never fall (ReLU). GELU, SiLU, Hardswish, Mish and the absolute value do:
# there the largest input of a window does not give the largest output. No setting was found that prevents it,
# neither INFERENCE_PRECISION_HINT=f32 nor EXECUTION_MODE_HINT=ACCURACY. A pooling with two readers is left
# alone, so the maximum of the pooled values and themselves, put between, gives the right outputs.
#
# Versions: openvino 2026.4.1. Found 30 November 2026.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check openvino==2026.4.1
cat >"$folder/pooling.py" <<'PYTHON'
import numpy as np
import openvino as ov
import openvino.opset13 as ops

print("openvino", ov.__version__)
random = np.random.default_rng(0)
images = random.normal(size=(1, 3, 16, 16)).astype("f4") * 3
kernel = random.normal(size=(4, 3, 3, 3)).astype("f4")


def computed(activation, apart: bool) -> np.ndarray:
    """What the CPU plugin makes of convolution, pooling and activation."""
    given = ops.parameter([1, 3, 16, 16], np.float32)
    x = ops.convolution(given, ops.constant(kernel), [1, 1], [1, 1], [1, 1], [1, 1])
    x = ops.max_pool(x, [2, 2], [1, 1], [0, 0], [0, 0], [2, 2]).output(0)
    x = ops.maximum(x, x) if apart else x
    model = ov.Model([activation(x) if activation else x], [given])
    settings = {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY"}
    return ov.Core().compile_model(model, "CPU", settings)(images)[0].copy()


pooled = computed(None, apart=False)
sigmoid = 1 / (1 + np.exp(-pooled))
for name, activation, right in (
    ("ReLU", ops.relu, np.maximum(pooled, 0)),
    ("SiLU", ops.swish, pooled * sigmoid),
    ("Hardswish", ops.hswish, pooled * np.clip(pooled + 3, 0, 6) / 6),
    ("absolute value", ops.abs, np.abs(pooled)),
    ("GELU (tanh)", lambda x: ops.gelu(x, "tanh"),
     pooled * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (pooled + 0.044715 * pooled**3)))),
):
    wrong = float(np.abs(computed(activation, apart=False) - right).max())
    mended = float(np.abs(computed(activation, apart=True) - right).max())
    print(f"{name}: largest error {wrong:.2g}; with the maximum between {mended:.2g}")
    assert mended < 1e-4, "the behaviour has changed"
    assert (wrong < 1e-4) == (name == "ReLU"), "the behaviour has changed"
PYTHON
"$folder/venv/bin/python" "$folder/pooling.py"
