"""Training on a GPU: the card's peak, the time of a step in several ways, then whole runs beside the rival's.

    python -m tests.benchmarks.gpu.speed OUT --data DATA [--device cpu --small]

Whole runs alternate: seed 0 of the rival, of each of our recipes, then seed 1. Everything is written as it is
measured (`results.py`).
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bncli import load_config
from bncli.config import Config
from bncli.data import Split
from bncli.models.convnet import measure_layers
from bncli.runtime import resolve_device, synchronize
from tests.benchmarks.gpu.ours import EAGER, Ours
from tests.benchmarks.gpu.results import Results
from tests.benchmarks.gpu.rival import Finished, Rival

CONFIG = Path(__file__).parents[3] / "configs" / "speedrun.yaml"
# a GPU has room for whole batches; of 8 parts of a batch each took its share of momentum
WHOLE_BATCHES = ("train.micro_batch_size=null", "model.batch_norm.momentum=0.4")
RECIPES = {  # by name; the first is the one whose steps are timed
    "8 epochs": ("train.epochs=8", "augment.small_epochs=0", "train.ema_epochs=null"),
    "8 epochs, 3 small": ("train.epochs=8", "augment.small_epochs=3", "train.ema_epochs=null"),
    "8 epochs, 4 small": ("train.epochs=8", "augment.small_epochs=4", "train.ema_epochs=null"),
    "8 epochs, 3 small, averaged": ("train.epochs=8", "augment.small_epochs=3"),
}
# how steps are computed (see `Ours`); reduce-overhead and max-autotune have CUDA graphs
MODES = (
    EAGER,
    "eager+cudnn",
    "reduce-overhead+cudnn",
    "max-autotune+cudnn",
    "max-autotune+cudnn+muon",
    "default+cudnn",
)
NEEDED = {EAGER: 10, "default": 60, "reduce-overhead": 60, "max-autotune": 150}  # seconds, with compiling
SMALL = (  # for a CPU: two steps an epoch of a network that learns nothing
    "model.widths=[4, 8, 8]",
    "train.batch_size=100",
    "train.epochs=2",
    "runtime.threads=1",
)
SMALL_IMAGES = 256


class Measured:
    """What the phases share: data and device, and what is known so far."""

    def __init__(self, arguments: argparse.Namespace, results: Results) -> None:
        self.arguments, self.results = arguments, results
        self.device = resolve_device(arguments.device)
        self.peak: float | None = None  # of bfloat16 products, in FLOP/s
        self.mode = arguments.mode  # the fastest of our step's, once that is measured
        self._ours: dict[tuple[str, str], Ours] = {}
        self._rival: Rival | None = None

    def config(self, recipe: str) -> Config:
        """Of a recipe, on the data and the device that are asked for."""
        arguments = self.arguments
        data = [f"data.root={arguments.data}"]
        if arguments.data is None:
            data = ["data={name: synthetic, num_train: 20000, num_test: 2000}"]
        small = SMALL if arguments.small else ()
        overrides = [*WHOLE_BATCHES, *RECIPES[recipe], f"runtime.device={arguments.device}", *small, *data]
        if arguments.small and arguments.data is None:
            overrides[-1] = f"data={{name: synthetic, num_train: {SMALL_IMAGES}, num_test: 100}}"
        return load_config(CONFIG, overrides)

    def ours(self, recipe: str, mode: str) -> Ours:
        """Made once: what is compiled for one recipe serves the others of the same shapes."""
        if (recipe, mode) not in self._ours:
            made = Ours(self.config(recipe), mode)
            for (_, other_mode), other in self._ours.items():
                if other_mode == mode:  # the same network, with the functions that were compiled for it
                    made.share(other)
                    break
            self._ours[recipe, mode] = made
        return self._ours[recipe, mode]

    def rival(self) -> Rival:
        """The rival, on the same images."""
        if self._rival is None:
            ours = self.ours(next(iter(RECIPES)), EAGER)
            train, test = ours.setup.dataset.train, ours.test
            assert isinstance(train, Split) and isinstance(test, Split)
            is_cuda = self.device.type == "cuda"
            sizes: dict[str, Any] = {}
            if self.arguments.small:
                sizes = {"widths": (4, 8, 8), "epochs": 2, "batch_size": 100}
            self._rival = Rival(
                train,
                test,
                self.device,
                dtype=torch.float16 if is_cuda else torch.float32,
                mode="max-autotune" if is_cuda and not self.arguments.eager_rival else None,
                **sizes,
            )
        return self._rival


def main() -> int:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--data", help="folder that holds cifar-10-batches-py; without it synthetic images")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny networks and few images, for a CPU")
    parser.add_argument("--seconds", type=float, default=540, help="after which nothing new is begun")
    parser.add_argument("--phases", default="peak,steps,profile,runs")
    parser.add_argument("--modes", default=",".join(MODES), help="ways of computing whose steps are timed")
    parser.add_argument("--mode", help="that whole runs are computed in; without it the fastest of --modes")
    parser.add_argument("--recipes", default="8 epochs;8 epochs, 3 small;8 epochs, 4 small")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--eager-rival", action="store_true", help="do not compile the rival")
    arguments = parser.parse_args()
    results = Results(arguments.out, "speed", arguments.seconds)
    measured = Measured(arguments, results)
    phases: dict[str, Callable[[Measured], None]] = {
        "peak": measure_peak,
        "steps": measure_steps,
        "profile": profile_steps,
        "runs": measure_runs,
    }
    for phase in arguments.phases.split(","):
        phases[phase](measured)
    return 1 if results.num_failed else 0


def measure_peak(measured: Measured) -> None:
    """Products of square matrices of random numbers: on zeros a card draws less power and is faster."""
    size = 256 if measured.arguments.small else 8192
    dtypes = (torch.bfloat16,) if measured.device.type == "cpu" else (torch.bfloat16, torch.float16)
    for dtype in dtypes:

        def measure(dtype: torch.dtype = dtype) -> dict[str, Any]:
            a, b = (torch.randn(size, size, device=measured.device).to(dtype) for _ in range(2))
            seconds = _times(measured.device, lambda: a @ b, 20)
            rate = 2 * size**3 / statistics.median(seconds)
            if dtype == torch.bfloat16:
                measured.peak = rate
            best = 2 * size**3 / min(seconds)
            return {
                "dtype": str(dtype),
                "size": size,
                "tflops": rate / 1e12,
                "best_tflops": best / 1e12,
                "n": 20,
            }

        measured.results.check(f"peak {dtype}".replace("torch.", ""), measure)


def measure_steps(measured: Measured) -> None:
    """The first steps, which compile, and the time of a later one: ours in each mode, then the rival's."""
    first = next(iter(RECIPES))
    rates: dict[str, float] = {}
    for mode in measured.arguments.modes.split(","):

        def measure(mode: str = mode) -> dict[str, Any]:
            found = _step_time(measured, measured.ours(first, mode))
            rates[mode] = found["images_per_second"]
            return found

        needed = 0 if measured.arguments.small else NEEDED[mode.split("+")[0]]
        measured.results.check(f"step {mode}", measure, needs=needed)
        if len(rates) == 1:  # early: what is compiled for it is needed in any case
            measured.results.check("step of the rival", lambda: _rival_step_time(measured))
    if measured.mode is None and rates:
        measured.mode = max(rates, key=rates.__getitem__)
        measured.results.add("fastest mode", mode=measured.mode)


