"""A program for torchrun: what every rank finds in each scenario, for `test_population_by_ranks.py`.

Each scenario is a function of this rank's number and the number of ranks; its answer goes to FOLDER/RANK.pt.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from copy import deepcopy
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from bncli.batchnorm import (
    Population,
    measure_population,
    read_running_stats,
    recalibrate,
    verify_fixed_point,
)
from bncli.batchnorm.population.exact import kept, spill
from bncli.batchnorm.population.exact.restart import Restarts
from bncli.before_validation import recalibrate_before_validation
from bncli.distributed import DealtBatches
from bncli.errors import BncliError, StoppedError
from bncli.evaluation import evaluate, measure_gap, measure_outcomes, sweep_batch_sizes
from tests.batchnorm.networks import Residual, Shared

NUM_IMAGES, BATCH = 45, 4  # 12 batches, the last one of a single image
SIZES = (5, 3, 8, 2, 7)  # batches of other sizes, fewer than twice the ranks


def images(number: int = NUM_IMAGES) -> Tensor:
    return torch.randn(number, 3, 8, 8, generator=torch.Generator().manual_seed(7)) * 3 + 1


def network(kind: type[nn.Module] = Residual) -> nn.Module:
    torch.manual_seed(3)
    model = kind()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


def classifier() -> nn.Module:
    """Of whose three layers one has statistics that do not fit."""
    torch.manual_seed(4)
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(6), nn.Linear(6, 2)),
    )
    recalibrate(model, [images()])
    model[4].running_mean += 3
    return model


def labelled() -> tuple[Tensor, Tensor]:
    """What `classifier` would say of its images if its statistics fitted."""
    model = classifier()
    recalibrate(model, [images()])
    with torch.no_grad():
        return images(), model.eval()(images()).argmax(1)


class Deep(nn.Sequential):
    """Whose later passes begin with what the earlier ones kept."""

    def __init__(self) -> None:
        sizes = (3, 8, 8, 8, 8, 8)
        convs = (nn.Conv2d(one, two, 3, padding=1) for one, two in pairwise(sizes))
        super().__init__(*(layer for conv in convs for layer in (conv, nn.BatchNorm2d(8), nn.ReLU())))


def found(population: Population) -> dict[str, Any]:
    layers = {one.name: (one.moments.count, one.moments.mean, one.moments.m2) for one in population.layers}
    errors = {one.name: (one.standard_error(), one.variance_standard_error()) for one in population.layers}
    return {
        "layers": layers,
        "errors": errors,
        "images": population.num_images,
        "batches": population.num_batches,
        "stopped": population.stopped_early,
        "passes": population.num_passes,
    }


def one_image_left_out(rank: int, size: int) -> dict[str, Any]:
    """Batches in turn, by a loader with our sampler; 44 images, as a batch of one has no batch statistics."""
    data = TensorDataset(images(NUM_IMAGES - 1))
    loader = DataLoader(data, batch_sampler=DealtBatches(data, BATCH, dist.group.WORLD))
    return {
        method: found(measure_population(network(), loader, method=method, group=dist.group.WORLD))
        for method in ("precise", "exact")
    }


def ragged(rank: int, size: int) -> dict[str, Any]:
    """Five unequal batches; with three ranks or more some have one, and behind the first so many none."""
    batches = list(images(sum(SIZES)).split(SIZES))
    return {
        f"{method} {number}": found(
            measure_population(network(), batches[:number][rank::size], method=method, group=dist.group.WORLD)
        )
        for method in ("precise", "exact")
        for number in (5, 1)
    }


def consecutive(rank: int, size: int) -> dict[str, Any]:
    """Rank 0 has one batch, the last one the rest, those between them none."""
    batches = list(images(sum(SIZES)).split(SIZES))
    own = batches[:1] if rank == 0 else batches[1:] if rank == size - 1 else []
    return {
        method: found(
            measure_population(
                network(), own, method=method, first_batch=int(rank > 0), group=dist.group.WORLD
            )
        )
        for method in ("precise", "exact")
    }


def implicit(rank: int, size: int) -> dict[str, Any]:
    """A layer used twice: passes are repeated until all ranks are content."""
    batches = list(images().split(15))[rank::size]
    return {"exact": found(measure_population(network(Shared), batches, group=dist.group.WORLD))}


def failing_disk(rank: int, size: int) -> dict[str, Any]:
    """The last rank loses what it kept in the midst of a pass, which it begins anew from its images."""
    num_reads = num_forgotten = 0
    read, forget = spill.SpillFile.read, Restarts.forget

    def failing(self: spill.SpillFile, place: Any, layout: Any) -> "Future[Tensor]":
        nonlocal num_reads
        num_reads += 1
        if rank < size - 1 or num_reads != 5:
            return read(self, place, layout)
        gone: Future[Tensor] = Future()
        gone.set_exception(OSError("the disk is gone"))
        return gone

    def watched(self: Restarts) -> None:
        nonlocal num_forgotten
        num_forgotten += 1
        forget(self)

    with (
        mock.patch.object(kept, "MAX_BYTES", 0),
        mock.patch.object(spill, "usable_bytes", lambda: 2**24),
        mock.patch.object(spill.SpillFile, "read", failing),
        mock.patch.object(Restarts, "forget", watched),
    ):
        batches = list(images().split(3))[rank::size]
        answer = found(measure_population(network(Deep), batches, group=dist.group.WORLD))
    return {"exact": answer, "forgotten": num_forgotten}


def many(rank: int, size: int) -> dict[str, Any]:
    """More batches than stay apart in a tree."""
    batches = list(images(600).split(2))[rank::size]
    return {
        "precise": found(measure_population(network(), batches, method="precise", group=dist.group.WORLD))
    }


def tolerance(rank: int, size: int) -> dict[str, Any]:
    num_read = 0

    def own() -> Iterator[Tensor]:
        nonlocal num_read
        for batch in images(600).split(6)[rank::size]:
            num_read += 1
            yield batch

    answers: dict[str, Any] = {
        method: found(
            measure_population(
                network(), own, method=method, tolerance=0.01, layers="bn1", group=dist.group.WORLD
            )
        )
        for method in ("exact", "precise")
    }
    num_read = 0
    measure_population(network(), own, method="precise", tolerance=0.01, layers="bn1", group=dist.group.WORLD)
    return {**answers, "read": num_read}


def written(rank: int, size: int) -> dict[str, Any]:
    """What recalibrate writes, and whether all ranks together find it self-consistent."""
    model, batches = network().double(), list(images().double().split(9))[rank::size]
    recalibrate(model, batches, group=dist.group.WORLD)
    layers = verify_fixed_point(model, batches, group=dist.group.WORLD)
    return {
        "statistics": {one.name: (one.running_mean, one.running_var) for one in read_running_stats(model)},
        "errors": {one.name: one.max_relative_error for one in layers},
        "values": {one.name: one.num_values for one in layers},
    }


def _train(model: nn.Module, loader: Any, measure: Callable[[], Any]) -> tuple[list[Any], dict[str, Tensor]]:
    """Two epochs of anybody's training loop, with something measured behind each; the weights at the end."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    answers = []
    for epoch in range(2):
        torch.manual_seed(epoch)  # whatever was drawn in between, also by the loader
        loader.sampler.set_epoch(epoch)
        model.train()
        for (inputs,) in loader:
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
        answers.append(measure())
    return answers, {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
        for name, value in model.named_parameters()
    }


