"""Networks of torchvision, timm and one's own: named, loaded, recalibrated, and written back.

    python -m tests.models.everybodys_networks      prints one row for each, in about ten minutes on one core
    python -m tests.models.everybodys_networks timm:dla34 ...     for these alone

Each is built by its name, sees some batches, and has its running statistics ruined. Its file (in Lightning's
form, and as safetensors) is loaded into a fresh one, recalibrated and rewritten. What is compared: the loaded
bits with those saved; the new statistics with those that plain hooks accumulate in float64; and the new file,
loaded again, with the old one in every other tensor.

The oracle of `exact` is the fixed point: the inputs of each layer in eval mode. That of `precise` is one pass
in which all layers use batch statistics. There both networks compute in float64, since in float32 a last
layer that sees few values amplifies the rounding of those before it (measured: up to 1e-3 in Inception-v4).
"""

import copy
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bncli.batchnorm import audit_layers, read_running_stats, recalibrate
from bncli.checkpoints import load_weights, open_checkpoint, rewrite
from bncli.errors import NoBatchNormError
from bncli.models import build_network

TORCHVISION = {  # the smallest of each family that has BatchNorm, and the side of its images
    "densenet121": 64,
    "efficientnet_b0": 64,
    "googlenet": 64,
    "inception_v3": 128,
    "mnasnet0_5": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "regnet_y_400mf": 64,
    "resnet18": 64,
    "shufflenet_v2_x0_5": 64,
    "vgg11_bn": 64,
    "maxvit_t": 224,
    "lraspp_mobilenet_v3_large": 64,  # segmentation: a dict of maps
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
OWN = {f"{__file__}:{name}": 32 for name in ("Answers", "frozen", "applied_twice", "detector")}
WITHOUT = (
    "torchvision:squeezenet1_1",
    "torchvision:swin_t",
    "timm:resnetv2_50x1_bit",
)  # GroupNorm, LayerNorm
NETWORKS = (
    {f"torchvision:{name}": size for name, size in TORCHVISION.items()}
    | {f"timm:{name}": size for name, size in TIMM.items()}
    | OWN
)
MAX_EXACT = 40  # layers: a pass for each
NUM_IMAGES, BATCH = 24, 8
Method = Literal["exact", "precise"]


class Answers(nn.Module):
    """A network of one's own with a dict as its output."""

    def __init__(self) -> None:
        super().__init__()
        self.body = _body()
        self.head = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) to features (N, 8) and logits (N, 10)."""
        features = self.body(images)
        return {"features": features, "logits": self.head(features)}


def _body() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


def frozen() -> nn.Module:
    """With torchvision's FrozenBatchNorm2d, whose statistics belong to its weights, in front."""
    from torchvision.ops import FrozenBatchNorm2d

    return nn.Sequential(nn.Conv2d(3, 3, 1), FrozenBatchNorm2d(3), _body())


def applied_twice() -> nn.Module:
    """One layer at two places."""
    norm = nn.BatchNorm2d(8)
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 8, 3), norm)


def detector() -> nn.Module:
    """SSDlite up to its maps: the boxes need operators that torchvision has not beside a CPU-only torch."""
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    network: nn.Module = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).backbone
    return network


@dataclass(frozen=True)
class Row:
    """What was found about one network."""

    name: str
    num_loaded: int
    num_tensors: int
    num_layers: int
    skipped: tuple[str, ...]  # layers that the data never reached
    num_findings: int  # of the audit, in the ruined file
    exact_error: float | None  # relative, the largest of all channels; None where it was not measured
    precise_error: float
    same_bits: bool  # of all tensors that recalibration must leave alone, in every file
    seconds: float


