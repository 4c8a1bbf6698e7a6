"""Files of MXNet and Chainer, for tests/checkpoints/formats/test_named_arrays.py.

python3.11 -m venv /tmp/v && /tmp/v/bin/pip install "setuptools<60" wheel "numpy==1.23.5" mxnet==1.9.1
/tmp/v/bin/pip install --no-build-isolation "numpy==1.23.5" chainer==7.8.1
/tmp/v/bin/python -m tests.frameworks.make_mxnet
"""

import chainer
import chainer.links as L
import mxnet as mx
import numpy as np
from mxnet import autograd, gluon, nd

from tests.frameworks import ten_steps
from tests.frameworks.recorded import FILES, layer, probe, write


def said_of_gluon(norm, name, in_file):
    arrays = {
        key: getattr(norm, key).data().asnumpy() for key in ("gamma", "beta", "running_mean", "running_var")
    }
    eps, momentum = norm._kwargs["eps"], norm._kwargs["momentum"]
    return layer(
        name,
        mean=arrays["running_mean"],
        var=arrays["running_var"],
        weight=np.ones_like(arrays["gamma"]) if norm._kwargs["fix_gamma"] else arrays["gamma"],
        bias=arrays["beta"],
        eps=eps,
        momentum=round(1 - momentum, 12),
        eps_in_file=in_file,
        momentum_in_file=in_file,
        output=norm(nd.array(probe(arrays["beta"].size))).asnumpy(),
    )


def of_mxnet():
    norms = [gluon.nn.BatchNorm(), gluon.nn.BatchNorm(scale=False, momentum=0.8, epsilon=1e-3)]
    net = gluon.nn.HybridSequential()
    net.add(gluon.nn.Dense(3), norms[0], gluon.nn.Activation("relu"), gluon.nn.Dense(4), norms[1])
    net.initialize(mx.init.Normal(0.5))
    net.hybridize()
    trainer = gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.1})
    for _ in range(3):
        with autograd.record():
            loss = (net(nd.random.normal(1, 2, (6, 5))) - 1).square().sum()
        loss.backward()
        trainer.step(6)
    place = FILES / "mxnet"
    net.save_parameters(str(place / "gluon.params"))
    net.export(str(place / "net"))
    prefixes = [norm.name + "_fwd" for norm in norms]
    files = {
        "gluon.params": {
            "framework": "MXNet",
            "layers": [said_of_gluon(norm, name, False) for norm, name in zip(norms, "14", strict=True)],
            "notes": [],
        },
        "net-0000.params": {
            "framework": "MXNet",
            "layers": [
                said_of_gluon(norm, p.removesuffix("_fwd"), True)
                for norm, p in zip(norms, prefixes, strict=True)
            ],
            "notes": ["gamma is ignored (fix_gamma)"],
        },
    }
    # the operator by itself: fix_gamma is its default, a gamma of 5 stays in the file and has no effect
    data = mx.sym.Variable("data")
    out = mx.sym.BatchNorm(data, name="bn0")
    arrays = {"bn0_gamma": np.full(3, 5.0), "bn0_beta": np.array([1.0, 2.0, 3.0])}
    means = {"bn0_moving_mean": np.array([0.5, -1.0, 2.0]), "bn0_moving_var": np.array([0.25, 4.0, 1.5])}
    args = {name: nd.array(value) for name, value in arrays.items()}
    aux = {name: nd.array(value) for name, value in means.items()}
    bound = out.bind(mx.cpu(), {"data": nd.array(probe(3)), **args}, aux_states=aux)
    output = bound.forward(is_train=False)[0].asnumpy()
    mx.model.save_checkpoint(str(place / "raw"), 7, out, args, aux)
    files["raw-0007.params"] = {
        "framework": "MXNet",
        "layers": [
            layer(
                "bn0", mean=means["bn0_moving_mean"], var=means["bn0_moving_var"], weight=np.ones(3),
                bias=arrays["bn0_beta"], eps=1e-3, momentum=0.1, output=output,
            )
        ],
        "notes": ["gamma is ignored (fix_gamma)"],
    }  # fmt: skip
    write("mxnet", files)


