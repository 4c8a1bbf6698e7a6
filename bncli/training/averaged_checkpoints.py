"""What averages of checkpoints are worth, with running statistics made in each of the ways that there are."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bncli.batchnorm import Recalibration
from bncli.checkpoints import AverageState, average_checkpoints
from bncli.checkpoints.average import (
    COMBINATIONS,
    Averaging,
    Combination,
    check_one_network,
    read_tensors,
)
from bncli.data import Dataset
from bncli.errors import BncliError
from bncli.evaluation import Outcomes, PairedDifference, Score, compare_outcomes
from bncli.evaluation.gap import PhaseProgress
from bncli.runtime import Runtime
from bncli.training.recalibrated import Calibration, outcomes_on_test, recalibrate_network

Read = Callable[[Path], Mapping[str, Tensor]]  # a file to its tensors, by the names of the first one
Statistics = Literal["recalibrate", "pooled", "average", "first"]


@dataclass(frozen=True, eq=False)
class Judge:
    """A placed network in eval mode, and the images by which averages of its checkpoints are judged."""

    model: nn.Module
    names: Mapping[str, str]  # of the network's tensors: their names in the checkpoints
    dataset: Dataset
    runtime: Runtime
    how: Calibration
    eval_batch_size: int
    evaluates: bool  # else the network is recalibrated only
    progress: PhaseProgress = lambda phase, done, total: None

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put an average into the network."""
        state = self.model.state_dict(keep_vars=True)
        for name, origin in self.names.items():
            state[name].copy_(tensors[origin])

    def outcomes(self, phase: str) -> Outcomes:
        """What the network makes of every test image."""
        with self.runtime.autocast():
            return outcomes_on_test(
                self.model, self.dataset, self.runtime, self.eval_batch_size, phase, self.progress
            )

    def recalibrate(self) -> tuple[Recalibration, dict[str, Tensor]]:
        """Measure the network's running statistics; they, by their names in the checkpoints, on the CPU."""
        made = recalibrate_network(
            self.model,
            self.dataset,
            self.runtime,
            self.how,
            eval_batch_size=self.eval_batch_size,
            evaluate=False,
            progress=self.progress,
        )
        measured = {layer.name for layer in made.recalibration.layers}
        statistics = {
            self.names[name]: value.to("cpu", copy=True)
            for name, value in self.model.state_dict().items()
            if name.rpartition(".")[0] in measured
            and name.endswith(("running_mean", "running_var"))
            and name in self.names
        }
        return made.recalibration, statistics


@dataclass(frozen=True)
class JudgedSource:
    """One of the checkpoints, as it is."""

    path: str
    share: float  # of the average; 0 where it was left out
    score: Score | None  # on the test split, in eval mode; None: not evaluated


@dataclass(frozen=True, eq=False)
class AveragedCheckpoint:
    """An average, and what it is worth beside the checkpoints that it was made from."""

    state_dict: dict[str, Tensor]  # with the names of the first checkpoint, on the CPU
    sources: tuple[JudgedSource, ...]
    statistics: Statistics  # of the state dict
    scores: Mapping[str, Score]  # of the averaged weights with each kind of running statistics
    against_best: PairedDifference | None  # the average against the best source; None: not evaluated
    recalibration: Recalibration | None  # None: no images were needed
    num_averaged: int  # tensors

    def to_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return {
            "sources": [asdict(source) for source in self.sources],
            "statistics": self.statistics,
            "num_averaged_tensors": self.num_averaged,
            "scores": {how: asdict(score) for how, score in self.scores.items()},
            "against_best": None if self.against_best is None else asdict(self.against_best),
            "num_images": None if self.recalibration is None else self.recalibration.num_images,
        }


