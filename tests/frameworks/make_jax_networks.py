"""Make small ResNets of Flax that the tests read, and convert whole ones of Flax and Haiku to torchvision's.

Outside the suite and outside CI.

    python3 -m venv /tmp/jax
    /tmp/jax/bin/pip install jax==0.10.2 flax==0.12.8 dm-haiku==0.0.17 msgpack . torchvision
    /tmp/jax/bin/python -m tests.frameworks.make_jax_networks

Haiku's is its own; Flax' has the layers and names of the ImageNet example in Flax' repository, and once more
as an nnx module with torchvision's names. They get random numbers, and then PyTorch computes the same images.
What has to be set is done as the command says it: padding, of convolutions and of max pooling.
"""

import json
import pickle
import shutil
import tempfile
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen, nnx, serialization
from torch import nn

from bncli.cli.app import main as bncli
from bncli.models import build_network
from tests.frameworks.keras_corpus import input_of
from tests.frameworks.recorded import FILES

BETWEEN = {
    "scale": (0.5, 1.5), "offset": (-0.3, 0.3), "bias": (-0.3, 0.3), "mean": (-0.3, 0.3), "var": (0.5, 2),
}  # fmt: skip
SHAPE = (2, 224, 224, 3)
Norm = partial(linen.BatchNorm, use_running_average=True)
Conv = partial(linen.Conv, use_bias=False)


class ResNetBlock(linen.Module):
    """Two or three convolutions beside a shortcut; the name of its class is that of its layers."""

    width: int
    strides: int
    shapes: tuple[tuple[int, int], ...] = (
        (1, 3),
        (1, 3),
    )  # of each convolution: channels, side of its kernel
    halves: int = 0  # which of them has the strides

    @linen.compact
    def __call__(self, x: Any) -> Any:
        y = x
        for index, (times, side) in enumerate(self.shapes):
            strides = self.strides if index == self.halves else 1
            y = Norm()(Conv(times * self.width, (side, side), strides)(y))
            y = linen.relu(y) if index + 1 < len(self.shapes) else y
        if x.shape != y.shape:
            x = Conv(y.shape[-1], (1, 1), self.strides, name="conv_proj")(x)
            x = Norm(name="norm_proj")(x)
        return linen.relu(x + y)


class BottleneckResNetBlock(ResNetBlock):
    """With a narrow convolution in the middle."""

    shapes: tuple[tuple[int, int], ...] = ((1, 1), (1, 3), (4, 1))
    halves: int = 1


class ResNet(linen.Module):
    """The whole network."""

    block: Any
    sizes: tuple[int, ...]
    widths: tuple[int, ...] = (64, 128, 256, 512)
    classes: int = 1000

    @linen.compact
    def __call__(self, x: Any) -> Any:
        x = Conv(64, (7, 7), 2, padding=((3, 3), (3, 3)), name="conv_init")(x)
        x = linen.relu(Norm(name="bn_init")(x))
        x = linen.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, size in enumerate(self.sizes):
            for number in range(size):
                x = self.block(self.widths[stage], 2 if stage and not number else 1)(x)
        return linen.Dense(self.classes)(x.mean((1, 2)))


class Bottleneck(nnx.Module):
    """Torchvision's block in nnx, with its names and its padding."""

    def __init__(self, inputs: int, width: int, stride: int, rngs: nnx.Rngs) -> None:
        conv = partial(nnx.Conv, use_bias=False, rngs=rngs)
        norm = partial(nnx.BatchNorm, use_running_average=True, rngs=rngs)
        self.conv1, self.bn1 = conv(inputs, width, (1, 1)), norm(width)
        self.conv2 = conv(width, width, (3, 3), strides=stride, padding=((1, 1), (1, 1)))
        self.bn2 = norm(width)
        self.conv3, self.bn3 = conv(width, 4 * width, (1, 1)), norm(4 * width)
        if stride > 1 or inputs != 4 * width:
            parts = [conv(inputs, 4 * width, (1, 1), strides=stride), norm(4 * width)]
            self.downsample = nnx.List(parts)

    def __call__(self, x: Any) -> Any:
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = nnx.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        for part in self.downsample if hasattr(self, "downsample") else ():
            x = part(x)
        return nnx.relu(x + y)