class Net(chainer.Chain):
    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.conv = L.Convolution2D(3, 4, 3)
            self.bn = L.BatchNormalization(4)
            self.plain = L.BatchNormalization(4, use_gamma=False, use_beta=False, eps=1e-3, decay=0.8)
            self.blocks = chainer.ChainList(L.BatchNormalization(4), L.BatchNormalization(4))

    def __call__(self, x):
        x = self.plain(self.bn(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        return x


def of_chainer():
    net = Net()
    for index, norm in enumerate((net.bn, *net.blocks)):
        norm.gamma.array[...] = np.linspace(0.5, 2, 4) + index
    for _ in range(3):
        net(np.random.normal(1, 2, (4, 3, 8, 8)).astype("f4"))
    files = {}
    for file, save in (("net.npz", np.savez), ("packed.npz", None)):
        chainer.serializers.save_npz(str(FILES / "chainer" / file), net, compression=save is None)
        with chainer.using_config("train", False):
            layers = [
                layer(
                    name,
                    mean=norm.avg_mean,
                    var=norm.avg_var,
                    weight=None if norm.gamma is None else norm.gamma.array,
                    bias=None if norm.beta is None else norm.beta.array,
                    eps=norm.eps,
                    momentum=round(1 - norm.decay, 12),
                    eps_in_file=False,
                    momentum_in_file=False,
                    output=norm(probe(4)).array,
                )
                for name, norm in (
                    ("blocks.0", net.blocks[0]), ("blocks.1", net.blocks[1]),
                    ("bn", net.bn), ("plain", net.plain)
                )
            ]  # fmt: skip
        files[file] = {"framework": "Chainer", "layers": layers, "notes": ["no order of layers"]}
    write("chainer", files)


def record_ten_steps_of_mxnet():
    images = gluon.nn.BatchNorm(momentum=0.875, epsilon=0.01)
    features = gluon.nn.BatchNorm(momentum=0.75, epsilon=0.02)
    layers = [("0", images, ten_steps.IMAGES), ("1", features, ten_steps.FEATURES)]
    net = gluon.nn.HybridSequential()
    net.add(images, features)
    net.initialize()

    def train(steps):
        for step in steps:
            for _, norm, shape in layers:
                with autograd.record():
                    out = norm(nd.array(ten_steps.batch(step, shape))).sum()
                out.backward()  # which is what moves the statistics

    train(ten_steps.BEFORE)
    net.save_parameters(str(ten_steps.FOLDER / "mxnet.params"))
    train(ten_steps.AFTER)
    told = [
        ten_steps.layer(
            name, shape, mean=norm.running_mean.data().asnumpy(), var=norm.running_var.data().asnumpy(),
            momentum=1 - norm._kwargs["momentum"], eps=norm._kwargs["eps"],
        )
        for name, norm, shape in layers
    ]  # fmt: skip
    ten_steps.write("mxnet", "mxnet.params", told)


def record_ten_steps_of_chainer():
    net = chainer.Chain()
    with net.init_scope():
        net.images = L.BatchNormalization(3, decay=0.875, eps=0.01)
        net.features = L.BatchNormalization(5, decay=0.75, eps=0.02)
    layers = [("images", net.images, ten_steps.IMAGES), ("features", net.features, ten_steps.FEATURES)]

    def train(steps):
        for step in steps:
            for _, norm, shape in layers:
                norm(ten_steps.batch(step, shape))

    train(ten_steps.BEFORE)
    chainer.serializers.save_npz(str(ten_steps.FOLDER / "chainer.npz"), net)
    train(ten_steps.AFTER)
    told = [
        ten_steps.layer(
            name, shape, mean=norm.avg_mean, var=norm.avg_var, momentum=1 - norm.decay, eps=norm.eps
        )
        for name, norm, shape in layers
    ]
    ten_steps.write("chainer", "chainer.npz", told)


def main():
    for name in ("mxnet", "chainer", "ten_steps"):
        (FILES / name).mkdir(parents=True, exist_ok=True)
    np.random.seed(0)
    mx.random.seed(0)
    of_mxnet()
    of_chainer()
    record_ten_steps_of_mxnet()
    record_ten_steps_of_chainer()


if __name__ == "__main__":
    main()
