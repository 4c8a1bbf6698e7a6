"""Networks of torchvision, timm and one's own: trained, ruined, and repaired from the command line.

    python -m tests.models.everybodys_networks      prints one row for each, on one thread
    python -m tests.models.everybodys_networks resnet18 dla34 ...     for these alone

Each is trained for some steps on images of a folder; then its running statistics are ruined and it is saved
as people save theirs: in Lightning's form, as safetensors, or wrapped by DataParallel. From then on only the
program is called: `inspect-stats` on the file, `eval --gap` where the network classifies, `recalibrate`.

`exact` is how far the new file's statistics are from what plain hooks see before each layer, summed in
float64, when its network is computed in eval mode (in float32, as the program computes it): the largest
relative error of any channel. `precise` is the same of the library's one-pass method, where network and
oracle both compute in float64, since in float32 a last layer that sees few values amplifies the rounding of
those before it (measured: up to 1e-3 in Inception-v4). `bits`: all other tensors of the file are the same.
"""

import contextlib
import copy
import hashlib
import io
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bncli.batchnorm import recalibrate
from bncli.checkpoints import load_weights
from bncli.cli.app import main
from bncli.data.randomness import Stream, generator
from bncli.models import build_network
from tests.models import own_networks
from tests.models.nms_stand_in import detectors_computable


@dataclass(frozen=True)
class Case:
    """A network, and what the command line has to be told of it."""

    name: str
    size: int = 64  # of its images
    arguments: tuple[str, ...] = ("num_classes=4",)
    logits: str | None = None  # for --logits
    classifies: bool = True
    normalizes: bool = False  # by itself, as torchvision's detectors do
    needs: str | None = None  # a library

    @property
    def values(self) -> dict[str, Any]:
        """The arguments as Python has them."""
        return {key: json.loads(value) for key, value in (one.split("=") for one in self.arguments)}

    @property
    def batch(self) -> int:
        """How many images of a batch; there are twice as many to train on, and as many to test."""
        return BATCH if self.size <= 128 else 4

    @property
    def short(self) -> str:
        """What the table calls it."""
        return self.name.rpartition(":")[2]


TORCHVISION = {  # the smallest of each family that has BatchNorm, and the side of its images
    "densenet121": 32,
    "efficientnet_b0": 64,
    "efficientnet_v2_s": 32,
    "googlenet": 64,
    "maxvit_t": 224,
    "mnasnet0_5": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "regnet_x_400mf": 64,
    "regnet_y_400mf": 64,
    "resnet18": 64,
    "resnext50_32x4d": 64,
    "shufflenet_v2_x0_5": 64,
    "vgg11_bn": 64,
    "wide_resnet50_2": 64,
}
TIMM = {
    "resnet10t": 64,
    "mobilenetv3_small_050": 64,  # BatchNormAct2d
    "efficientnet_lite0": 64,
    "resnetv2_50": 64,  # normalised before each convolution
    "regnetx_002": 64,
    "ghostnet_050": 64,
    "dla34": 64,
    "repvgg_a0": 64,
    "hrnet_w18_small": 64,
    "tf_mixnet_s": 64,
    "levit_128s": 224,  # BatchNorm1d after linear layers
    "xcit_nano_12_p16_224": 224,
    "skresnet18": 64,
}
# its auxiliary head, which train mode computes, takes images of 299 pixels
INCEPTION = Case("torchvision:inception_v3", 128, ("num_classes=4", "aux_logits=false"))
OWN = f"{own_networks.__file__}:"
CASES = [
    *(Case(f"torchvision:{name}", size) for name, size in TORCHVISION.items()),
    INCEPTION,
    *(Case(f"timm:{name}", size, needs="timm") for name, size in TIMM.items()),
    Case(f"{OWN}timm_frozen", needs="timm"),
    Case("torchvision:lraspp_mobilenet_v3_large", classifies=False),  # segmentation
    Case(  # detection; by default it scales images up to 800 pixels
        "torchvision:fcos_resnet50_fpn",
        64,
        ("num_classes=4", "min_size=64", "max_size=64"),
        classifies=False,
        normalizes=True,
    ),
    Case(f"{OWN}lightning_module", 32, needs="lightning"),
    Case(f"{OWN}Answers", 32, logits="logits"),
    Case(f"{OWN}frozen", 32),
    Case(f"{OWN}applied_twice", 32),
    Case(f"{OWN}AutoEncoder", 32, (), classifies=False),
]
WITHOUT = [  # BatchNorm: there is nothing to recalibrate
    *(f"torchvision:{name}" for name in ("alexnet", "convnext_tiny", "squeezenet1_1", "swin_t", "vgg11")),
    "torchvision:vit_b_32",
    "timm:resnetv2_50x1_bit",  # GroupNorm
]
BATCH, NUM_STEPS = 12, 8
MEAN_STD = (0.5, 0.25)
NORMALIZATION = "0.5,0.5,0.5/0.25,0.25,0.25"
KINDS = ("lightning", "safetensors", "data parallel")


