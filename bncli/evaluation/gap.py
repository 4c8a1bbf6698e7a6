"""The gap between train mode and eval mode, taken apart: is BatchNorm to blame, and which layer?

The same test images are computed four times, each time with other statistics in the BatchNorm layers and
everything else, dropout too, in eval mode: the running statistics as they are; the batch statistics of the
test batches; and the population statistics of the training images, measured in the two ways of
`batchnorm/population/measure.py`. What exact population statistics gain over the running ones is what
BatchNorm explains, and what `recalibrate` would bring.

A layer is self-consistent if what enters it in eval mode has the mean and variance that it normalises by.
Behind a stale layer others look stale too, so the score does not name the culprit; a trial does. Each layer
is repaired alone, with the moments of its real input while all others stay as they are: one pass measures
that for all layers at once, and each trial is one pass over some test images. The repair of a later layer can
make up for an earlier fault (a deviation that is too large, say, scales everything behind it), so of layers
whose repairs do about equally well the earliest is named. If there are many layers, only the least
consistent are tried, and the first inconsistent one: what lies before it is in order, so it is stale by its
own fault.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bncli.batches import Batches, GetTensor, check_repeatable
from bncli.batchnorm.distance import nan_as_farthest
from bncli.batchnorm.layers import write_statistics
from bncli.batchnorm.modes import batch_statistics_mode, eval_mode, preserved_buffers
from bncli.batchnorm.population.measure import Method, measure_population
from bncli.batchnorm.population.moments import Moments
from bncli.batchnorm.population.one_pass import Share, measure_pass
from bncli.batchnorm.population.recalibrate import apply_population
from bncli.batchnorm.population.selection import select_layers
from bncli.batchnorm.population.verify import distance_from
from bncli.distributed.ranks import Ranks
from bncli.distributed.shards import without_repeats
from bncli.distributed.wrapped import as_written, whole_parameters
from bncli.evaluation.outcomes import (
    Outcomes,
    PairedDifference,
    Score,
    compare_outcomes,
    is_loss_far_lower,
    measure_outcomes,
)
from bncli.wording import list_names

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

NUM_TRIAL_IMAGES = 1_000
MAX_TRIALS = 16  # layers repaired alone, each at the price of NUM_TRIAL_IMAGES
INCONSISTENT = 0.1  # the score from which a layer counts as stale, in deviations
STALE = 0.5  # the score from which a layer is named though no gain was seen: sound networks have less
MAX_STANDARD_ERROR = 0.02  # of a gain in accuracy, above which none can be ruled out

SOURCES = {
    "running": "running statistics, as in eval mode",
    "batch": "batch statistics, dropout off",
    "precise": "population statistics, precise",
    "exact": "population statistics, exact",
}

PhaseProgress = Callable[[str, int, int | None], None]
"""Called as `progress(phase, images done in it, images in all)` after every batch; None: not known yet."""


@dataclass(frozen=True)
class LayerGap:
    """One layer's part in the gap."""

    name: str
    # RMS over channels of (shift**2 + log(ratio)**2)**0.5: shift of running_mean from the mean of the real
    # input, in its deviations, and ratio of running_var to its variance, eps added to both. 0: a fixed point
    self_consistency: float
    mean_shift_in_input_deviations: float  # RMS over channels
    var_ratio: float  # geometric mean over channels
    recovered: float | None  # accuracy gained if this layer alone is repaired; None: not tried


