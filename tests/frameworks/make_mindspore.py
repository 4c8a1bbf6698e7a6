"""Checkpoints of MindSpore, for tests/checkpoints/formats/test_named_arrays.py.

python3.11 -m venv /tmp/v && /tmp/v/bin/pip install mindspore==2.10.0 "numpy<2"
/tmp/v/bin/python -m tests.frameworks.make_mindspore
"""

import mindspore as ms
import numpy as np
from mindspore import nn

from tests.frameworks import ten_steps
from tests.frameworks.recorded import FILES, layer, probe, write

PLACE = FILES / "mindspore"


def record_ten_steps():
    net = nn.SequentialCell(
        nn.BatchNorm2d(3, momentum=0.875, eps=0.01), nn.Flatten(), nn.Dense(12, 5),
        nn.BatchNorm1d(5, momentum=0.75, eps=0.02),
    )  # fmt: skip
    layers = [("0", net[0], ten_steps.IMAGES, 0.125), ("3", net[3], ten_steps.FEATURES, 0.25)]
    net.set_train()

    def train(steps):
        for step in steps:
            for _, norm, shape, _ in layers:
                norm(ms.Tensor(ten_steps.batch(step, shape)))

    train(ten_steps.BEFORE)
    ten_steps.FOLDER.mkdir(parents=True, exist_ok=True)
    ms.save_checkpoint(net, str(ten_steps.FOLDER / "mindspore.ckpt"))
    train(ten_steps.AFTER)
    told = [
        ten_steps.layer(
            name, shape, mean=norm.moving_mean.asnumpy(), var=norm.moving_variance.asnumpy(),
            momentum=momentum, eps=norm.eps,
        )
        for name, norm, shape, momentum in layers
    ]  # fmt: skip
    ten_steps.write("mindspore", "mindspore.ckpt", told)


def main():
    PLACE.mkdir(parents=True, exist_ok=True)
    ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU")
    np.random.seed(0)
    net = nn.SequentialCell(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.BatchNorm2d(4, affine=False, momentum=0.8, eps=1e-3), nn.Flatten(), nn.Dense(256, 5),
        nn.BatchNorm1d(5),
    )  # fmt: skip
    net[1].gamma.set_data(ms.Tensor(np.linspace(0.5, 2, 4).astype("f4")))
    net.set_train()
    for _ in range(3):
        net(ms.Tensor(np.random.normal(1, 2, (4, 3, 8, 8)).astype("f4")))
    net.set_train(False)
    layers = []
    for name in ("1", "3", "6"):
        norm = net[int(name)]
        x = probe(norm.num_features)
        four = x if name == "6" else x[:, :, None, None]
        layers.append(
            layer(
                name,
                mean=norm.moving_mean.asnumpy(),
                var=norm.moving_variance.asnumpy(),
                weight=norm.gamma.asnumpy(),
                bias=norm.beta.asnumpy(),
                eps=norm.eps,
                momentum=round(1 - (1 - norm.momentum if norm.momentum < 0.5 else norm.momentum), 12),
                eps_in_file=False,
                momentum_in_file=False,
                output=norm(ms.Tensor(four)).asnumpy(),
            )
        )
    files = {}
    for file, options in (
        ("net.ckpt", {}),
        ("checked.ckpt", {"crc_check": True}),
        ("net.safetensors", {"format": "safetensors"}),
    ):
        ms.save_checkpoint(net, str(PLACE / file), **options)
        files[file] = {"framework": "MindSpore", "layers": layers, "notes": []}
    write("mindspore", files)
    record_ten_steps()


if __name__ == "__main__":
    main()