def average_and_judge(
    sources: Sequence[Path],
    shares: Sequence[float],
    statistics: Statistics,
    judge: Judge | None,
    *,
    key: str | None = None,
    read: Read | None = None,
    greedy: bool = False,
) -> AveragedCheckpoint:
    """Average checkpoints, give the average running statistics, and compare it with what it was made from.

    With `greedy` checkpoints are tried from the best to the worst, and one stays in the average if that does
    not lower its accuracy (Wortsman et al. 2022, model soups): on the test split, which is no independent
    judge afterwards. `read` gives all tensors of a file, in place of `read_tensors`, and may refuse it. One
    file is in memory at a time, beside the sum; it is read once, and once more where `greedy` tries it.

    Raises:
        CheckpointError: naming a file that cannot be read, is of another network, or holds a NaN.
        BncliError: `greedy` without a judge that evaluates, `recalibrate` without any.
    """
    evaluator = judge if judge is not None and judge.evaluates else None
    if statistics == "recalibrate" and judge is None:
        raise BncliError("running statistics are measured on images, and there are none")
    if greedy and evaluator is None:
        raise BncliError("greedy averaging compares accuracies: it needs labelled images")
    check_one_network(sources, key)  # before any of them is evaluated
    alone: list[Outcomes | None] = [None] * len(sources)
    if read is None and evaluator is None:
        state = average_checkpoints(sources, shares=shares, key=key)
    else:
        read = read or partial(read_tensors, key=key)
        averaging = Averaging.like(sources[0], key)
        for index, (source, share) in enumerate(zip(sources, shares, strict=True)):
            tensors = read(source)
            averaging.add(source, tensors, 0 if greedy else share)
            if evaluator is not None:
                evaluator.load(tensors)
                del tensors
                alone[index] = evaluator.outcomes(source.name)
        if evaluator is not None and greedy:
            state = _chosen(sources, shares, statistics, evaluator, averaging, read, alone)
        else:
            state = averaging.state(shares)
        del averaging
    chosen, recalibration = _statistics_of(state, statistics, judge)
    scores: dict[str, Score] = {}
    difference = None
    if evaluator is not None:
        made: dict[str, Outcomes] = {}
        if recalibration is not None:  # it is in the network at this moment
            made["recalibrate"] = evaluator.outcomes("average, recalibrated")
        for how in COMBINATIONS:
            evaluator.load(state.with_statistics(how))
            made[how] = evaluator.outcomes(f"average, statistics {how}")
        scores = {how: outcomes.score for how, outcomes in made.items()}
        used = [one for one, share in zip(alone, state.shares, strict=True) if one is not None and share]
        best = max(used, key=lambda outcomes: outcomes.score.accuracy)
        difference = compare_outcomes(best, made[statistics])
    judged = (
        JudgedSource(str(source), share, None if one is None else one.score)
        for source, share, one in zip(sources, state.shares, alone, strict=True)
    )
    return AveragedCheckpoint(
        chosen, tuple(judged), statistics, scores, difference, recalibration, state.num_averaged
    )


def _statistics_of(
    state: AverageState, statistics: Statistics, judge: Judge | None
) -> tuple[dict[str, Tensor], Recalibration | None]:
    """The whole state dict with running statistics of this kind; measured ones are in the network then."""
    if statistics != "recalibrate":
        return state.with_statistics(statistics), None
    assert judge is not None  # average_and_judge has checked it
    start: Combination = "pooled"
    tensors = state.with_statistics(start)
    judge.load(tensors)
    recalibration, measured = judge.recalibrate()
    dtypes = {name: tensors[name].dtype for name in measured}
    return tensors | {name: value.to(dtypes[name]) for name, value in measured.items()}, recalibration


def _chosen(
    sources: Sequence[Path],
    shares: Sequence[float],
    statistics: Statistics,
    judge: Judge,
    averaging: Averaging,
    read: Read,
    alone: Sequence[Outcomes | None],
) -> AverageState:
    """The average, begun with nothing, of those that greedy averaging keeps; the others' share is 0."""
    accuracies = [-1.0 if one is None else one.score.accuracy for one in alone]
    order = sorted(range(len(sources)), key=lambda index: -accuracies[index])
    kept, best = [0.0] * len(sources), -1.0
    for index in order:
        if not shares[index]:
            continue
        with_it = averaging.copy()
        with_it.add(sources[index], read(sources[index]), shares[index])
        tried = [*kept]
        tried[index] = shares[index]
        tensors, _ = _statistics_of(with_it.state(tried), statistics, judge)
        judge.load(tensors)
        accuracy = judge.outcomes(f"average with {sources[index].name}").score.accuracy
        if accuracy >= best:
            averaging, kept, best = with_it, tried, accuracy
    return averaging.state(kept)
