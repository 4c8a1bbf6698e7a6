"""Population statistics against fvcore and `torch.optim.swa_utils.update_bn`: how right, and how fast.

Right: data with mean 1e3 and deviation 1e-3, in which every digit counts, through one BatchNorm layer, in
equal, unequal and single-image batches. The oracle is the mean and variance of all of it at once in float64.

Fast: one pass over the same images by each tool, and a plain forward pass in eval mode, in turns, over a
network of torchvision's with random weights. Ratios are taken within a round.
"""

import difflib
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from bncli.batchnorm import batch_norm_layers, eval_mode, measure_population, train_mode
from bncli.cli.app import main
from bncli.cli.messages import print_note
from bncli.cli.options import JsonOption
from bncli.cli.tables.table import (
    console_for_results,
    machine_line,
    number,
    print_json,
    show_lines,
    table_of,
)
from bncli.errors import BncliError
from bncli.hardware import describe_machine
from bncli.runtime import resolve_device, synchronize
from bncli.torchvision_compat import import_torchvision
from bncli.wording import plural

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_CPU = torch.device("cpu")
_CUTS = {"equal": (16,) * 8, "unequal": (64, 32, 16, 9, 4, 2, 1), "single image": (1,) * 128}


@dataclass(frozen=True)
class RelativeErrors:
    """The largest error of any channel, relative to the oracle, by tool."""

    cut: str
    batch_sizes: tuple[int, ...]
    mean: dict[str, float]
    var: dict[str, float]


@dataclass(frozen=True)
class PassTime:
    """One tool's passes over the same images. Seconds are medians, ratios are to a plain forward pass."""

    tool: str
    seconds: float
    ratio: float  # median over the rounds
    ratio_min: float
    ratio_max: float


@dataclass(frozen=True)
class PopulationBench:
    """What was measured."""

    data_mean: float
    data_deviation: float
    errors: tuple[RelativeErrors, ...]
    network: str
    num_layers: int
    num_images: int
    image_size: int
    batch_size: int
    num_rounds: int
    times: tuple[PassTime, ...]
    exact_forward_passes: float  # what `exact` costs by its own count
    device: str
    threads: int
    machine: dict[str, Any]


def bench_population(
    *,
    network: str = "resnet18",  # of torchvision
    num_rounds: int = 5,
    num_images: int = 64,
    batch_size: int = 32,
    image_size: int = 224,  # what the network is made for
    device: str = "cpu",
    report: Callable[[str], None] = lambda _: None,
) -> PopulationBench:
    """Measure errors and times.

    Raises BncliError if fvcore is not installed, or for a network or device that there is not, or a network
    that has no BatchNorm.
    """
    fvcore, where = _fvcore(), resolve_device(device)
    model = network_of(network, image_size).to(where)
    errors = tuple(_errors(cut, sizes, fvcore) for cut, sizes in _CUTS.items())
    batches = list(torch.randn(num_images, 3, image_size, image_size).to(where).split(batch_size))
    tools: dict[str, Callable[[], object]] = {
        "plain forward": lambda: plain_forward(model, batches),
        "bncli precise": lambda: measure_population(model, batches, method="precise"),
        "fvcore": lambda: _train(model, lambda: fvcore(model, batches, num_iters=len(batches))),
        "update_bn": lambda: update_bn(batches, model),
        "bncli exact": lambda: measure_population(model, batches, method="exact"),
    }
    times = in_turns(tools, num_rounds, report, where)
    return PopulationBench(
        data_mean=1e3,
        data_deviation=1e-3,
        errors=errors,
        network=f"torchvision {network}",
        num_layers=len(batch_norm_layers(model)),
        num_images=num_images,
        image_size=image_size,
        batch_size=batch_size,
        num_rounds=num_rounds,
        times=times,
        exact_forward_passes=measure_population(model, batches).forward_passes,
        device=str(where),
        threads=torch.get_num_threads(),
        machine=describe_machine(),
    )


def network_of(name: str, image_size: int) -> nn.Module:
    models = import_torchvision().models
    names = models.list_models(module=models)
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise BncliError(f"--network: torchvision has no classifier {name!r}{hint}")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # how two of them initialise their weights
        model: nn.Module = models.get_model(name, weights=None, num_classes=10)
    if not batch_norm_layers(model):
        raise BncliError(f"--network: {name} has no BatchNorm")
    try:
        plain_forward(model, [torch.zeros(1, 3, image_size, image_size)])
    except (RuntimeError, ValueError, AssertionError) as error:
        found = f"--network: {name} cannot take {image_size}x{image_size} pixels"
        raise BncliError(f"{found}: {' '.join(str(error).split())}") from error
    return model


def _fvcore() -> Callable[..., object]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # fvcore's own, of torch.jit.script
            from fvcore.nn.precise_bn import update_bn_stats
    except ImportError as error:
        raise BncliError("fvcore is not installed, which this compares with: pip install fvcore") from error
    function: Callable[..., object] = update_bn_stats
    return function


