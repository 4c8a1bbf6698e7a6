"""`bncli train` without its files: the same setup, steps and checks, one seed after the other in one process.

The network is built once, so that what is compiled for it serves every seed; each seed begins with weights,
whitening and optimiser of its own, as a run of its own does.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from bncli.config import Config
from bncli.data import Dataset, Split, load_dataset
from bncli.evaluation import evaluate
from bncli.evaluation.views import evaluate_augmented
from bncli.models.configured import build_configured
from bncli.runtime import synchronize
from bncli.training import optimizer, prepare
from bncli.training import setup as setup_module
from bncli.training.last_good_step import LastGoodStep
from bncli.training.loop import check_steps, take_step
from bncli.training.optimizer import orthogonalize
from bncli.training.run import Run
from bncli.training.setup import _fit_whitening
from tests.benchmarks.gpu.rival import BATCH_SIZE, Finished

EAGER = "eager"
_read: dict[str, Dataset] = {}


def _read_once() -> None:
    """Let every setup of this process have the data that the first one read: seconds of a lent minute."""

    def load(config: Any, **options: Any) -> Dataset:
        if str(config) not in _read:
            _read[str(config)] = load_dataset(config, **options)
        return _read[str(config)]

    setup_module.load_dataset = load


class Ours:
    """A recipe, and how its training step is computed."""

    def __init__(self, config: Config, way: str) -> None:
        """`way` is `eager` or a mode of torch.compile's; `+cudnn` lets cuDNN try its algorithms, `+muon`
        compiles Muon's iteration as well.
        """
        mode, *more = way.split("+")
        _read_once()
        self.tries_algorithms = "cudnn" in more
        self.orthogonalize = torch.compile(orthogonalize) if "muon" in more else orthogonalize
        setup = prepare(config)
        # once: a setup of its own for every seed would send the images again
        self.setup = replace(setup, dataset=replace(setup.dataset, train=setup.train_split))
        self.device, test = setup.runtime.device, setup.dataset.test
        assert isinstance(test, Split)
        self.test = Split(test.images.to(self.device), test.labels.to(self.device))
        self.forward = setup.model if mode == EAGER else torch.compile(setup.model, dynamic=False, mode=mode)

    def share(self, other: "Ours") -> None:
        """Train the network of another recipe, with what is compiled for it and the images that are there."""
        self.setup = replace(
            self.setup, model=other.setup.model, dataset=other.setup.dataset, runtime=other.setup.runtime
        )
        self.forward, self.orthogonalize = other.forward, other.orthogonalize

    def start(self, seed: int) -> Run:
        """A run before its first step, and what holds for the process while it is taken."""
        torch.backends.cudnn.benchmark = self.tries_algorithms
        optimizer.orthogonalize = self.orthogonalize
        config = self.setup.config
        config = config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})})
        setup = replace(self.setup, config=config)
        height, width = config.augment.smallest_size(*setup.image_shape[1:])
        fresh = build_configured(
            config.model,
            len(setup.dataset.class_names),
            image_size=min(height, width),
            mean=setup.normalization.mean,
            std=setup.normalization.std,
            seed=seed,
        )
        setup.model.load_state_dict(fresh.state_dict())
        _fit_whitening(setup.model, setup.train_split)  # type: ignore[arg-type]
        run = Run.start(setup)
        run.forward = self.forward
        return run

    def steps(self, run: Run) -> Iterator[None]:
        """The run's steps, checked as `bncli train` checks them."""
        last_good = LastGoodStep(run)
        while run.epoch < run.setup.config.train.epochs:
            run.model.train()
            for images, labels in run.batches():
                take_step(run, last_good, images, labels)
                yield
            check_steps(run, last_good)
            run.end_epoch(None)

    def run(self, seed: int) -> Finished:
        """Train and evaluate, timed as the rival is."""
        synchronize(self.device)
        start = time.perf_counter()
        run = self.start(seed)
        for _ in self.steps(run):
            pass
        network = run.network_to_use(lambda: False)
        runtime = run.setup.runtime
        with runtime.autocast():
            views = evaluate_augmented(network, self._test_batches, "shifts")
        seconds = time.perf_counter() - start
        with runtime.autocast():
            plain = evaluate(network, self._test_batches)
        return Finished(seconds, plain.accuracy, views.accuracy)

    def _test_batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        places = torch.arange(len(self.test)).split(BATCH_SIZE)
        return ((self.setup.runtime.place(images), labels) for images, labels in self.test.batches_of(places))