def _step_time(measured: Measured, ours: Ours) -> dict[str, Any]:
    seconds, waited = [], 0.0
    run = ours.start(0)
    start = time.perf_counter()
    steps = ours.steps(run)
    next(steps)
    synchronize(measured.device)
    first = time.perf_counter() - start
    num_warm = min(10, run.setup.num_steps // 4)
    for _ in range(num_warm):
        next(steps)
    synchronize(measured.device)
    start = time.perf_counter()
    num_steps = 0
    for _ in steps:
        waited = time.perf_counter() - start  # of the CPU, to say what it wants done
        num_steps += 1
        if num_steps == 100:
            break
    synchronize(measured.device)
    seconds = time.perf_counter() - start
    rate = num_steps * run.setup.plan.batch_size / seconds
    _, flops = measure_layers(run.model, run.setup.image_shape)
    return {
        "first_step_seconds": first,
        "milliseconds": 1e3 * seconds / num_steps,
        "milliseconds_until_asked": 1e3 * waited / num_steps,
        "images_per_second": rate,
        "share_of_peak": None if measured.peak is None else 3 * flops * rate / measured.peak,
        "gflop_per_image": 3 * flops / 1e9,
        "n": num_steps,
    }


def _rival_step_time(measured: Measured) -> dict[str, Any]:
    rival = measured.rival()
    torch.manual_seed(0)
    rival.network.begin(rival.train[:1000])
    start = time.perf_counter()
    rival.train_epochs()
    synchronize(measured.device)
    first = time.perf_counter() - start
    rival.network.begin(rival.train[:1000])
    synchronize(measured.device)
    start = time.perf_counter()
    rival.train_epochs()
    synchronize(measured.device)
    seconds = time.perf_counter() - start
    return {
        "first_run_seconds": first,
        "milliseconds": 1e3 * seconds / rival.num_steps,
        "images_per_second": rival.num_steps * rival.batch_size / seconds,
        "n": rival.num_steps,
    }


def profile_steps(measured: Measured) -> None:
    """Which kernels three steps are made of: a table beside the results, and what is waited for."""
    mode = measured.mode or EAGER

    def measure(mode: str) -> dict[str, Any]:
        ours = measured.ours(next(iter(RECIPES)), mode)
        steps = ours.steps(ours.start(0))
        for _ in range(3):
            next(steps)
        synchronize(measured.device)
        kinds = [torch.profiler.ProfilerActivity.CPU]
        is_cuda = measured.device.type == "cuda"
        if is_cuda:
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        count = 3 if not measured.arguments.small else 1
        with torch.profiler.profile(activities=kinds) as profiler:
            for _ in range(count):
                next(steps, None)
            synchronize(measured.device)
        averages = profiler.key_averages()
        sort = "self_device_time_total" if is_cuda else "self_cpu_time_total"
        path = measured.arguments.out / f"profile-{mode}.txt"
        path.write_text(averages.table(sort_by=sort, row_limit=40, max_name_column_width=70))
        launches = sum(one.count for one in averages if "LaunchKernel" in one.key)
        waits = {one.key: one.count for one in averages if "ynchronize" in one.key}
        return {"steps": count, "launches_per_step": launches / count, "waits": waits, "file": path.name}

    for one in dict.fromkeys((EAGER, mode)):
        measured.results.check(f"profile {one}", lambda one=one: measure(one), needs=5)  # type: ignore[misc]


def measure_runs(measured: Measured) -> None:
    """Whole runs in turns; what compiles at its first use is run once before, with a seed of its own."""
    mode = measured.mode or EAGER
    recipes = [name for name in measured.arguments.recipes.split(";") if name]
    contenders: dict[str, Callable[[int], Finished]] = {"rival": lambda seed: measured.rival().run(seed)}
    for recipe in recipes:
        contenders[recipe] = lambda seed, recipe=recipe: measured.ours(recipe, mode).run(seed)  # type: ignore[misc]
    found: dict[str, list[Finished]] = {name: [] for name in contenders}
    for name, run in contenders.items():  # all that it took is what loads, compiles and is tuned at first use
        measured.results.check(f"first run: {name}", lambda run=run: vars(run(10_000)))  # type: ignore[misc]
    longest = 0.0
    for seed in range(measured.arguments.seeds):
        if measured.results.seconds_left() < 1.5 * longest:
            measured.results.add("runs left out", from_seed=seed, of=measured.arguments.seeds)
            break
        start = time.perf_counter()
        for name, run in contenders.items():

            def measure(name: str = name, run: Callable[[int], Finished] = run) -> dict[str, Any]:
                found[name].append(run(seed))  # noqa: B023  # called at once
                return vars(found[name][-1])

            measured.results.check(f"seed {seed}: {name}", measure)
        longest = max(longest, time.perf_counter() - start)
        _summarize(measured, found, mode)


def _summarize(measured: Measured, found: dict[str, list[Finished]], mode: str) -> None:
    """Written after every seed, so that the last one stands whatever happens."""
    rival = [one.seconds for one in found["rival"]]
    for name, runs in found.items():
        if not runs:
            continue
        ratios = [mine.seconds / theirs for mine, theirs in zip(runs, rival, strict=False)]
        measured.results.add(
            f"mean: {name}",
            n=len(runs),
            seconds=statistics.fmean(one.seconds for one in runs),
            views_accuracy=statistics.fmean(one.views_accuracy for one in runs),
            accuracy=statistics.fmean(one.accuracy for one in runs),
            ratio_to_rival=statistics.median(ratios) if ratios else None,
            mode="max-autotune" if name == "rival" else mode,
        )


def _times(device: torch.device, work: Callable[[], object], count: int) -> list[float]:
    """Seconds of each call, after three to warm up."""
    seconds = []
    for number in range(3 + count):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        if number >= 3:
            seconds.append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    raise SystemExit(main())
