"""What several ways make of the running statistics of one training in two processes: a table.

    python -m tests.distributed.comparison [OVERRIDE ...]

The weights are the same in all lines but the last: each process computes half of each batch, and gradients
are averaged. Only what becomes of the running statistics differs. All is computed in float64, so that the
ways can be told from rounding. The truth is twofold: the running statistics of one process that computes the
same parts in their order, and the population statistics of the training images at the final weights. An error
is the worst channel's: of a mean in standard deviations, of a variance relative to itself.

timm is not imported: `distribute_bn(reduce=True)` sums running_mean and running_var over the processes and
divides both by their number, says its documentation.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn

from bncli.batchnorm import batch_norm_layers, measure_population
from bncli.checkpoints import load_model
from bncli.config_file import load_config
from bncli.data import sequential_batches
from bncli.distributed import LastWords, Processes, launched, processes
from bncli.evaluation import evaluate
from bncli.training import Setup, prepare, train
from bncli.training.losses import loss_and_logits
from bncli.training.run import Run
from tests.distributed.torchrun import torchrun

NUM_RANKS = 2
DEFAULTS = [
    "data.num_train=3000",
    "data.num_test=1000",
    "train.epochs=3",
    "train.batch_size=100",
    "train.micro_batch_size=50",
    "train.learning_rate=0.2",
    "runtime.precision=float32",
    "runtime.threads=1",
    "runtime.device=cpu",
]
Buffers = dict[str, Tensor]


@dataclass(frozen=True)
class Line:
    """One way."""

    name: str
    mean_error: float  # against one process
    var_error: float
    population_mean_error: float  # against the training images
    population_var_error: float
    accuracy: float  # in eval mode


def ddp_run(setup: Setup, team: Processes, *, broadcast: bool) -> nn.Module:
    """The plain loop of everybody: DistributedDataParallel, each process with its half of each batch."""
    run = Run.start(Setup(**{**setup.__dict__, "processes": None}))
    model = setup.model
    wrapped = DistributedDataParallel(model, broadcast_buffers=broadcast)
    model.train()
    for epoch in range(setup.config.train.epochs):
        run.epoch = epoch
        for images, labels in run.batches():
            half = slice(team.rank * len(labels) // NUM_RANKS, (team.rank + 1) * len(labels) // NUM_RANKS)
            run.set_learning_rate(run.step)
            run.optimizer.zero_grad()
            outputs = wrapped(setup.runtime.place(images[half]))
            loss_and_logits(outputs, labels[half], setup.config.train.label_smoothing)[0].backward()
            run.optimizer.step()
            run.step += 1
    return model


def reduced(model: nn.Module) -> Buffers:
    """As timm's `distribute_bn(reduce=True)` leaves them."""
    found = {}
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            total = buffer.clone()
            dist.all_reduce(total)
            found[name] = total / NUM_RANKS
    return found


def refusal_of_sync() -> str:
    """What PyTorch says to its own SyncBatchNorm where there is no GPU."""
    try:
        DistributedDataParallel(nn.SyncBatchNorm(3))
    except ValueError as error:
        return str(error)
    return "trains"


def statistics_of(model: nn.Module) -> Buffers:
    return {
        name: buffer.clone()
        for name, buffer in model.named_buffers()
        if name.endswith(("running_mean", "running_var"))
    }


def worker(folder: Path, overrides: list[str]) -> None:
    """One of the processes: leaves what each way makes of the buffers."""
    torch.set_default_dtype(torch.float64)
    config = load_config(None, [*DEFAULTS, *overrides])
    launch = launched()
    assert launch is not None
    words = LastWords(launch)
    found: dict[str, Buffers] = {}
    with processes(words, torch.device("cpu")) as team:
        assert team is not None
        for broadcast in (True, False):
            setup = prepare(config, processes=team)
            model = ddp_run(setup, team, broadcast=broadcast)
            if broadcast:
                found["DDP as it comes, rank 0"] = statistics_of(model)
                for rank, own in enumerate(team.gather_values(statistics_of(model))):
                    if rank:
                        found[f"DDP as it comes, rank {rank}"] = own
                found["the same, timm's reduce"] = reduced(model)
            else:
                found["no broadcasts, timm's reduce"] = reduced(model)
        refusal = refusal_of_sync()  # the constructor of DDP exchanges something first
        if team.is_main:
            half = range(0, len(setup.dataset.train), NUM_RANKS)  # as DistributedSampler deals
            images = setup.dataset.train.images[torch.tensor(half)]
            update_bn(images.split(config.train.micro_batch_size or 50), model)
            found["update_bn on rank 0, its images"] = statistics_of(model)
            (folder / "sync.txt").write_text(refusal)
            torch.save({"ways": found, "weights": dict(model.named_parameters())}, folder / "ways.pt")
    train(config, folder / "bncli", words=words)
    whole = load_config(
        None, [*DEFAULTS, *overrides, "train.micro_batch_size=null", "model.batch_norm.sync=true"]
    )
    train(whole, folder / "sync", words=words)