class ResNetOfNnx(nnx.Module):
    """Torchvision's ResNet-50 in nnx, or one with fewer blocks and channels."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        sizes: tuple[int, ...] = (3, 4, 6, 3),
        widths: tuple[int, ...] = (64, 128, 256, 512),
        classes: int = 1000,
    ) -> None:
        self.stages = len(sizes)
        self.conv1 = nnx.Conv(3, 64, (7, 7), strides=2, padding=((3, 3), (3, 3)), use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(64, use_running_average=True, rngs=rngs)
        inputs = 64
        for stage, (size, width) in enumerate(zip(sizes, widths, strict=True)):
            blocks = []
            for number in range(size):
                blocks.append(Bottleneck(inputs, width, 2 if stage and not number else 1, rngs))
                inputs = 4 * width
            setattr(self, f"layer{stage + 1}", nnx.List(blocks))
        self.fc = nnx.Linear(inputs, classes, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = nnx.relu(self.bn1(self.conv1(x)))
        x = nnx.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage in range(1, self.stages + 1):
            for block in getattr(self, f"layer{stage}"):
                x = block(x)
        return self.fc(x.mean((1, 2)))


def filled(tree: Any, generator: np.random.Generator, above: str = "") -> Any:
    """Random numbers in place of all arrays, variances above 0; Haiku's averages lie below `mean_ema`."""
    if hasattr(tree, "items"):
        return {key: filled(part, generator, f"{above}/{key}") for key, part in tree.items()}
    if np.issubdtype(tree.dtype, np.integer):
        return jnp.full(tree.shape, 100, tree.dtype)
    leaf = above.rpartition("/")[2]
    role = next((role for role in ("mean", "var") if f"{role}_ema" in above), leaf)
    return jnp.asarray(generator.uniform(*BETWEEN.get(role, (-0.05, 0.05)), tree.shape), "float32")


def pads_alike(network: Any, *, first: bool) -> None:
    """Set what the command says: padding as JAX's 'SAME', in convolutions and in max pooling."""
    for layer in (network.layer2, network.layer3, network.layer4):
        for name in ("conv1", "conv2"):
            conv = getattr(layer[0], name)
            if conv.kernel_size == (3, 3) and conv.stride == (2, 2):
                conv.padding = (0, 0)
                setattr(layer[0], name, nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), conv))
    if first:
        network.conv1.padding = (0, 0)
        network.conv1 = nn.Sequential(nn.ZeroPad2d((2, 3, 2, 3)), network.conv1)
    network.maxpool = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(3, 2))


def check(path: Path, name: str, images: np.ndarray, expected: Any, *, pads: bool, first: bool) -> None:
    """Convert, load and compute."""
    target = path.with_suffix(".pt")
    assert bncli(["convert", str(path), "-o", str(target), "--model", f"torchvision:{name}"]) == 0
    network = build_network(f"torchvision:{name}", {}).eval()
    network.load_state_dict(torch.load(target, weights_only=True), strict=True)
    given = torch.from_numpy(images).permute(0, 3, 1, 2)

    def off() -> float:
        with torch.no_grad():
            found = network(given).numpy()
        return float(np.abs(found - expected).max() / np.abs(expected).max())

    before = off()
    if pads:
        pads_alike(network, first=first)
        print(f"{path.name}: outputs differ by {before:.1e} of the largest before padding is set")
        assert before > 1e-5
    print(f"{path.name}: outputs differ by {off():.1e} of the largest")
    assert off() < 1e-5


def coarse(tree: Any) -> Any:
    """Few different numbers, which compress well, and statistics that stay above 0."""
    return jax.tree.map(lambda leaf: np.asarray(jnp.round(leaf * 16) / 16 + (leaf > 0.4) / 16), tree)


