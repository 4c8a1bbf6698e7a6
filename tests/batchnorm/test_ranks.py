"""What several ranks hold, against the statistics of all their values together, in float64."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from bncli.batchnorm import compare_ranks, read_running_stats
from bncli.checkpoints import open_checkpoint
from bncli.errors import IncomparableError

NUM_RANKS, IMAGES, SIDE, CHANNELS = 3, 5, 4, 6
VALUES = IMAGES * SIDE * SIDE


def images_of(rank: int) -> Tensor:
    """Of another mean and variance on each rank."""
    generator = torch.Generator().manual_seed(rank)
    shape = (IMAGES, CHANNELS, SIDE, SIDE)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * (1 + rank) + rank


def layer_of(images: Tensor) -> nn.Sequential:
    """Whose running statistics are those of one batch."""
    model = nn.Sequential(nn.BatchNorm2d(CHANNELS, momentum=1.0)).double().train()
    model(images)
    return model


class Saved:
    """A state dict as a file holds it."""

    def __init__(self, model: nn.Module) -> None:
        self.state = model.state_dict()

    def layers(self) -> Any:
        return read_running_stats(self.state)

    @property
    def tensors(self) -> Any:
        return {name: _Whole(tensor) for name, tensor in self.state.items()}


class _Whole:
    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self._bytes = tensor.numpy().tobytes()

    def chunks(self) -> Any:
        yield self._bytes


def test_the_pool_of_ranks_is_what_one_process_measures_of_all_images() -> None:
    batches = [images_of(rank) for rank in range(NUM_RANKS)]
    found = compare_ranks([Saved(layer_of(batch)) for batch in batches], values=VALUES).layers[0]
    together = torch.cat(batches).movedim(1, 0).flatten(1)
    torch.testing.assert_close(found.running_mean, together.mean(1), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.running_var, together.var(1), rtol=1e-12, atol=1e-14)
    averaged = torch.stack([batch.movedim(1, 0).flatten(1).var(1) for batch in batches]).mean(0)
    torch.testing.assert_close(found.averaged_var, averaged, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.lost_share, 1 - averaged / together.var(1), rtol=1e-9, atol=0)
    means = torch.stack([batch.mean((0, 2, 3)) for batch in batches])
    expected = (means.amax(0) - means.amin(0)) / (together.var(1) + 1e-5).sqrt()
    torch.testing.assert_close(found.mean_range, expected, rtol=1e-12, atol=0)


def test_without_the_number_of_values_the_pool_is_that_of_very_many() -> None:
    batches = [images_of(rank) for rank in range(NUM_RANKS)]
    saved = [Saved(layer_of(batch)) for batch in batches]
    found = compare_ranks(saved).layers[0]
    limit = compare_ranks(saved, values=1e12).layers[0]
    torch.testing.assert_close(found.running_var, limit.running_var, rtol=1e-9, atol=0)
    exact = torch.cat(batches).movedim(1, 0).flatten(1).var(1)
    error = (found.running_var / exact - 1).abs().max()
    assert 1e-6 < float(error) < 1 / VALUES


def test_equal_ranks_are_identical_and_lose_nothing() -> None:
    saved = Saved(layer_of(images_of(0)))
    found = compare_ranks([saved, saved, saved])
    assert found.identical and found.layers[0].identical
    assert float(found.layers[0].lost_share.abs().max()) < 1e-15
    assert found.verdict == "All 3 ranks hold the same running statistics, in every bit."


def test_what_no_rank_of_one_training_has_is_said() -> None:
    first, second = layer_of(images_of(0)), layer_of(images_of(1))
    with torch.no_grad():
        second[0].weight.add_(1)
        second[0].num_batches_tracked.add_(4)
        second[0].running_var[2] = torch.nan
    found = compare_ranks([Saved(first), Saved(second)])
    assert found.other_differences == ("0.weight",)
    assert "not the ranks of one training" in found.verdict
    assert "different numbers of batches" in found.verdict
    (layer,) = found.layers
    assert layer.num_batches_tracked == (1, 5)
    assert layer.running_var.isnan().tolist() == [False, False, True, False, False, False]
    with pytest.raises(IncomparableError, match="no BatchNorm layer of the first"):
        compare_ranks([Saved(first), Saved(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)))])


def _train(rank: int, port: int, folder: str) -> None:
    """One step of plain DDP, as people write it."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(CHANNELS, 3, 1), nn.BatchNorm2d(3, momentum=1.0)).double()
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    before = {name: tensor.clone() for name, tensor in model[0].state_dict().items()}
    parallel(images_of(rank)).square().sum().backward()
    optimizer.step()
    torch.save({"before": before, "model": parallel.state_dict()}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_of_a_real_training_pool_to_the_statistics_of_their_joined_data(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_train, args=(port, str(tmp_path)), nprocs=2)
    paths = [tmp_path / f"rank{rank}.pt" for rank in range(2)]
    with open_checkpoint(paths[0]) as one, open_checkpoint(paths[1]) as two:
        found = compare_ranks([one, two], values=VALUES)
    assert (found.identical, found.other_differences) == (False, ())
    convolution = nn.Conv2d(CHANNELS, 3, 1).double()
    convolution.load_state_dict(torch.load(paths[0])["before"])
    with torch.no_grad():
        values = convolution(torch.cat([images_of(0), images_of(1)])).movedim(1, 0).flatten(1)
    torch.testing.assert_close(found.layers[0].running_mean, values.mean(1), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.layers[0].running_var, values.var(1), rtol=1e-12, atol=1e-14)
    assert float(found.layers[0].lost_share.max()) > 0.05
