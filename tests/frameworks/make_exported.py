"""Programs of torch.export in three layouts, each with the state dict of the network.

python -m tests.frameworks.make_exported  (torch 2.13.0; no other package)

torch 2.13 writes the newest layout only. The two before are made of what it serialises, packed as torch 2.8
and 2.7 did; that torch.export.load of 2.13 still reads them is checked here.
"""

import io
import json
import shutil
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._export.serde.serialize import serialize

TARGET = Path(__file__).parent / "files" / "exported"


class Network(nn.Module):
    """BatchNorm layers of all kinds, one with statistics that are views, and an InstanceNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2)
        self.bn = nn.BatchNorm2d(4, eps=1e-3, momentum=0.03)
        self.deep = nn.Sequential(
            nn.Conv2d(4, 3, 1),
            nn.BatchNorm2d(3, momentum=None),
            nn.BatchNorm2d(3, affine=False),
            nn.BatchNorm2d(3, track_running_stats=False),
            nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        )
        self.last = nn.BatchNorm1d(3, eps=1e-4)
        # both in one storage, one with a stride
        shared = torch.arange(12.0)
        self.last._buffers["running_mean"] = shared[1:4]
        self.last._buffers["running_var"] = shared[5::2][:3]

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, 3)."""
        return self.last(self.deep(self.bn(self.conv(x))).mean((2, 3)))  # type: ignore[no-any-return]


def made(*, train: bool) -> tuple[Network, Any]:
    """A network and its program, without the paths of the machine that exports it."""
    torch.manual_seed(0)
    network = Network()
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            if buffer.is_floating_point() and not name.startswith("last"):
                buffer.copy_(torch.rand_like(buffer) + 0.5)
            elif not buffer.is_floating_point():
                buffer.fill_(7)
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter))
    network.conv.weight.data = network.conv.weight.data.to(memory_format=torch.channels_last)
    if train:
        network.deep[1].momentum = 0.25
    network.train(train)
    program = torch.export.export(network, (torch.randn(4, 3, 5, 5),))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return network, program


def repack(source: Path, target: Path) -> None:
    """The layout of torch 2.8: one state dict in place of the storages."""
    state, constants = io.BytesIO(), io.BytesIO()
    torch.save(dict(torch.export.load(source).state_dict), state)
    torch.save({}, constants)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            _, _, rest = name.partition("/")
            if not rest.startswith(("data/weights/", "data/constants/")):
                new.writestr(f"{target.stem}/{rest}", old.read(name))
        new.writestr(f"{target.stem}/data/weights/model.pt", state.getvalue())
        new.writestr(f"{target.stem}/data/constants/model.pt", constants.getvalue())


def write_early(program: Any, target: Path) -> None:
    """The layout of torch 2.7: what is serialised, in the top of the archive."""
    artifact = serialize(program)
    version = json.loads(artifact.exported_program)["schema_version"]
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("serialized_exported_program.json", artifact.exported_program)
        archive.writestr("serialized_state_dict.pt", artifact.state_dict)
        archive.writestr("serialized_constants.pt", artifact.constants)
        archive.writestr("serialized_example_inputs.pt", artifact.example_inputs)
        archive.writestr("version", f"{version['major']}.{version['minor']}")


def main() -> None:
    """Write all and their state dicts."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name, train in (("eval", False), ("train", True)):
            network, program = made(train=train)
            torch.export.save(program, place / f"{name}.pt2")
            torch.save(network.state_dict(), place / f"{name}.pt")
            if train:
                torch.export.save(program.run_decompositions(), place / "decomposed.pt2")
        network, program = made(train=False)
        repack(place / "eval.pt2", place / "layout_2_8.pt2")
        write_early(program, place / "layout_2_7.pt2")
        for name in ("layout_2_8", "layout_2_7"):
            loaded = torch.export.load(place / f"{name}.pt2").state_dict
            assert all(torch.equal(loaded[key], one) for key, one in network.state_dict().items())
        half = made(train=False)[0].to(torch.bfloat16)
        program = torch.export.export(half, (torch.randn(4, 3, 5, 5).to(torch.bfloat16),))
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)
        torch.export.save(program, place / "bfloat16.pt2")
        torch.save(half.state_dict(), place / "bfloat16.pt")
        shutil.rmtree(TARGET, ignore_errors=True)
        TARGET.mkdir(parents=True)
        with zipfile.ZipFile(TARGET / "files.zip", "w") as archive:
            for path in sorted(place.iterdir()):
                content = path.read_bytes()
                assert b"site-packages" not in content, path
                archive.writestr(zipfile.ZipInfo(path.name), content, zipfile.ZIP_DEFLATED, 9)


if __name__ == "__main__":
    main()