def record(generator: np.random.Generator) -> None:
    """The same with two stages and few channels, with what they compute, in files/jax_networks."""
    target = FILES / "jax_networks"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    small: dict[str, Any] = {"sizes": (2, 2), "widths": (2, 3), "classes": 5}
    shape = (2, 32, 32, 3)
    images = input_of(shape)
    linen_model = ResNet(BottleneckResNetBlock, **small)
    variables = coarse(filled(jax.eval_shape(linen_model.init, jax.random.key(0), images), generator))
    nnx_model = ResNetOfNnx(nnx.Rngs(0), **small)
    graph, state = nnx.split(nnx_model)
    pure = coarse(filled(nnx.to_pure_dict(state), generator))
    nnx.replace_by_pure_dict(state, pure)
    files = {
        "linen.msgpack": (serialization.to_bytes(variables), linen_model.apply(variables, images)),
        "nnx.msgpack": (serialization.msgpack_serialize(pure), nnx.merge(graph, state)(images)),
    }
    with zipfile.ZipFile(target / "files.zip", "w", zipfile.ZIP_LZMA) as archive:
        for name, (content, _) in files.items():
            entry = zipfile.ZipInfo(name)
            entry.compress_type = zipfile.ZIP_LZMA
            archive.writestr(entry, content)
    answers = {
        name: {"shape": shape, "output": np.asarray(output).tolist()} for name, (_, output) in files.items()
    }
    (target / "answers.json").write_text(json.dumps(answers) + "\n")


def main() -> None:
    """Flax' (linen and nnx) and Haiku's."""
    jax.config.update("jax_default_matmul_precision", "highest")
    record(np.random.default_rng(1))
    generator = np.random.default_rng(0)
    images = generator.normal(size=SHAPE).astype("f4")
    with tempfile.TemporaryDirectory() as folder:
        for name, block, sizes in (
            ("resnet50", BottleneckResNetBlock, (3, 4, 6, 3)),
            ("resnet18", ResNetBlock, (2, 2, 2, 2)),
        ):
            model = ResNet(block, sizes)
            variables = filled(jax.eval_shape(model.init, jax.random.key(0), images), generator)
            path = Path(folder) / f"flax-{name}.msgpack"
            path.write_bytes(serialization.to_bytes(variables))
            check(path, name, images, np.asarray(model.apply(variables, images)), pads=True, first=False)
        for name, kind in (("resnet50", hk.nets.ResNet50), ("resnet18", hk.nets.ResNet18)):

            def run(x: Any, training: bool, kind: Any = kind) -> Any:
                return kind(1000, bn_config={"eps": 1e-5, "decay_rate": 0.9})(x, training)

            both = hk.without_apply_rng(hk.transform_with_state(run))
            init = partial(both.init, training=True)
            shapes = jax.eval_shape(init, jax.random.key(0), images)
            parameters, state = (filled(tree, generator) for tree in shapes)
            path = Path(folder) / f"haiku-{name}.pkl"
            arrays = [jax.tree.map(np.asarray, tree) for tree in (parameters, state)]
            path.write_bytes(pickle.dumps({"params": arrays[0], "state": arrays[1]}))
            output, _ = both.apply(parameters, state, images, False)
            check(path, name, images, np.asarray(output), pads=True, first=True)
        model = ResNetOfNnx(nnx.Rngs(0))
        graph, state = nnx.split(model)
        pure = filled(nnx.to_pure_dict(state), generator)
        nnx.replace_by_pure_dict(state, pure)
        path = Path(folder) / "nnx-resnet50.msgpack"
        path.write_bytes(serialization.msgpack_serialize(jax.tree.map(np.asarray, pure)))
        output = nnx.merge(graph, state)(images)
        check(path, "resnet50", images, np.asarray(output), pads=False, first=False)


if __name__ == "__main__":
    main()