@dataclass(frozen=True)
class Row:
    """What was found about one network."""

    case: Case
    kind: str  # of the file
    loaded: str
    num_layers: int
    skipped: tuple[str, ...]  # names of layers that were left alone
    findings: tuple[str, ...]  # rules by which the audit finds the file ill
    before: float | None  # accuracy with the ruined statistics; None: no classifier
    after: float | None  # with population statistics, as `eval --gap` finds it
    repaired: float | None  # of the new file
    exact_error: float
    precise_error: float
    same_bits: bool
    seconds: float


def examine_network(case: Case, folder: Path) -> Row:
    """Do all that this file's docstring says, in a folder where images may lie already."""
    start = time.process_time()
    root = folder / f"images{case.size}"
    images, labels = make_images(root, case.size, 2 * case.batch)
    mean, std = (0.0, 1.0) if case.normalizes else MEAN_STD
    x = (images.float() - mean * 255) / (std * 255)
    kind = KINDS[int(hashlib.sha256(case.short.encode()).hexdigest(), 16) % len(KINDS)]
    if case.needs == "lightning":
        kind = "real lightning"
    old, new = (folder / f"{name}.{case.short}" for name in ("old", "new"))
    network = build_network(case.name, case.values)
    state = train_and_save(network, case, x, labels, old, kind)
    network_options = ["--model", case.name, "--set", f"data.root={root}"]
    network_options += ["--set", f"data.image_size={case.size}", "--set", f"data.cache={folder / 'cache'}"]
    network_options += ["--set", "runtime.memory_format=contiguous", "--set", "runtime.threads=1"]
    network_options += ["--set", f"runtime.eval_batch_size={case.batch}", "--json"]
    network_options += [word for one in case.arguments for word in ("--model-arg", one)]
    if not case.normalizes:
        network_options += ["--normalization", NORMALIZATION]
    if case.logits is not None:
        network_options += ["--logits", case.logits]

    audit = call("inspect-stats", old, "--json", codes=(0, 1))
    before = after = None
    if case.classifies:
        few = ("--num-images", 4, "--batch-sizes", 2, "--num-calibration-images", case.batch)
        gap = call("eval", old, *network_options, "--gap", *few, codes=(0, 1))["gap"]
        before, after = gap["running"]["accuracy"], gap["exact"]["accuracy"]
    how = () if case.classifies else ("--no-evaluate",)
    made = call("recalibrate", old, "-o", new, *network_options, *how)

    repaired = build_network(case.name, case.values, seed=2).eval()
    loaded = load_weights(repaired, new)
    names = [layer["name"] for layer in made["layers"]]
    order = torch.from_numpy(generator(Stream.SAMPLE, len(x)).permutation(len(x)))  # in which it measures
    expected = inputs_of(repaired, names, x[order].split(case.batch))
    buffers = buffers_of(repaired, names)
    same = all(
        torch.equal(value, state[key]) for key, value in repaired.state_dict().items() if key not in buffers
    )
    same &= read(old, kind).keys() == read(new, kind).keys()
    same &= not any(torch.equal(value, state[key]) for key, value in buffers.items() if key[-3:] == "var")
    return Row(
        case=case,
        kind=kind,
        loaded=f"{loaded.num_loaded}/{loaded.num_tensors}",
        num_layers=len(names),
        skipped=tuple(sorted(one["name"] for one in made["skipped"])),
        findings=tuple(sorted({one["code"] for one in audit["findings"] if one["severity"] != "info"})),
        before=before,
        after=after,
        repaired=None if made["after"] is None else made["after"]["accuracy"],
        exact_error=max(error_of(repaired.get_submodule(name), expected[name]) for name in names),
        precise_error=precise_error(case, old, x),
        same_bits=same,
        seconds=time.process_time() - start,
    )


