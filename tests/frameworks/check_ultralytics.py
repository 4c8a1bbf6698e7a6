"""A file of the real Ultralytics, read by bncli without it. Outside the suite and outside CI.

    python3 -m venv /tmp/yolo && /tmp/yolo/bin/pip install ultralytics==8.4.190 torch==2.13.0 .
    /tmp/yolo/bin/python -m tests.frameworks.check_ultralytics

The network is built from its description (nothing is downloaded) and sees a few batches in training mode.
What bncli reads in a process of its own, where Ultralytics cannot be imported, has to be what they hold.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ |= {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}

import torch
from torch import nn

from bncli.torchvision_compat import import_torchvision

READ = """
import json, sys
sys.modules["ultralytics"] = None
from bncli.checkpoints import open_checkpoint
with open_checkpoint(sys.argv[1]) as checkpoint:
    layers = checkpoint.layers()
leaves = ("running_mean", "running_var", "weight", "bias")
print(json.dumps({
    layer.name: [layer.eps, layer.momentum, *(getattr(layer, leaf).double().tolist() for leaf in leaves)]
    for layer in layers
}))
"""


def main() -> None:
    import_torchvision()  # before Ultralytics does: beside a CPU-only torch it lacks operators
    import ultralytics

    torch.manual_seed(0)
    model = ultralytics.YOLO("yolo11n.yaml")
    model.model.train()
    for _ in range(3):
        model.model(torch.rand(2, 3, 64, 64))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "best.pt"
        model.save(path)
        said = subprocess.run([sys.executable, "-c", READ, path], check=True, capture_output=True, text=True)
    found = json.loads(said.stdout)
    half = model.model.half()  # as Ultralytics saves it
    own = {name: part for name, part in half.named_modules() if isinstance(part, nn.BatchNorm2d)}
    assert list(found) == list(own), "other layers, or another order"
    for name, part in own.items():
        numbers = (part.running_mean, part.running_var, part.weight, part.bias)
        expected = [part.eps, part.momentum, *(tensor.double().tolist() for tensor in numbers)]
        assert found[name] == expected, name
    print(f"ultralytics {ultralytics.__version__}: {len(own)} layers, the same in every bit")


if __name__ == "__main__":
    main()