def _errors(cut: str, sizes: Sequence[int], fvcore: Callable[..., object]) -> RelativeErrors:
    generator = torch.Generator().manual_seed(0)
    images = 1e3 + 1e-3 * torch.randn(sum(sizes), 8, 6, 6, generator=generator)
    batches = list(images.split(list(sizes)))
    # float64 subtracts exactly here, and only so is the oracle itself right to more than ten digits
    rest = images.double().movedim(1, 0).flatten(1) - 1e3  # (C, values)
    oracle = (1e3 + rest.mean(1), rest.var(1, unbiased=False))
    layer = nn.Sequential(nn.BatchNorm2d(8)).train()
    moments = measure_population(layer, batches, method="precise").layers[0].moments
    found: dict[str, tuple[Tensor, Tensor]] = {"bncli": (moments.mean, moments.variance())}
    rivals: dict[str, Callable[[nn.Sequential], object]] = {
        "fvcore": lambda net: fvcore(net, batches, num_iters=len(batches)),
        "update_bn": lambda net: update_bn(batches, net),
    }
    for tool, measure in rivals.items():
        net = deepcopy(layer)
        measure(net)
        mean, var = net[0].running_mean, net[0].running_var
        assert isinstance(mean, Tensor)
        assert isinstance(var, Tensor)
        found[tool] = (mean, var)
    errors = [
        {
            tool: float(((one[index].double() - oracle[index]) / oracle[index]).abs().max())
            for tool, one in found.items()
        }
        for index in range(2)
    ]
    return RelativeErrors(cut, tuple(sizes), errors[0], errors[1])


def in_turns(
    tools: dict[str, Callable[[], object]],
    num_rounds: int,
    report: Callable[[str], None],
    device: torch.device = _CPU,
    *,
    warm_up: bool = True,
) -> tuple[PassTime, ...]:
    """Time every tool in each round; in every second one they come in the opposite order.

    The first tool is what ratios are to. A tool that times itself returns its seconds as a float. With
    `warm_up` there is one round more, which is not timed.
    """
    seconds: dict[str, list[float]] = {tool: [] for tool in tools}
    for turn in range(1 - warm_up, num_rounds + 1):
        for tool, work in list(tools.items())[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            own = work()
            synchronize(device)
            if turn:
                seconds[tool].append(own if isinstance(own, float) else time.perf_counter() - start)
                report(f"round {turn} of {num_rounds}: {tool}, {seconds[tool][-1]:.1f} s")
    plain = next(iter(seconds.values()))
    times = []
    for tool, taken in seconds.items():
        ratios = [one / base for one, base in zip(taken, plain, strict=True)]
        times.append(
            PassTime(tool, statistics.median(taken), statistics.median(ratios), min(ratios), max(ratios))
        )
    return tuple(times)


def plain_forward(model: nn.Module, batches: Sequence[Tensor]) -> None:
    with eval_mode(model), torch.no_grad():
        for images in batches:
            model(images)


def _train(model: nn.Module, work: Callable[[], object]) -> None:
    with train_mode(model):
        work()


@app.command()
def run(
    network: Annotated[str, typer.Option(metavar="NAME", help="A classifier of torchvision's.")] = "resnet18",
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds of all tools, in turns.")] = 5,
    images: Annotated[int, typer.Option(min=2, max=100_000, help="Images in a pass.")] = 64,
    batch_size: Annotated[int, typer.Option(min=2, max=10_000, help="Images in a batch.")] = 32,
    image_size: Annotated[int, typer.Option(min=32, max=1024, help="Height and width in pixels.")] = 224,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1; errors are measured on the CPU.")] = "cpu",
    as_json: JsonOption = False,
) -> int:
    """Compare population statistics with fvcore's and update_bn's: how right, and how fast."""
    result = bench_population(
        network=network,
        num_rounds=rounds,
        num_images=images,
        batch_size=batch_size,
        image_size=image_size,
        device=device,
        report=print_note,
    )
    print_json(result) if as_json else show_population_bench(result)
    return 0


def show_population_bench(result: PopulationBench) -> None:
    """Errors of each tool on the hard data, then what a pass of each costs."""
    console = console_for_results()
    show_lines(
        console,
        {
            "machine": machine_line(result.machine),
            "data": f"mean {result.data_mean:g}, deviation {result.data_deviation:g}, float32",
        },
    )
    console.print()
    tools = list(result.errors[0].mean)
    table = table_of("Largest relative error, against float64", "batches", "of", *tools, left=2)
    for errors in result.errors:
        table.add_row(errors.cut, "mean", *(number(errors.mean[tool]) for tool in tools))
        table.add_row("", "variance", *(number(errors.var[tool]) for tool in tools))
    console.print(table)
    console.print()
    table = table_of("One measurement, in turns", "tool", "seconds", "ratio", "from", "to")
    for one in result.times:
        ratios = (f"{value:.3f}" for value in (one.ratio, one.ratio_min, one.ratio_max))
        table.add_row(one.tool, f"{one.seconds:.3f}", *ratios)
    console.print(table)
    console.print()
    share = result.exact_forward_passes / result.num_layers
    show_lines(
        console,
        {
            "network": f"{result.network}, {result.num_layers} BatchNorm layers",
            "images": f"{result.num_images:,} of {result.image_size}x{result.image_size},"
            f" in batches of {result.batch_size}; {result.device}, {plural(result.threads, 'thread')}",
            "ratio": f"to the plain forward pass, in eval mode; median of n = {result.num_rounds} rounds",
            "exact": f"{result.exact_forward_passes:.2f} forward passes in FLOPs, {share:.2f} a layer",
        },
    )


if __name__ == "__main__":
    sys.exit(main(program=app, name="python -m tests.benchmarks.population"))