def precise_error(case: Case, path: Path, x: Tensor) -> float:
    """Of the library's one-pass method, in float64 throughout."""
    network = build_network(case.name, case.values).eval()
    load_weights(network, path)
    network, batches = network.double(), x.double().split(case.batch)
    twin = with_batch_statistics(copy.deepcopy(network))
    done = recalibrate(network, batches, method="precise")
    names = [layer.name for layer in done.layers]
    expected = inputs_of(twin, names, batches)
    return max(error_of(network.get_submodule(name), expected[name]) for name in names)


def call(*words: object, codes: tuple[int, ...] = (0,)) -> Any:
    """The JSON document of a command, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    if code not in codes:
        raise AssertionError(f"bncli {' '.join(map(str, words))}: exit code {code}: {err.getvalue()}")
    return json.loads(out.getvalue())


def make_images(root: Path, size: int, num_images: int) -> tuple[Tensor, Tensor]:
    """The training images (N, 3, size, size) uint8 of a folder, which is made, and their labels (N,).

    A class is a colour, with noise: what a network learns in a few steps.
    """
    random = np.random.default_rng(size)
    train: list[tuple[np.ndarray, int]] = []
    for split in ("train", "test"):
        for index in range(num_images):
            label = index * 4 // num_images  # as a folder is sorted: by class
            colour = 70 + 120 * np.array([label & 1, label >> 1, 1 - (label & 1)])
            pixels = random.normal(colour, 40, (size, size, 3)).clip(0, 255).astype(np.uint8)
            file = root / split / f"class{label}" / f"{index:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
            if split == "train":
                train.append((pixels, label))
    images = torch.from_numpy(np.stack([pixels for pixels, _ in train])).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor([label for _, label in train])


def train_and_save(
    network: nn.Module, case: Case, x: Tensor, labels: Tensor, path: Path, kind: str
) -> dict[str, Tensor]:
    """Some steps, and statistics that are those of nothing; gives the state dict that is saved."""
    if kind == "real lightning":
        return train_with_lightning(network, x, labels, path)
    order = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    network.train()
    for _ in range(NUM_STEPS):
        chosen = torch.randperm(len(x), generator=order)[: case.batch]
        loss = loss_of(network, case, x[chosen], labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ruin(network)
    state = {key: value.detach().clone() for key, value in network.state_dict().items()}
    save(state, path, kind)
    return state


def loss_of(network: nn.Module, case: Case, x: Tensor, labels: Tensor) -> Tensor:
    """Of a classifier the cross-entropy; of a detector its own; of others the size of what they return."""
    if case.normalizes:
        boxes = torch.tensor([[8.0, 8, 40, 40]])
        targets = [{"boxes": boxes, "labels": label[None].clamp_min(1)} for label in labels]
        return torch.stack(list(network(list(x), targets).values())).sum()
    outputs = network(x)
    if not case.classifies:
        return torch.stack([value.square().mean() for value in outputs.values()]).sum()
    if isinstance(outputs, tuple):  # with auxiliary heads
        outputs = outputs[0]
    return nn.functional.cross_entropy(outputs[case.logits] if case.logits else outputs, labels)


def train_with_lightning(network: nn.Module, x: Tensor, labels: Tensor, path: Path) -> dict[str, Tensor]:
    """With its own Trainer, which saves the file."""
    from lightning.pytorch import Trainer
    from torch.utils.data import DataLoader, TensorDataset

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu", max_epochs=NUM_STEPS, enable_checkpointing=False, barebones=False, **quiet
    )
    trainer.fit(network, DataLoader(TensorDataset(x, labels), BATCH, shuffle=True))
    ruin(network)
    trainer.save_checkpoint(path)
    return {key: value.detach().clone() for key, value in network.state_dict().items()}


def ruin(network: nn.Module) -> None:
    """Change the running statistics to those of nothing; those of the first layer as if it were new."""
    layers = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    with torch.no_grad():
        for layer in layers:
            layer.running_mean.add_(1)  # type: ignore[union-attr]
            layer.running_var.mul_(3)  # type: ignore[union-attr]
        layers[0].running_mean.zero_()  # type: ignore[union-attr]
        layers[0].running_var.fill_(1)  # type: ignore[union-attr]


def save(state: dict[str, Tensor], path: Path, kind: str) -> None:
    """As Lightning's Trainer does, with safetensors, or with the prefix of DataParallel."""
    if kind == "safetensors":
        safetensors.torch.save_file(state, path)
        return
    prefix = "model." if kind == "lightning" else "module."
    content = {"epoch": 1, "state_dict": {prefix + key: value for key, value in state.items()}}
    if kind == "lightning":
        content["pytorch-lightning_version"] = "2.5.0"
        content["hyper_parameters"] = {"lr": 0.1}
    torch.save(content, path)


