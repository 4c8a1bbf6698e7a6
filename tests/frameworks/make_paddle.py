"""Files of PaddlePaddle, for tests/checkpoints/formats/test_named_arrays.py.

python3.11 -m venv /tmp/v && /tmp/v/bin/pip install paddlepaddle==3.3.1
/tmp/v/bin/python -m tests.frameworks.make_paddle
"""

import os
import subprocess
import sys

import paddle
from paddle import nn

from tests.frameworks import ten_steps
from tests.frameworks.recorded import FILES, layer, probe, write

OLD = "old"
PLACE = FILES / "paddle"


def numbers(tensor):
    return None if tensor is None else tensor.astype("float32").numpy()


def said(net, names, in_file, keys=None):
    found = []
    for name, key in zip(names, keys or names, strict=True):
        norm = net._sub_layers[name]
        x = probe(norm._num_features)
        fresh = nn.BatchNorm1D(norm._num_features, epsilon=norm._epsilon)
        for array in ("weight", "bias", "_mean", "_variance"):
            if getattr(norm, array) is not None:
                getattr(fresh, array).set_value(numbers(getattr(norm, array)))
        fresh.eval()
        found.append(
            layer(
                key,
                mean=numbers(norm._mean),
                var=numbers(norm._variance),
                weight=numbers(norm.weight),
                bias=numbers(norm.bias),
                eps=norm._epsilon,
                momentum=round(1 - norm._momentum, 12),
                eps_in_file=in_file,
                momentum_in_file=in_file,
                output=fresh(paddle.to_tensor(x)).numpy(),
            )
        )
    return found


def record_ten_steps():
    net = nn.Sequential(
        nn.BatchNorm2D(3, momentum=0.875, epsilon=0.01), nn.Flatten(), nn.Linear(12, 5),
        nn.BatchNorm1D(5, momentum=0.75, epsilon=0.02),
    )  # fmt: skip
    layers = [("0", net[0], ten_steps.IMAGES), ("3", net[3], ten_steps.FEATURES)]

    def train(steps):
        for step in steps:
            for _, norm, shape in layers:
                norm(paddle.to_tensor(ten_steps.batch(step, shape)))

    train(ten_steps.BEFORE)
    ten_steps.FOLDER.mkdir(parents=True, exist_ok=True)
    paddle.save(net.state_dict(), str(ten_steps.FOLDER / "paddle.pdparams"))
    train(ten_steps.AFTER)
    told = [
        ten_steps.layer(
            name, shape, mean=numbers(norm._mean), var=numbers(norm._variance),
            momentum=1 - norm._momentum, eps=norm._epsilon,
        )
        for name, norm, shape in layers
    ]  # fmt: skip
    ten_steps.write("paddle", "paddle.pdparams", told)


def network():
    plain = {"weight_attr": False, "bias_attr": False}
    return nn.Sequential(
        nn.Conv2D(3, 4, 3), nn.BatchNorm2D(4), nn.ReLU(),
        nn.BatchNorm2D(4, momentum=0.8, epsilon=1e-3, **plain), nn.Flatten(), nn.Linear(144, 5),
        nn.BatchNorm1D(5),
    )  # fmt: skip


def export(net, name):
    spec = [paddle.static.InputSpec([None, 3, 8, 8], "float32")]
    paddle.jit.save(net, str(PLACE / name), input_spec=spec)


def export_as_before_paddle_3():
    """The same network as .pdmodel, without the paths of the machine that exports it."""
    from paddle.base.proto import framework_pb2

    net = network()
    net.set_state_dict(paddle.load(str(PLACE / "flat4.pdparams")))
    net.eval()
    export(net, "old")
    path, program = PLACE / "old.pdmodel", framework_pb2.ProgramDesc()
    program.ParseFromString(path.read_bytes())
    for block in program.blocks:
        for operation in block.ops:
            kept = [attribute for attribute in operation.attrs if attribute.name != "op_callstack"]
            del operation.attrs[:]
            operation.attrs.extend(kept)
    path.write_bytes(program.SerializeToString())
    (PLACE / "old.pdiparams.info").unlink()


def main():
    PLACE.mkdir(parents=True, exist_ok=True)
    paddle.seed(0)
    net = network()
    optimizer = paddle.optimizer.SGD(0.1, parameters=net.parameters())
    for _ in range(3):
        loss = (net(2 * paddle.randn([4, 3, 8, 8]) + 1) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
    net.eval()
    names = ["1", "3", "6"]
    files = {}

    def note(file, in_file=False, keys=None, *notes):
        layers = said(net, names, in_file, keys)
        files[file] = {"framework": "PaddlePaddle", "layers": layers, "notes": notes}

    for protocol in (2, 4):
        paddle.save(net.state_dict(), str(PLACE / f"flat{protocol}.pdparams"), protocol=protocol)
        note(f"flat{protocol}.pdparams")
    paddle.save({"model": net.state_dict(), "epoch": 3}, str(PLACE / "nested.pdparams"))
    note("nested.pdparams")
    export(net, "net")
    exported = ["batch_norm2d_0", "batch_norm2d_1", "batch_norm1d_0"]
    note("net.pdiparams", True, exported)
    # which of both programs is written is settled when Paddle is imported
    environment = {**os.environ, "FLAGS_enable_pir_api": "0"}
    subprocess.run([sys.executable, "-m", "tests.frameworks.make_paddle", OLD], env=environment, check=True)
    note("old.pdiparams", True, exported)
    net.bfloat16()
    paddle.save(net.state_dict(), str(PLACE / "bfloat16.pdparams"))
    note("bfloat16.pdparams", False, None, "uint16 in it is read as bfloat16")
    write("paddle", files)
    record_ten_steps()


if __name__ == "__main__":
    if sys.argv[1:] == [OLD]:
        export_as_before_paddle_3()
    else:
        main()
