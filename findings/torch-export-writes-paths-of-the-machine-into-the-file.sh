#!/usr/bin/env bash
# Files of torch.export.save and of the ONNX exporter hold the absolute paths of the code they were made from.
#
# Every node keeps the stack trace of the line that made it, with the folder in which that code lay (home
# directories and user names among it) and the line itself. A file that is given away tells them. Without them:
# remove node.meta["stack_trace"] of the exported program before it is saved, and the metadata_props
# pkg.torch.onnx.stack_trace and pkg.torch.onnx.fx_node of the ONNX nodes.
#
# Versions: torch 2.13.0, onnx 1.23.2, onnxscript 0.7.2. Found 30 November 2026.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy onnx==1.23.2 onnxscript==0.7.2
mkdir "$folder/home-of-somebody"
cat >"$folder/home-of-somebody/export.py" <<'PYTHON'
import io
import sys
import zipfile

import torch

print("torch", torch.__version__)
place = b"home-of-somebody"


class Network(torch.nn.Module):
    def forward(self, x):
        return x.relu() + 1


program = torch.export.export(Network(), (torch.ones(2),))
memory = io.BytesIO()
torch.export.save(program, memory)
with zipfile.ZipFile(memory) as archive:
    told = [name for name in archive.namelist() if place in archive.read(name)]
print("torch.export.save:", told)
path = sys.argv[1] + "/network.onnx"
torch.onnx.export(program, dynamo=True, verbose=False).save(path)
with open(path, "rb") as file:
    number = file.read().count(place)
print("ONNX:", number, "times")
assert told and number, "the behaviour has changed"
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/home-of-somebody/export.py" "$folder"
