"""Statistics that moved while no weight that feeds them did: what is known, and what may have caused it.

A layer's input is computed by the weights before it, so with those unchanged it is the same function of the
images. That says nothing about the images: a teacher network that was left in train mode, the frozen backbone
of a linear probe, two ranks of one run and a recalibration all keep the weights, and see other batches or
average them otherwise. Two things in the files narrow the causes down.

The counters. Every forward pass in train mode adds 1 to `num_batches_tracked`; `update_bn` of PyTorch starts
it anew, and `bncli recalibrate`, like timm's `distribute_bn`, leaves it.

The first layers. The network's first BatchNorm layer is fed by the input and by weights alone: no other
BatchNorm layer is before it. So how far it moved tells data from depth, as far as that goes:

- not in a single bit: it was not updated at all, and nothing is known about the data;
- no farther than averaging explains: mean and variance of its input do not show that the data differ. If
  later layers moved farther, either those of the first file belonged to earlier weights (a lag grows with
  depth), or something before them ran in another mode or with other batch sizes, or the data differ in what
  mean and variance of the first layer do not show;
- farther: the batches differ, or the first file's statistics were those of other weights.

What averaging explains. A running mean is sum_i m (1 - m)^i b_i of batch means, so its variance is
m / (2 - m) of theirs; a batch of n images has a mean with a variance of at most 1/n of the values', reached
where the values of one image are all alike. Two such averages of the same data differ by at most

    sqrt(2 m / ((2 - m) n))        deviations, root mean square

which for m = 0.1 and n = 32 is 0.057. For the logarithm of a variance it is sqrt(k - 1) times that, where k
is the kurtosis: 3 for normal values, 5 is taken here. Three times that is allowed, and smaller batches, which
average worse, are listed as a cause.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from bncli.batchnorm.bits import bitwise_equal
from bncli.batchnorm.distance import Divergence
from bncli.batchnorm.layers import LayerStats
from bncli.wording import plural

NUM_IMAGES = 32  # in a batch; of larger ones averaging explains less
CHANCE = f"chance explains (random batches of {NUM_IMAGES} or more images)"
KURTOSIS = 5.0
ALLOWANCE = 3.0  # times what averaging leaves on average

Counters = Literal["equal", "measured", "grown", "lower", "unequal", "unknown"]
Reach = Literal["not at all", "as averaging explains", "farther"]

Measured = tuple[LayerStats, LayerStats, Divergence | None]  # in the first, in the second


@dataclass(frozen=True)
class MovedAlone:
    """What two files tell about those of their layers whose statistics moved and whose weights did not."""

    layers: tuple[str, ...]  # in the first's order
    # num_batches_tracked of all of them in the second against the first; 'measured': equal, and the second
    # records that its statistics were replaced by measured ones; 'unequal': not the same for all layers
    counters: Counters
    num_batches: int | None  # by how much each counter grew, where all grew alike
    first_layer: str | None  # the network's first BatchNorm layer; None where the order is unknown
    first_layer_moved: Reach | None  # None: unknown, or it has no usable numbers
    num_farther: int  # of the layers, those that moved farther than averaging explains

    @property
    def known(self) -> tuple[str, ...]:
        """What the files show, in sentences; no guesses."""
        return (
            "The weights before these layers are the same in both files. The images may have been others.",
            self._counters_in_words(),
            *self._depth_in_words(),
        )

    @property
    def possible_causes(self) -> tuple[str, ...]:
        """What would leave just that; more than one may be true."""
        return _CAUSES[self.counters] + _CAUSES_BY_DEPTH.get(self._depth, ())

    def to_dict(self) -> dict[str, Any]:
        """Its entry in the JSON document."""
        return {**asdict(self), "known": self.known, "possible_causes": self.possible_causes}

    def __str__(self) -> str:
        """All of it in one paragraph."""
        return f"{' '.join(self.known)} Possible causes: {'; '.join(self.possible_causes)}."

    @property
    def _depth(self) -> str:
        if self.first_layer_moved in (None, "not at all", "farther"):
            return self.first_layer_moved or "unknown"
        return "later layers moved farther" if self.num_farther else "nothing moved farther"

    def _counters_in_words(self) -> str:
        if self.counters == "grown" and self.num_batches is not None:
            batches = plural(self.num_batches, "batch", "batches")
            return (
                f"num_batches_tracked grew by {self.num_batches:,} in each of them: {batches} in train mode."
            )
        return _COUNTERS_IN_WORDS[self.counters]

    def _depth_in_words(self) -> tuple[str, ...]:
        name = self.first_layer
        later = plural(self.num_farther, "later layer")
        return {
            "unknown": ("It is unknown which layer comes first, or how far it moved.",),
            "not at all": (
                f"The first BatchNorm layer, {name}, did not change at all. So it was not"
                " updated, and says nothing about the images.",
            ),
            "farther": (
                f"The first BatchNorm layer, {name}, moved farther than {CHANCE}. So the images differ, or"
                " the first file's statistics belong to other weights.",
            ),
            "nothing moved farther": (
                f"No layer moved farther than {CHANCE}. So nothing here shows that the images differ.",
            ),
            "later layers moved farther": (
                f"The first BatchNorm layer, {name}, moved no farther than {CHANCE}, but {later} did. So the"
                " first layer does not show that the images differ.",
            ),
        }[self._depth]


_COUNTERS_IN_WORDS = {
    "equal": "num_batches_tracked is the same in both files.",
    "measured": (
        "num_batches_tracked is the same in both files, and the second one records that its statistics were"
        " measured."
    ),
    "lower": "num_batches_tracked is lower in the second file: it was reset, or that file is older.",
    "unequal": "num_batches_tracked did not change by the same number in all of these layers.",
    "unknown": "num_batches_tracked is missing or no whole number: how many batches passed is unknown.",
}
_CAUSES: dict[Counters, tuple[str, ...]] = {
    "equal": (
        "two ranks of one distributed run, each with the statistics of its own batches"
        " (bncli compare --ranks)",
        "two runs with the same frozen weights and equally many batches",
        "statistics that were measured, averaged over ranks or copied: that does not change the counter"
        " (bncli recalibrate, timm's distribute_bn)",
    ),
    "measured": ("bncli recalibrate, or training that ends with it",),
    "grown": (
        "a frozen network that was left in train mode: a teacher, or the backbone of a linear probe"
        " (requires_grad=False does not stop the statistics, eval() does)",
        "a validation loop without eval()",
        "a measurement that counts its batches (fvcore's update_bn_stats; update_bn over more batches than"
        " the first had seen)",
    ),
    "lower": (
        "update_bn of torch.optim.swa_utils, or reset_running_stats and then batches in train mode",
        "the two files in the wrong order",
    ),
    "unequal": (
        "layers that ran more than once per batch, or partly in eval mode",
        "statistics of several files put together",
    ),
    "unknown": (
        "a network that was left in train mode, ranks of a distributed run, or statistics that were measured",
    ),
}
_CAUSES_BY_DEPTH = {
    "farther": (
        "other images, or other preprocessing, augmentation or image size",
        f"batches of fewer than {NUM_IMAGES} images, or few batches since the statistics were new",
        "a repair: the first file's weights had been averaged, merged or still moving",
    ),
    "later layers moved farther": (
        "the first file's statistics belong to earlier weights, or had seen few batches",
        "another dropout, batch size or mode of a layer between while the statistics were averaged",
        "other images with the same mean and variance in the first layer",
    ),
    "not at all": ("a first layer that stayed in eval mode, or that a recalibration left out",),
}


def explain_moved_alone(
    moved: Sequence[Measured], *, first_layer: str | None, first: Measured | None
) -> MovedAlone | None:
    """What is known of layers that moved alone; None without any.

    `first_layer` is the network's first BatchNorm layer, and `first` that in both files; None: unknown.
    """
    if not moved:
        return None
    counters, num_batches = _compare_counters(moved)
    return MovedAlone(
        layers=tuple(one.name for one, _, _ in moved),
        counters=counters,
        num_batches=num_batches,
        first_layer=first_layer,
        first_layer_moved=None if first is None else _reach(first),
        num_farther=sum(_reach(layer) == "farther" for layer in moved),
    )


def _compare_counters(moved: Sequence[Measured]) -> tuple[Counters, int | None]:
    grown = set()
    for one, two, _ in moved:
        before, after = (
            None if layer.counter_dtype is None or layer.counter_dtype.is_floating_point
            else layer.num_batches_tracked
            for layer in (one, two)
        )  # fmt: skip
        if before is None or after is None:
            return "unknown", None
        grown.add(after - before)
    if grown == {0}:
        return "measured" if all(two.was_measured for _, two, _ in moved) else "equal", None
    if all(number < 0 for number in grown):
        return "lower", None
    return ("grown", grown.pop()) if len(grown) == 1 else ("unequal", None)


def _reach(layer: Measured) -> Reach | None:
    one, two, divergence = layer
    if divergence is None or bool(divergence.kl.isnan().all()):
        return None
    tensors = (one.running_mean, two.running_mean), (one.running_var, two.running_var)
    if all(a is not None and b is not None and bitwise_equal(a, b) for a, b in tensors):
        return "not at all"
    usable = ~divergence.kl.isnan()
    shift = divergence.mean_shift_in_first_deviations[usable].square().mean()
    spread = divergence.var_ratio[usable].log().square().mean() / (KURTOSIS - 1)
    allowed = ALLOWANCE**2 * _averaging_noise(one, two)
    return "farther" if max(float(shift), float(spread)) > allowed else "as averaging explains"


def _averaging_noise(one: LayerStats, two: LayerStats) -> float:
    """Mean square of what averaging leaves between two of the same data, in deviations."""
    known = next((layer for layer in (two, one) if layer.hyperparameters_known), None)
    momentum = one.convention.new_batch_weight if known is None else known.momentum
    if momentum is None:  # a cumulative average over all batches
        counts = (layer.num_batches_tracked for layer in (one, two))
        return sum(1 / max(count or 1, 1) for count in counts) / NUM_IMAGES
    return 2 * momentum / ((2 - momentum) * NUM_IMAGES)