def read(path: Path, kind: str) -> dict[str, object]:
    """What is in the file, by PyTorch or safetensors: flat."""
    if kind == "safetensors":
        return dict(safetensors.torch.load_file(path))
    content: dict[str, object] = torch.load(path, weights_only=True)
    return content | {f"state_dict.{key}": value for key, value in content["state_dict"].items()}  # type: ignore[attr-defined]


def with_batch_statistics(network: nn.Module) -> nn.Module:
    """The network itself, its BatchNorm layers alone in train mode."""
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.train()
            module.momentum = 0.0
    return network


def buffers_of(network: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Running statistics of the layers of these names, by all the names that each has."""
    layers = {network.get_submodule(name) for name in names}
    return {
        f"{name}.{leaf}": module.get_buffer(leaf)
        for name, module in network.named_modules(remove_duplicate=False)
        if module in layers
        for leaf in ("running_mean", "running_var")
    }


def inputs_of(
    network: nn.Module, names: list[str], batches: Sequence[Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and biased variance of what enters each layer, (C,) in float64, over all images."""
    found: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found.setdefault(name, []).append(inputs[0].double().transpose(0, 1).flatten(1))

        return hook

    hooks = [network.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    with torch.no_grad():
        for batch in batches:
            network(batch)
    for hook in hooks:
        hook.remove()
    joined = ((name, torch.cat(parts, 1)) for name, parts in found.items())
    return {name: (values.mean(1), values.var(1, correction=0)) for name, values in joined}


def error_of(layer: nn.Module, expected: tuple[Tensor, Tensor]) -> float:
    """The largest relative error of a channel; means are measured in deviations where those are larger."""
    mean, var = expected
    scale = torch.maximum(mean.abs(), var.sqrt()).clamp_min(1e-30)
    of_mean = (layer.get_buffer("running_mean").double() - mean).abs() / scale
    of_var = (layer.get_buffer("running_var").double() - var).abs() / var.clamp_min(1e-20)
    return float(torch.maximum(of_mean, of_var).max())


def refusal(name: str, folder: Path) -> str:
    """What `recalibrate` says of a network that has no BatchNorm layer."""
    path = folder / "without.pt"
    torch.save(build_network(name).state_dict(), path)
    err = io.StringIO()
    words = ("recalibrate", path, "-o", folder / "new.pt", "--model", name, "--data-root", folder)
    with contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    if code != 2 or (folder / "new.pt").exists():
        raise AssertionError(f"{name}: exit code {code}")
    return err.getvalue().splitlines()[-1].partition(f"{path}: ")[2]


def lines(names: Sequence[str]) -> Iterator[str]:
    """The table, row by row; then the refusals."""
    columns = [
        "network",
        "file",
        "loaded",
        "BN",
        "left",
        "audit",
        "accuracy",
        "exact",
        "precise",
        "bits",
        "s",
    ]
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            if names and case.short not in names:
                continue
            row = examine_network(case, Path(folder))
            accuracy = "-"
            if row.before is not None and row.repaired is not None:
                accuracy = f"{row.before:.0%} to {row.repaired:.0%}"
            values = [
                case.short,
                row.kind,
                row.loaded,
                row.num_layers,
                len(row.skipped),
                " ".join(row.findings),
                accuracy,
                f"{row.exact_error:.0e}",
                f"{row.precise_error:.0e}",
                "same" if row.same_bits else "DIFFER",
                f"{row.seconds:.0f}",
            ]
            yield f"| {' | '.join(map(str, values))} |"
        for name in [] if names else WITHOUT:
            yield f"{name}: {refusal(name, Path(folder))}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with detectors_computable():
        for line in lines(sys.argv[1:]):
            print(line, flush=True)