def _inside_a_training_loop(wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Any]:
    data = TensorDataset(images())
    loader = DataLoader(data, batch_size=BATCH, sampler=DistributedSampler(data, seed=1))
    model, alone = wrap(network()), wrap(network())

    def measure() -> dict[str, Any]:
        before = {name: id(value) for name, value in model.named_parameters()}
        population = measure_population(model, loader, layers="bn[123]", group=dist.group.WORLD)
        assert before == {name: id(value) for name, value in model.named_parameters()}
        weights = {
            name.removeprefix("module."): value.full_tensor() if hasattr(value, "full_tensor") else value
            for name, value in model.state_dict().items()
            if "running" not in name and "tracked" not in name
        }
        return {**found(population), "weights": deepcopy(weights)}

    measured, weights = _train(model, loader, measure)
    _, expected = _train(alone, loader, lambda: None)
    same = all(torch.equal(weights[name], expected[name]) for name in expected)
    recalibration = recalibrate(model, loader, method="precise", layers="bn[123]", group=dist.group.WORLD)
    return {
        "measured": measured,
        "training is the same": same,
        "names": [one.name for one in recalibration.layers],
    }


def in_ddp(rank: int, size: int) -> dict[str, Any]:
    return _inside_a_training_loop(DistributedDataParallel)


