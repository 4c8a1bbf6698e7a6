#!/usr/bin/env bash
# torch.distributed.checkpoint can save a BatchNorm layer's running mean from one rank and its variance from another.
#
# Under DistributedDataParallel each rank moves its own running statistics between two broadcasts, so the ranks
# differ when a checkpoint is saved. Tensors that all ranks hold are saved once each, shared out over the ranks by
# their size and not by layer. Here the mean is rank 0's and the variance rank 1's: no rank ever had that layer.
# There is no warning, and the directory loads without one. Equal buffers on all ranks avoid it.
#
# Versions: torch 2.13.0, two processes with gloo on the CPU. Found 30 November 2026.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat >"$folder/save.py" <<'PYTHON'
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

warnings.filterwarnings("ignore")
torch.set_num_threads(1)


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    network = nn.Sequential(nn.BatchNorm2d(3))
    model = nn.parallel.DistributedDataParallel(network)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(5):
        torch.manual_seed(10 * step + rank)
        model(torch.randn(16, 3, 8, 8) * (1 + rank) + rank).square().mean().backward()
        optimizer.step()
    torch.save(network.state_dict(), f"{folder}/rank{rank}.pt")
    dcp.save(network.state_dict(), checkpoint_id=f"{folder}/checkpoint")
    dist.destroy_process_group()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    print("torch", torch.__version__)
    mp.spawn(work, (str(folder),), nprocs=2)
    dcp_to_torch_save(folder / "checkpoint", folder / "joined.pt")
    joined = torch.load(folder / "joined.pt")
    ranks = [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]
    origin = {
        name: next(rank for rank in range(2) if torch.equal(joined[name], ranks[rank][name]))
        for name in joined
        if "running" in name
    }
    print({name: f"of rank {rank}" for name, rank in origin.items()})
    mixed = [n for n in origin if n.endswith("mean") and origin[n] != origin[n.replace("mean", "var")]]
    assert mixed, "the behaviour has changed"
PYTHON
"$folder/venv/bin/python" "$folder/save.py" "$folder"
