"""Networks of torchvision, timm and one's own: exported, opened again, and compared.

    python -m tests.export.exported_networks                      prints a row for each, on one thread
    python -m tests.export.exported_networks onnx resnet18 dla34   as .onnx, and these alone

Each network's statistics are those of a few batches of noise, and no weight of BatchNorm is as it was drawn.
It is saved as a state dict, and `bncli export` does the rest. `float64` is the largest difference that
folding makes where all is computed in float64, and `file` the one that the file makes in float32; both in
parts of the image's largest output. `kept` are layers that cannot be folded, with the first one's reason.
"""

import contextlib
import copy
import io
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bncli.cli.app import main
from bncli.inference import fold_batch_norm
from bncli.models import build_network

HERE = f"{Path(__file__).parent / 'awkward_networks.py'}:"
TORCHVISION = {  # and the side of their images
    "densenet121": 32,
    "efficientnet_b0": 64,
    "googlenet": 64,
    "mnasnet0_5": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "regnet_y_400mf": 64,
    "resnet18": 64,
    "resnext50_32x4d": 64,
    "shufflenet_v2_x0_5": 64,
    "vgg11_bn": 64,
}
TIMM = {
    "resnet10t": 64,
    "mobilenetv3_small_050": 64,
    "efficientnet_lite0": 64,
    "resnetv2_50": 64,
    "regnetx_002": 64,
    "ghostnet_050": 64,
    "dla34": 64,
    "repvgg_a0": 64,
    "hrnet_w18_small": 64,
    "levit_128s": 224,
    "skresnet18": 64,
}
AWKWARD = {"Awkward": 32, "FallingActivations": 32, "SharedConvolution": 32, "SharedPair": 32}
CASES = {
    **{f"torchvision:{name}": size for name, size in TORCHVISION.items()},
    **{f"timm:{name}": size for name, size in TIMM.items()},
    **{f"{HERE}{name}": size for name, size in AWKWARD.items()},
}


@dataclass(frozen=True)
class Row:
    """What became of one network."""

    name: str
    num_folded: int
    kept: tuple[tuple[str, str], ...]  # names with reasons
    float64_error: float
    file_error: float
    predictions_changed: int
    num_bytes: int
    seconds: float


def make_network(name: str, size: int, seed: int = 0) -> nn.Module:
    """With the statistics of some batches, and weights of which none is 0 or 1 as it was drawn."""
    torch.manual_seed(seed)
    network = build_network(name, {"num_classes": 5})
    random = torch.Generator().manual_seed(seed)
    for layer in network.modules():
        if isinstance(layer, _BatchNorm):
            if layer.weight is not None:
                layer.weight.data.uniform_(0.5, 1.5, generator=random)
                layer.bias.data.normal_(0, 0.3, generator=random)
            layer.momentum = 0.5
    network.train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(6, 3, size, size, generator=random))
    return network.eval()


def relative(found: Tensor, right: Tensor) -> float:
    """The largest difference, in parts of the image's largest output."""
    rows = right.flatten(1).abs().amax(1)
    return float(((found - right).flatten(1).abs().amax(1) / rows).max())


def float64_error(network: nn.Module, size: int) -> float:
    """Of folding alone."""
    wide = copy.deepcopy(network).double().eval()
    images = torch.randn(4, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return relative(fold_batch_norm(wide).model(images), wide(images))


def export(path: Path, name: str, size: int, output: Path, *options: str) -> dict[str, Any]:
    """The JSON document of the command, in this process."""
    words = ["export", path, "-o", output, "--model", name, "--model-arg", "num_classes=5", "--json"]
    words += ["--normalization", "half", "--set", f"data.image_size={size}", "--num-images", 32, *options]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    if code not in (0, 1):
        raise AssertionError(f"{name}: exit code {code}: {err.getvalue()}")
    document: dict[str, Any] = json.loads(out.getvalue())
    return document


def round_trip(name: str, size: int, folder: Path, kind: str) -> Row:
    """Make, save, export and compare."""
    start = time.process_time()
    network = make_network(name, size)
    short = name.rpartition(":")[2]
    path = folder / f"{short}.pt"
    torch.save(network.state_dict(), path)
    options = ("--fold",) if kind == "safetensors" else ()
    made = export(path, name, size, folder / f"{short}.{kind}", *options)
    return Row(
        name=short,
        num_folded=len(made["layers"]),
        kept=tuple((one["name"], one["reason"]) for one in made["kept"]),
        float64_error=float64_error(network, size),
        file_error=made["proof"]["max_rel_diff"],
        predictions_changed=made["proof"]["predictions_changed"],
        num_bytes=made["num_bytes"],
        seconds=time.process_time() - start,
    )


def lines(kind: str, names: Sequence[str]) -> Iterator[str]:
    """The table."""
    yield f"| network | folded | kept | float64 | file ({kind}) | changed | MB | s |"
    yield "|" + "---|" * 8
    with tempfile.TemporaryDirectory() as folder:
        for name, size in CASES.items():
            short = name.rpartition(":")[2]
            if names and short not in names:
                continue
            try:
                row = round_trip(name, size, Path(folder), kind)
            except AssertionError as error:
                yield f"| {short} | {error} |"
                continue
            kept = f"{len(row.kept)}" + (f" ({row.kept[0][0]}: {row.kept[0][1]})" if row.kept else "")
            errors = f"{row.float64_error:.0e} | {row.file_error:.0e} | {row.predictions_changed}"
            yield (
                f"| {short} | {row.num_folded} | {kept} | {errors} | {row.num_bytes / 1e6:.1f}"
                f" | {row.seconds:.0f} |"
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    kinds = [word for word in sys.argv[1:] if word in ("onnx", "pt2", "xml", "safetensors")] or ["pt2"]
    for chosen in kinds:
        for line in lines(chosen, [word for word in sys.argv[1:] if word not in kinds]):
            print(line, flush=True)