def in_fsdp(rank: int, size: int) -> dict[str, Any]:
    def wrap(model: nn.Module) -> nn.Module:
        fully_shard(model.conv1)
        fully_shard(model.bn2)
        return fully_shard(model)

    return _inside_a_training_loop(wrap)


def before_validation(rank: int, size: int) -> dict[str, Any]:
    """With a sampler that repeats images; of each rank all, or whole batches until there are enough."""
    data = TensorDataset(images())
    loader = DataLoader(data, batch_size=BATCH, sampler=DistributedSampler(data, shuffle=False))
    answers = {}
    for num_images in (1000, 5 * size):
        model = network()
        done = recalibrate_before_validation(
            model, loader, num_images=num_images, layers="bn[123]", group=dist.group.WORLD
        )
        layers = read_running_stats(model)
        answers[num_images // size] = {
            "images": done.num_images,
            "statistics": {one.name: (one.running_mean, one.running_var) for one in layers},
        }
    return {"all": answers[1000 // size], "some": answers[5]}


def evaluated(rank: int, size: int) -> dict[str, Any]:
    """The gap, a sweep over batch sizes, and outcomes of the first images."""
    model = classifier()
    test, training = labelled(), images().split(9)
    own = list(zip(*(part.split(7) for part in test), strict=True))[rank::size]
    group, data = dist.group.WORLD, TensorDataset(*test)
    repeating = DataLoader(data, batch_size=BATCH, sampler=DistributedSampler(data))
    accuracy = evaluate(model, repeating, group=group)
    return {
        "accuracy": (accuracy.num_images, accuracy.accuracy, accuracy.per_class_accuracy),
        "gap": asdict(measure_gap(model, own, training[rank::size], group=group)),
        "sweep": [asdict(one) for one in sweep_batch_sizes(model, test, (1, 4, 44), group=group)],
        "outcomes": {
            number: measure_outcomes(model, own, num_images=number, group=group).losses
            for number in (1, 7, 20, 1000)
        },
    }


def errors(rank: int, size: int) -> dict[str, str]:
    """One rank cannot go on: what each of them is told."""
    last = rank == size - 1

    def loader(fails_at: int) -> Any:
        def read() -> Any:
            for number, batch in enumerate(images(240).split(2)[rank::size]):
                if last and number == fails_at:
                    raise OSError("the disk is gone")
                yield batch

        return read

    def attempt(*arguments: Any, **options: Any) -> str:
        try:
            measure_population(*arguments, **{"group": dist.group.WORLD, **options})
        except (BncliError, OSError) as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    def stopped() -> Iterator[Tensor]:
        yield images(2) + rank
        if last:
            raise StoppedError
        yield images(2) - rank

    whole = list(images().split(9))
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        older = FullyShardedDataParallel(network(), device_id=torch.device("cpu"))
    first_alone: Any = dist.new_group([0])
    return {
        "older FSDP": attempt(older, whole[rank::size], method="precise"),
        "not in the group": "" if rank == 0 else attempt(model, whole, group=first_alone),
        "at the start": attempt(model, loader(0), method="precise"),
        "in the midst": attempt(model, loader(20), method="precise"),
        "in the midst, exact": attempt(model, loader(20)),
        "no images": attempt(model, []),
        "all have all": attempt(model, whole, method="precise"),
        "overlapping": attempt(model, [images(9) + rank], method="precise", first_batch=3),
        "no layer": attempt(model, whole[rank::size], layers="x*" if last else None),
        "read once": attempt(model, iter(whole[rank::size])) if last else attempt(model, whole[rank::size]),
        "tolerance of blocks": attempt(model, whole, method="precise", tolerance=0.1, first_batch=9 * rank),
        "stopped": attempt(model, stopped, method="precise"),
        "sound": attempt(model, whole[rank::size]),
    }


SCENARIOS: tuple[Callable[[int, int], Any], ...] = (
    one_image_left_out, ragged, consecutive, implicit, failing_disk, many, tolerance, written,
    in_ddp, in_fsdp, before_validation, evaluated, errors,
)  # fmt: skip


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    answers = {scenario.__name__: scenario(rank, size) for scenario in SCENARIOS}
    torch.save(answers, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