def compare(overrides: list[str], folder: Path) -> list[Line]:
    """All ways, from one launch and two trainings in this process."""
    config = load_config(None, [*DEFAULTS, *overrides])
    done = torchrun(
        NUM_RANKS, "-m", "tests.distributed.comparison", "--worker", folder, *overrides, timeout=3600
    )
    if done.code:
        raise SystemExit(done.err)
    saved = torch.load(folder / "ways.pt", weights_only=True)
    torch.set_default_dtype(torch.float64)
    try:
        train(config, folder / "one")
        model, setup = load_model(folder / "one" / "last.pt").double(), prepare(config)
        ways: dict[str, Buffers] = {
            **saved["ways"],
            "bncli": statistics_of(load_model(folder / "bncli" / "last.pt").double()),
            "one process": statistics_of(model),
        }
        for name, weight in model.named_parameters():  # it is one training
            torch.testing.assert_close(saved["weights"][name], weight, rtol=1e-6, atol=1e-8)
        truth = statistics_of(model)
        lines = [line_of(name, buffers, truth, model, setup) for name, buffers in ways.items()]
        whole = load_config(None, [*DEFAULTS, *overrides, "train.micro_batch_size=null"])
        train(whole, folder / "whole")
        model = load_model(folder / "whole" / "last.pt").double()
        synced = statistics_of(load_model(folder / "sync" / "last.pt").double())
        lines.append(line_of("bncli with sync (other weights)", synced, statistics_of(model), model, setup))
    finally:
        torch.set_default_dtype(torch.float32)
    return lines


def line_of(name: str, buffers: Buffers, truth: Buffers, model: nn.Module, setup: Setup) -> Line:
    """Errors and accuracy of a network with these buffers in place of its own."""
    size = setup.norm_batch_size
    images = lambda: (each for each, _ in sequential_batches(setup.dataset.train, size))  # noqa: E731
    measured = measure_population(model, images)
    population = {}
    for layer in measured.layers:
        population[f"{layer.name}.running_mean"] = layer.moments.mean
        population[f"{layer.name}.running_var"] = layer.moments.variance()
    model.load_state_dict(buffers, strict=False)
    accuracy = evaluate(model, sequential_batches(setup.dataset.test, 250)).accuracy
    model.load_state_dict(truth, strict=False)
    names = [layer for layer, _ in batch_norm_layers(model)]
    return Line(name, *errors(buffers, truth, names), *errors(buffers, population, names), accuracy)


def errors(found: Buffers, truth: Buffers, names: list[str]) -> tuple[float, float]:
    """The worst channel's: of means in standard deviations, of variances relative to themselves."""
    mean = var = 0.0
    for name in names:
        true_mean, true_var = (truth[f"{name}.running_{kind}"].double() for kind in ("mean", "var"))
        own_mean, own_var = (found[f"{name}.running_{kind}"].double() for kind in ("mean", "var"))
        mean = max(mean, float(((own_mean - true_mean).abs() / (true_var + 1e-5).sqrt()).max()))
        var = max(var, float(((own_var + 1e-5) / (true_var + 1e-5) - 1).abs().max()))
    return mean, var


def show(lines: list[Line], refusal: str) -> None:
    print(f"{'':32}  {'one process':>17}  {'training images':>17}  {'':>8}")
    print(f"{'':32}  {'mean':>8} {'var':>8}  {'mean':>8} {'var':>8}  accuracy")
    for line in lines:
        print(
            f"{line.name:32}  {line.mean_error:8.1e} {line.var_error:8.1e}  {line.population_mean_error:8.1e}"
            f" {line.population_var_error:8.1e}  {line.accuracy:8.2%}"
        )
    print(f"torch.nn.SyncBatchNorm on a CPU: {refusal}")


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--worker"]:
        worker(Path(arguments[1]), arguments[2:])
        return
    with tempfile.TemporaryDirectory(prefix="bncli-comparison-") as folder:
        show(compare(arguments, Path(folder)), (Path(folder) / "sync.txt").read_text())


if __name__ == "__main__":
    main(sys.argv[1:])
