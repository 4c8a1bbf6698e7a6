"""Directories of torch.distributed.checkpoint by two real ranks, each with what torch itself joins of it.

python -m tests.frameworks.make_distributed  (torch 2.13.0 and safetensors; no other package)
"""

import os
import shutil
import tempfile
import warnings
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

TARGET = Path(__file__).parent / "files" / "distributed"
NUM_RANKS = 2


def network() -> nn.Sequential:
    """Three BatchNorm layers; the last without weight and bias."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 5, 2),
        nn.BatchNorm2d(5),
        nn.Conv2d(5, 3, 1),
        nn.BatchNorm2d(3),
        nn.Flatten(),
        nn.LazyLinear(4),
        nn.BatchNorm1d(4, affine=False),
    )


def images_of(rank: int, step: int) -> Tensor:
    """(6, 2, 4, 4), of another distribution on each rank."""
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(6, 2, 4, 4, generator=generator) * (1 + rank) + rank


def initialised() -> nn.Sequential:
    """With a shape for every tensor, and statistics that nobody has moved."""
    model = network().eval()
    model(torch.zeros(1, 2, 4, 4))
    return model.train()


def train(model: nn.Module, rank: int) -> torch.optim.Optimizer:
    """Three steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for step in range(3):
        optimizer.zero_grad()
        model(images_of(rank, step)).square().mean().backward()
        optimizer.step()
    return optimizer


def work(rank: int, folder: str) -> None:
    """What one rank does."""
    os.chdir(folder)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29571"}
    dist.init_process_group("gloo", rank=rank, world_size=NUM_RANKS)
    mesh = init_device_mesh("cpu", (NUM_RANKS,))
    parallel = nn.parallel.DistributedDataParallel(initialised())
    optimizer = train(parallel, rank)
    torch.save(parallel.state_dict(), f"rank{rank}.pt")
    dcp.save({"model": parallel.state_dict(), "epoch": 3}, checkpoint_id="ddp")
    model_state, optimizer_state = get_state_dict(parallel, optimizer)
    dcp.save(
        {"app": {"model": model_state, "optim": optimizer_state}, "list": [torch.ones(2), 3]},
        storage_writer=dcp.FileSystemWriter("ddp_files", single_file_per_rank=False),
    )
    dcp.save({"model": parallel.state_dict()}, checkpoint_id="ddp_each", use_collectives=False)
    sharded = initialised()
    for module in sharded:
        if list(module.parameters()):
            fully_shard(module, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    train(sharded, rank)
    dcp.save({"model": get_model_state_dict(sharded)}, checkpoint_id="fsdp2")
    dcp.save(
        get_model_state_dict(sharded),
        storage_writer=dcp.HuggingFaceStorageWriter("fsdp2_safetensors", save_distributed=True),
    )
    whole = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        torch.save(whole, "fsdp2_whole.pt")
    state = initialised().state_dict()
    state["1.running_mean"] = torch.arange(5.0) + 0.5
    cut = {
        "0.weight": [Shard(1)],
        "2.weight": [Shard(1)],
        "5.weight": [Shard(1)],
        "1.running_mean": [Shard(0)],
    }
    for name, places in cut.items():
        state[name] = distribute_tensor(state[name], mesh, places)
    dcp.save(state, checkpoint_id="cut")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Make them, and pack them with what torch makes of them."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, args=(folder,), nprocs=NUM_RANKS)
        place = Path(folder)
        for name in ("ddp", "ddp_files", "fsdp2", "cut"):
            dcp_to_torch_save(place / name, place / f"{name}.pt")
        shutil.rmtree(TARGET, ignore_errors=True)
        TARGET.mkdir(parents=True)
        with zipfile.ZipFile(TARGET / "files.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for path in sorted(place.rglob("*")):
                if path.is_file():
                    entry = zipfile.ZipInfo(str(path.relative_to(place)))
                    archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED, 9)


if __name__ == "__main__":
    main()