@dataclass(frozen=True)
class Gap:
    """Accuracy and loss of the same images by where BatchNorm takes its statistics from."""

    num_images: int
    num_calibration_images: int  # training images that the population statistics were measured on
    num_trial_images: int  # test images on which single layers were repaired; 0: no reason to try
    running: Score
    batch: Score
    precise: Score
    exact: Score
    explained: PairedDifference  # exact against running statistics: what BatchNorm is to blame for
    beyond: PairedDifference  # batch against exact population statistics: what recalibration cannot bring
    layers: tuple[LayerGap, ...]  # in order of execution
    worst_layer: (
        str | None
    )  # whose repair alone recovers most; None: nothing to recover, or none recovers any

    @property
    def batch_norm_is_to_blame(self) -> bool:
        """Whether exact population statistics are better than the running ones beyond chance."""
        return self.explained.is_gain or self.loss_is_to_blame

    @property
    def loss_is_to_blame(self) -> bool:
        """Whether they are so in the loss alone, and by far: accuracy does not show it."""
        return not self.explained.is_gain and is_loss_far_lower(self.running, self.exact, self.explained)

    @property
    def points(self) -> float:
        """The whole gap: what the best of the four gains over the running statistics, as a fraction."""
        best = max(score.accuracy for score in self.scores().values())
        return best - self.running.accuracy

    @property
    def verdict(self) -> str:
        """What BatchNorm explains, and what to do."""
        change = (
            f"{100 * self.explained.accuracy:+.2f} points of accuracy"
            f" (standard error {100 * self.explained.accuracy_standard_error:.2f})"
        )
        if self.loss_is_to_blame:
            return (
                "The running statistics are stale: exact population statistics lower the loss from"
                f" {self.running.loss:.4g} to {self.exact.loss:.4g}, though accuracy does not show it"
                f" ({change}). Run bncli recalibrate, or train for more steps."
            )
        if self.batch_norm_is_to_blame:
            more = ""
            if self.beyond.is_gain:
                more = (
                    f" Their own batch statistics gain the test images {100 * self.beyond.accuracy:.1f} more:"
                    " they look different from training images."
                )
            return (
                "The running statistics are stale: exact population statistics gain"
                f" {100 * self.explained.accuracy:.1f} points of accuracy. {self._culprit()}"
                f" Run bncli recalibrate.{more}"
            )
        if self.beyond.is_gain:
            return (
                f"The running statistics are not stale: exact population statistics give {change}. But the"
                f" test images' own batch statistics gain {100 * self.beyond.accuracy:.1f} points: test"
                " images look different from training images; check how both are preprocessed."
            )
        if self.explained.is_loss:
            return (
                f"No gain: exact population statistics would lose accuracy, {change}; the running statistics"
                " suit the test images better, and BatchNorm is not to blame."
            )
        stale = [layer.name for layer in self.layers if nan_as_farthest(layer.self_consistency) > STALE]
        if stale and self.explained.accuracy_standard_error > MAX_STANDARD_ERROR:
            return (
                f"{self.num_images:,} test images are too few to tell: exact population statistics give"
                f" {change}. But running statistics do not fit their layers' inputs in"
                f" {list_names(stale, 3)}: try bncli recalibrate, or give more test images."
            )
        return (
            f"No gain beyond chance: exact population statistics give {change}; nothing here says that"
            " BatchNorm is to blame."
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON document: all fields, and what follows from them."""
        return {
            **asdict(self),
            "batch_norm_is_to_blame": self.batch_norm_is_to_blame,
            "loss_is_to_blame": self.loss_is_to_blame,
            "points": self.points,
            "verdict": self.verdict,
        }

    def __str__(self) -> str:
        """The four accuracies, and the verdict."""
        scores = [
            f"{SOURCES[name]:36} {score.accuracy:7.2%}, loss {score.loss:.4f}"
            for name, score in self.scores().items()
        ]
        return "\n".join([f"{self.num_images:,} test images with", *scores, self.verdict])

    def scores(self) -> dict[str, Score]:
        """The four, by where the statistics come from: the keys of SOURCES."""
        return {
            "running": self.running,
            "batch": self.batch,
            "precise": self.precise,
            "exact": self.exact,
        }

    def _culprit(self) -> str:
        worst = next((layer for layer in self.layers if layer.name == self.worst_layer), None)
        if worst is None or worst.recovered is None:
            return "To repair a single layer gains nothing."
        gain = f"gains {100 * worst.recovered:.1f}"
        if self.num_trial_images < self.num_images:
            gain += f" (on {self.num_trial_images:,} of the images)"
        if worst.recovered >= 0.9 * self.explained.accuracy:
            return f"Layer {worst.name} is to blame: to repair it alone {gain}."
        return f"Several layers are to blame, {worst.name} most of all: to repair it alone {gain}."


def measure_gap(
    model: nn.Module,
    test_batches: Batches,
    training_batches: Batches,
    *,
    group: "ProcessGroup | None" = None,
    get_input: GetTensor | None = None,
    get_labels: GetTensor | None = None,
    progress: PhaseProgress = lambda phase, done, total: None,
) -> Gap:
    """Take the gap of any classifier apart; it is left as it was: modes, buffers, hooks.

    `test_batches` are labelled, the same each time, in an order in which every batch is a sample of all
    classes. `training_batches` are unaugmented training images. Both can be gone through again: see
    `bncli.batches`. For another precision call this inside `torch.autocast`. With a process `group` every
    rank has its own part of both, and gets the result of all: see `measure_population`.

    Raises DataError for batches that cannot be used, BncliError if no layer has running statistics, or
    a batch holds a single value per channel.
    """
    model, ranks = as_written(model), Ranks.of(group)
    check_repeatable(test_batches)
    training_batches = without_repeats(training_batches, get_input)

    num_test: int | None = None  # known after the first pass

    def test(phase: str, num_images: int | None = None) -> Outcomes:
        return measure_outcomes(
            model,
            test_batches,
            num_images=num_images,
            group=group,
            get_input=get_input,
            get_labels=get_labels,
            progress=lambda done: progress(phase, done, num_images or num_test),
        )

    with preserved_buffers(model), eval_mode(model):
        layers = select_layers(model).layers
        running = test("test images under running statistics")
        num_test = len(running.right)
        with batch_statistics_mode(model):
            batch = test("test images under batch statistics")
        with ranks.together(), whole_parameters(model):
            seen = measure_pass(
                model,
                training_batches,
                layers,
                share=Share.of(ranks, None),
                progress=lambda done: progress("training images, every layer as it is", done, None),
            )
        found = {name: tree.total() for name, tree in seen.trees.items()}
        consistency = [_consistency(name, layers[name], moments) for name, moments in found.items()]
        precise, exact = (
            _under_population(model, training_batches, seen.num_images, method, group, test, progress)
            for method in ("precise", "exact")
        )
        explained = compare_outcomes(running, exact)
        trials = _try_repairs(consistency, layers, found, test) if explained.is_gain else {}
    consistency = _with_recovered(consistency, running, trials)
    return Gap(
        num_images=len(running.right),
        num_calibration_images=seen.num_images,
        num_trial_images=max((len(trial.right) for trial in trials.values()), default=0),
        running=running.score,
        batch=batch.score,
        precise=precise.score,
        exact=exact.score,
        explained=explained,
        beyond=compare_outcomes(exact, batch),
        layers=tuple(consistency),
        worst_layer=_worst(consistency),
    )


def _under_population(
    model: nn.Module,
    batches: Batches,
    num_images: int,
    method: Method,
    group: "ProcessGroup | None",
    test: Callable[[str], Outcomes],
    progress: PhaseProgress,
) -> Outcomes:
    """The test images under population statistics, which are taken away again."""
    population = measure_population(
        model,
        batches,
        method=method,
        group=group,
        progress=lambda number, of, done: progress(
            f"training images, {method}, pass {number} of {of}" if of > 1 else f"training images, {method}",
            done,
            num_images,
        ),
    )
    with preserved_buffers(model):
        apply_population(model, population)
        return test(f"test images under {method} population statistics")


def _consistency(name: str, layer: _BatchNorm, seen: Moments) -> LayerGap:
    found = distance_from(layer, seen)
    score = float((found.squared_mean_shift + found.var_ratio.log().square()).mean().sqrt())
    return LayerGap(name, score, found.rms_mean_shift, found.mean_var_ratio, None)


def _try_repairs(
    consistency: list[LayerGap],
    layers: dict[str, _BatchNorm],
    found: dict[str, Moments],
    test: Callable[[str, int], Outcomes],
) -> dict[str, Outcomes]:
    """The first test images with each shortlisted layer repaired alone, in order of execution."""
    shortlist = _shortlist(consistency)
    trials = {}
    for name, moments in found.items():
        if name in shortlist:  # what lies behind a NaN is repaired with NaN, and recovers nothing
            with preserved_buffers(layers[name]):
                write_statistics(layers[name], moments.mean, moments.variance())
                trials[name] = test(f"test images with {name} repaired", NUM_TRIAL_IMAGES)
    return trials


def _shortlist(consistency: list[LayerGap]) -> set[str]:
    """The least consistent layers; a score that is no number is the worst."""
    by_score = sorted(consistency, key=lambda gap: nan_as_farthest(gap.self_consistency), reverse=True)
    first = [gap for gap in consistency if nan_as_farthest(gap.self_consistency) > INCONSISTENT][:1]
    return {gap.name for gap in (first + by_score)[:MAX_TRIALS]}


def _with_recovered(
    consistency: list[LayerGap], running: Outcomes, trials: dict[str, Outcomes]
) -> list[LayerGap]:
    """The same layers, with what the repair of each alone recovered."""
    return [
        replace(gap, recovered=compare_outcomes(_first(running, trials[gap.name]), trials[gap.name]).accuracy)
        if gap.name in trials
        else gap
        for gap in consistency
    ]


def _worst(consistency: list[LayerGap]) -> str | None:
    """The layer whose repair alone recovers most; of those within a tenth of it, the earliest.

    The repair of a later layer can make up for an earlier fault, never the other way round. Layers that are
    ten times as consistent as the worst are out of the question.
    """
    worst_score = max((nan_as_farthest(gap.self_consistency) for gap in consistency), default=0.0)
    suspects = {
        gap.name: gap.recovered
        for gap in consistency
        if gap.recovered is not None and nan_as_farthest(gap.self_consistency) >= worst_score / 10
    }
    most = max(suspects.values(), default=0.0)
    return next((name for name, part in suspects.items() if part >= 0.9 * most), None) if most > 0 else None


def _first(outcomes: Outcomes, like: Outcomes) -> Outcomes:
    """As many images from the start as the other has."""
    return Outcomes(outcomes.right[: len(like.right)], outcomes.losses[: len(like.right)])
