"""Population statistics: the moments of every BatchNorm layer's input over a whole data set.

They are what the running statistics estimate. Between a network's layers lies a choice:

- `precise`: every layer is measured in one pass in which all of them normalise by batch statistics (Wu &
  Johnson 2021, arXiv 2105.07576). Beyond the first layer the result depends a little on the batches.
- `exact`: layer by layer, the earlier ones already in eval mode on their new statistics. The result is a
  fixed point, independent of the batches: see `bncli.batchnorm.population.exact.layer_by_layer`.

Moments are pooled over all values, so batches count by their size and the variance between batches is kept
(law of total variance). The variance is the population's, m2 / count: the data set is the population, not
a sample of it. PyTorch's buffers hold averages of unbiased batch variances, m2 / (count - 1) of each batch;
over a data set the difference is a factor of 1 - 1 / count, less than 1e-4 from 10,000 values on.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import nn

from bncli.batches import Batches, GetTensor
from bncli.batchnorm.distance import rms
from bncli.batchnorm.population.exact.layer_by_layer import measure_exact
from bncli.batchnorm.population.merge_tree import BatchTree
from bncli.batchnorm.population.moments import Moments
from bncli.batchnorm.population.one_pass import PassProgress, Share, measure_pass
from bncli.batchnorm.population.selection import Layers, Selection, SkippedLayer, select_layers
from bncli.distributed.ranks import Ranks
from bncli.distributed.shards import without_repeats
from bncli.distributed.wrapped import as_written, whole_parameters
from bncli.errors import BncliError
from bncli.wording import plural

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Method = Literal["precise", "exact"]


@dataclass(frozen=True, eq=False)
class LayerPopulation:
    """What entered one layer, over all its uses. `standard_errors` gives what a sample says of more."""

    name: str
    batches: BatchTree
    eps: float  # the layer's, which it adds to the variance

    @property
    def moments(self) -> Moments:
        """Of all values, in one canonical order of merging: the same bits from any shards."""
        return self.batches.total()

    def standard_error(self) -> float:
        """Of the mean: RMS over channels, in deviations sqrt(variance + eps); NaN with a single batch."""
        error, _ = self.batches.standard_errors()
        return rms(error / (self.moments.variance() + self.eps).sqrt())

    def variance_standard_error(self) -> float:
        """Of the variance: RMS over channels, relative to variance + eps; NaN with a single batch."""
        _, error = self.batches.standard_errors()
        return rms(error / (self.moments.variance() + self.eps))


@dataclass(frozen=True, eq=False)
class Population:
    """What `measure_population` found. Layers are in model order."""

    method: Method
    layers: tuple[LayerPopulation, ...]
    skipped: tuple[SkippedLayer, ...]  # asked for, but not measured
    num_images: int  # in one pass
    num_batches: int
    stopped_early: bool  # because every standard error was below the tolerance
    num_passes: int
    forward_passes: float  # what it cost: 1.0 is one forward pass over all the images, counted in FLOPs

    def __str__(self) -> str:
        """How many layers, on how many images, at what cost."""
        left_alone = f", {len(self.skipped)} left alone" if self.skipped else ""
        layers, images = plural(len(self.layers), "BatchNorm layer"), plural(self.num_images, "image")
        return (
            f"population statistics ({self.method}) of {layers}{left_alone},"
            f" measured on {images} at the cost of {self.forward_passes:.2f} forward passes"
        )

    def merge(self, other: "Population") -> "Population":
        """Two shards of one data set, measured as `precise` with their own `first_batch`.

        Raises ValueError for other layers, for the method exact, whose layers depend on all images, and
        for a batch that is in both.
        """
        if (self.method, other.method) != ("precise", "precise"):
            raise ValueError("only populations measured as precise can be merged")
        if [one.name for one in self.layers] != [one.name for one in other.layers]:
            raise ValueError("these populations are of different layers")
        pairs = zip(self.layers, other.layers, strict=True)
        return Population(
            method=self.method,
            layers=tuple(LayerPopulation(a.name, a.batches.merge(b.batches), a.eps) for a, b in pairs),
            skipped=self.skipped,
            num_images=self.num_images + other.num_images,
            num_batches=self.num_batches + other.num_batches,
            stopped_early=self.stopped_early or other.stopped_early,
            num_passes=1,
            forward_passes=1.0,
        )


def measure_population(
    model: nn.Module,
    batches: Batches,
    *,
    method: Method = "exact",
    layers: Layers = None,
    tolerance: float | None = None,
    first_batch: int | None = None,
    group: "ProcessGroup | None" = None,
    get_input: GetTensor | None = None,
    progress: PassProgress | None = None,
) -> Population:
    """Measure population statistics and leave the model as it was, bit for bit, whatever happens.

    Dropout is off. Batches are moved to the model's device; see `bncli.batches` for what they may be.
    `layers` chooses by name: a glob or a predicate. Which layers are left alone is said in
    `selection.py`. With `tolerance` it stops when the standard error of every layer's mean, in
    deviations, is no larger, after 8 batches at the earliest. For another precision call this inside
    `torch.autocast`.

    With a process `group`, such as `torch.distributed.group.WORLD`, every rank calls it with the same
    arguments and its own part of the data, and gets the statistics of all of it. Batch number k of rank r
    counts as number k * size + r of the whole, as `bncli.distributed.DealtBatches` deals them; with
    `first_batch` a rank's batches follow each other from that number on. Any number of ranks has the bits of
    one process with the same batches. Ranks may have different numbers of batches, or none. The images that a
    DataLoader's DistributedSampler repeats are left out. Inside DistributedDataParallel and `fully_shard` the
    model is taken as it is (`bncli.distributed.wrapped`). An error on one rank is raised on all. Without a
    group `first_batch` says where a shard begins that is merged by `Population.merge` later.

    `exact` keeps what modules put out for its later passes: up to 1 GiB in memory, and then in a temporary
    file of at most half of what is free on the disk of `TMPDIR`, or else of /var/tmp, which ranks share in
    equal parts. Where that is not enough, or fails, it computes more. The statistics have the same bits in
    any case.

    `progress` is called after every batch with the number of the pass, the number of passes expected, and
    the images done in this pass.

    Raises DataError for batches that cannot be used, BncliError if no layer can be measured, ProcessesError
    for what failed on another rank.
    """
    model, ranks = as_written(model), Ranks.of(group)
    with ranks.together(), whole_parameters(model):
        selection = select_layers(model, layers)
        share = Share.of(ranks, first_batch)
        if method not in ("exact", "precise"):
            raise BncliError(f"unknown method {method!r}: expected 'exact' or 'precise'")
        if method == "exact" and first_batch and ranks.size == 1:
            raise BncliError(
                "the method exact cannot be divided into shards: its layers depend on all images"
            )
        if tolerance is not None and share.step != ranks.size:
            raise BncliError("tolerance needs batches that are dealt to the ranks in turn: no first_batch")
        batches = without_repeats(batches, get_input)
        measure = _exact if method == "exact" else _precise
        return measure(model, batches, selection, tolerance, share, progress)


def _exact(
    model: nn.Module,
    batches: Batches,
    selection: Selection,
    tolerance: float | None,
    share: Share,
    progress: PassProgress | None,
) -> Population:
    done = measure_exact(
        model, batches, selection.layers, tolerance=tolerance, share=share, progress=progress
    )
    found, skipped = _in_model_order(selection, done.trees)
    return Population(
        "exact",
        found,
        skipped,
        done.num_images,
        done.num_batches,
        done.stopped_early,
        done.num_passes,
        done.forward_passes,
    )


def _precise(
    model: nn.Module,
    batches: Batches,
    selection: Selection,
    tolerance: float | None,
    share: Share,
    progress: PassProgress | None,
) -> Population:
    done = measure_pass(
        model,
        batches,
        selection.layers,
        by_batch=tuple(selection.layers),
        tolerance=tolerance,
        share=share,
        progress=None if progress is None else lambda num_images: progress(1, 1, num_images),
    )
    found, skipped = _in_model_order(selection, done.trees)
    return Population(
        "precise", found, skipped, done.num_images, done.num_batches, done.stopped_early, 1, 1.0
    )


def _in_model_order(
    selection: Selection, trees: dict[str, BatchTree]
) -> tuple[tuple[LayerPopulation, ...], tuple[SkippedLayer, ...]]:
    """The layers that saw an input, and all others with the reason."""
    found, unused = [], []
    for name, layer in selection.layers.items():
        if name in trees:
            found.append(LayerPopulation(name, trees[name], layer.eps))
        else:
            unused.append(SkippedLayer(name, "saw no input"))
    return tuple(found), (*selection.skipped, *unused)
