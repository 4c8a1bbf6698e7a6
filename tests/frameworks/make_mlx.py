"""Files of MLX and tinygrad, for tests/checkpoints/formats/test_named_arrays.py.

    python3.11 -m venv /tmp/v && /tmp/v/bin/pip install mlx==0.32.4 mlx-cpu==0.32.4 tinygrad==0.14.0 numpy
    DEV=PYTHON /tmp/v/bin/python -m tests.frameworks.make_mlx

Neither marks its files, and both mean what PyTorch means, so they are read as PyTorch's.
"""

import json
import struct

import mlx.core as mx
import numpy as np
from mlx import nn
from tinygrad import Tensor
from tinygrad import nn as tiny
from tinygrad.helpers import Context

from tests.frameworks import ten_steps
from tests.frameworks.recorded import FILES, layer, probe, write

PLACE = FILES / "mlx"


def said(name, norm, output, read):
    return layer(
        name,
        mean=read(norm.running_mean),
        var=read(norm.running_var),
        weight=read(norm.weight) if getattr(norm, "weight", None) is not None else None,
        bias=read(norm.bias) if getattr(norm, "bias", None) is not None else None,
        eps=norm.eps,
        momentum=norm.momentum,
        eps_in_file=False,
        momentum_in_file=False,
        output=output,
    )


def write_safetensors(path, arrays):
    """As tinygrad.nn.state.safe_save does, which itself needs a compiler (clang)."""
    header, position = {}, 0
    for name, array in arrays.items():
        kind = {"float32": "F32", "int64": "I64", "int32": "I32"}[array.dtype.name]
        place = [position, position + array.nbytes]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": place}
        position += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(map(np.ndarray.tobytes, arrays.values())))


def record_ten_steps_of_mlx():
    net = nn.Sequential(nn.BatchNorm(3, momentum=0.125, eps=0.01), nn.BatchNorm(5, momentum=0.25, eps=0.02))
    layers = [("layers.0", net.layers[0], ten_steps.IMAGES), ("layers.1", net.layers[1], ten_steps.FEATURES)]
    net.train()

    def train(steps):
        for step in steps:
            for _, norm, shape in layers:
                mx.eval(norm(mx.array(ten_steps.channels_last(ten_steps.batch(step, shape)))))

    train(ten_steps.BEFORE)
    net.save_weights(str(ten_steps.FOLDER / "mlx.safetensors"))
    train(ten_steps.AFTER)
    told = [
        ten_steps.layer(
            name, shape, mean=norm.running_mean, var=norm.running_var, momentum=norm.momentum, eps=norm.eps
        )
        for name, norm, shape in layers
    ]
    ten_steps.write("mlx", "mlx.safetensors", told)


def record_ten_steps_of_tinygrad():
    norms = {"images": tiny.BatchNorm(3, momentum=0.125, eps=0.01)}
    norms["features"] = tiny.BatchNorm(5, momentum=0.25, eps=0.02)
    shapes = {"images": ten_steps.IMAGES, "features": ten_steps.FEATURES}

    def train(steps):
        with Context(TRAINING=1):
            for step in steps:
                for name, norm in norms.items():
                    norm(Tensor(ten_steps.batch(step, shapes[name]))).realize()
                    Tensor.realize(*tiny.state.get_parameters(norm))

    train(ten_steps.BEFORE)
    arrays = {name: tensor.numpy() for name, tensor in tiny.state.get_state_dict(norms).items()}
    write_safetensors(ten_steps.FOLDER / "tinygrad.safetensors", arrays)
    train(ten_steps.AFTER)
    told = [
        ten_steps.layer(
            name, shapes[name], mean=norm.running_mean.numpy(), var=norm.running_var.numpy(),
            momentum=norm.momentum, eps=norm.eps,
        )
        for name, norm in norms.items()
    ]  # fmt: skip
    ten_steps.write("tinygrad", "tinygrad.safetensors", told)


def main():
    PLACE.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    files = {}
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm(4), nn.ReLU(), nn.BatchNorm(4, affine=False, eps=1e-3))
    net.layers[1].weight = mx.array(np.linspace(0.5, 2, 4, dtype="f4"))
    net.train()
    for _ in range(3):
        net(mx.array(rng.normal(1, 2, (8, 3)).astype("f4")))
    net.eval()
    layers = [
        said(
            name, net.layers[int(name[-1])], np.array(net.layers[int(name[-1])](mx.array(probe(4)))), np.array
        )
        for name in ("layers.1", "layers.3")
    ]
    for file in ("mlx.safetensors", "mlx.npz"):
        net.save_weights(str(PLACE / file))
        files[file] = {"framework": "PyTorch", "layers": layers, "notes": []}

    class Net:
        def __init__(self):
            self.first = tiny.BatchNorm(3)
            self.second = tiny.BatchNorm(3, affine=False, eps=1e-3)

    own = Net()
    own.first.weight = Tensor(np.linspace(0.5, 2, 3, dtype="f4"))
    with Context(TRAINING=1):
        for _ in range(3):
            x = Tensor(rng.normal(1, 2, (8, 3, 2, 2)).astype("f4"))
            own.second(own.first(x)).realize()
            Tensor.realize(*tiny.state.get_parameters(own))
    x = Tensor(probe(3)[:, :, None, None])
    layers = [
        said(name, norm, norm(x).numpy(), lambda array: array.numpy())
        for name, norm in (("first", own.first), ("second", own.second))
    ]
    arrays = {name: tensor.numpy() for name, tensor in tiny.state.get_state_dict(own).items()}
    write_safetensors(PLACE / "tinygrad.safetensors", arrays)
    files["tinygrad.safetensors"] = {"framework": "PyTorch", "layers": layers, "notes": []}
    write("mlx", files)
    ten_steps.FOLDER.mkdir(parents=True, exist_ok=True)
    record_ten_steps_of_mlx()
    record_ten_steps_of_tinygrad()


if __name__ == "__main__":
    main()
