#!/usr/bin/env bash
# An OpenVINO model that asks for float32 in its runtime_options is computed in bfloat16 where the CPU can.
#
# save_model and read_model keep rt_info/runtime_options/INFERENCE_PRECISION_HINT, and compile_model pays no
# heed to it: on CPUs with AVX-512-bf16 or AMX it takes bfloat16, whose outputs have two or three digits, also of
# a file that holds float32. Only the setting that is given to compile_model counts.
#
# Versions: openvino 2026.4.1. Found 30 November 2026.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check openvino==2026.4.1
cat >"$folder/precision.py" <<'PYTHON'
import sys

import numpy as np
import openvino as ov
import openvino.opset13 as ops

random = np.random.default_rng(0)
images = random.normal(size=(1, 64, 8, 8)).astype("f4")
kernel = ops.constant(random.normal(size=(64, 64, 3, 3)).astype("f4"))
given = ops.parameter([1, 64, 8, 8], np.float32)
model = ov.Model([ops.convolution(given, kernel, [1, 1], [1, 1], [1, 1], [1, 1])], [given])
way = ["runtime_options", "INFERENCE_PRECISION_HINT"]
model.set_rt_info("f32", way)
path = sys.argv[1] + "/model.xml"
ov.save_model(model, path, compress_to_fp16=False)

core = ov.Core()
read = core.read_model(path)
assert read.get_rt_info(way).value == "f32", "the behaviour has changed"
if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
    print("openvino", ov.__version__, "- this CPU is slow at bfloat16, so that nothing is to be seen here")
    sys.exit()
taken = core.compile_model(read, "CPU")
plain = core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
right, found = plain(images)[0].copy(), taken(images)[0].copy()
error = float(np.abs(found - right).max() / np.abs(right).max())
hint = taken.get_property("INFERENCE_PRECISION_HINT").to_string()
print("openvino", ov.__version__, f"- the file asks for f32, {hint} is taken; largest difference {error:.2g}")
assert hint == "bf16" and error > 1e-4, "the behaviour has changed"
PYTHON
"$folder/venv/bin/python" "$folder/precision.py" "$folder"