def examine_network(name: str, size: int) -> Row:
    """Do all that this file's docstring says."""
    start = time.perf_counter()
    images = torch.rand(NUM_IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))
    saved = ruined(build_network(name).eval(), images)
    state = {key: value.clone() for key, value in saved.state_dict().items()}
    errors: dict[str, float] = {}
    same, skipped = True, set[str]()
    layers = [key for key, module in saved.named_modules() if isinstance(module, _BatchNorm)]
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("lightning", "safetensors"):
            old, new = Path(folder, f"old.{kind}"), Path(folder, f"new.{kind}")
            save(state, old, kind)
            network = build_network(name, seed=1).eval()
            loaded = load_weights(network, old)
            same &= all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
            method: Method = "exact" if kind == "lightning" and len(layers) <= MAX_EXACT else "precise"
            if method == "precise":
                network = network.double()
            batches = images.to(next(network.parameters()).dtype).split(BATCH)
            twin = copy.deepcopy(network)
            done = recalibrate(network, batches, method=method)
            names = [layer.name for layer in done.layers]
            skipped |= {layer.name for layer in done.skipped}
            computing = network if method == "exact" else with_batch_statistics(twin)
            expected = inputs_of(computing, names, batches)
            errors[method] = max(error_of(network.get_submodule(key), expected[key]) for key in names)
            buffers = new_buffers(network, names)
            rewrite(old, new, {loaded.names[key]: value for key, value in buffers.items()}, loaded.key)
            again = build_network(name, seed=2)
            load_weights(again, new)
            for key, value in again.state_dict().items():
                same &= torch.equal(value, buffers[key].to(value.dtype) if key in buffers else state[key])
        with open_checkpoint(old) as checkpoint:
            findings = audit_layers(checkpoint.layers())
    return Row(
        name=name,
        num_loaded=loaded.num_loaded,
        num_tensors=loaded.num_tensors,
        num_layers=len(read_running_stats(network)),
        skipped=tuple(sorted(skipped)),
        num_findings=len(findings),
        exact_error=errors.get("exact"),
        precise_error=errors["precise"],
        same_bits=same,
        seconds=time.perf_counter() - start,
    )


def ruined(network: nn.Module, images: Tensor) -> nn.Module:
    """After two batches, with statistics that are those of nothing."""
    twin = with_batch_statistics(network, momentum=0.1)
    with torch.no_grad():
        for batch in images.split(BATCH)[:2]:
            twin(batch)
        for module in twin.modules():
            if isinstance(module, _BatchNorm):
                module.running_mean.add_(1)  # type: ignore[union-attr]
                module.running_var.mul_(3)  # type: ignore[union-attr]
    return twin.eval()


def with_batch_statistics(network: nn.Module, momentum: float = 0.0) -> nn.Module:
    """The network itself, its BatchNorm layers alone in train mode."""
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.train()
            module.momentum = momentum
    return network


def save(state: dict[str, Tensor], path: Path, kind: str) -> None:
    """As Lightning's Trainer does, or with safetensors."""
    if kind == "safetensors":
        safetensors.torch.save_file(state, path)
        return
    content = {
        "epoch": 1,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {f"model.{key}": value for key, value in state.items()},
        "optimizer_states": [{"state": {0: {"momentum_buffer": torch.ones(3)}}}],
        "hyper_parameters": {"lr": 0.1},
    }
    torch.save(content, path)


def new_buffers(network: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Of the layers of these names, by all the names that each has."""
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


def rows(names: Sequence[str]) -> Iterator[Row | str]:
    """One for each network; for those without BatchNorm the refusal."""
    for name in names:
        size = NETWORKS[name]
        yield examine_network(name, size)
    for name in WITHOUT:
        yield f"{name}: {refusal(name)}"


def refusal(name: str) -> str:
    """What loading a file says that holds no BatchNorm layer."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.pt")
        network = build_network(name)
        torch.save(network.state_dict(), path)
        try:
            load_weights(network, path)
        except NoBatchNormError as error:
            return str(error).removeprefix(f"{path}: ")
    raise AssertionError(f"{name} was loaded")


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("| network | loaded | layers | not reached | audit | exact | precise | other bits | seconds |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows(sys.argv[1:] or list(NETWORKS)):
        if isinstance(row, str):
            print(f"| {row} |", flush=True)
            continue
        exact = "-" if row.exact_error is None else f"{row.exact_error:.1e}"
        print(
            f"| {Path(row.name).name} | {row.num_loaded} of {row.num_tensors} | {row.num_layers}"
            f" | {len(row.skipped)} | {row.num_findings} findings | {exact} | {row.precise_error:.1e}"
            f" | {'same' if row.same_bits else 'DIFFER'} | {row.seconds:.1f} |",
            flush=True,
        )
