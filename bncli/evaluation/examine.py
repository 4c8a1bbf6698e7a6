"""Everything that `bncli eval` finds about a network, in one call and in one result."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from bncli.batches import Batches, GetTensor
from bncli.batchnorm.layers import batch_norm_layers
from bncli.determinism.certificate import BATCH_SIZES, DEFAULT_NUM_IMAGES, Certificate, certify
from bncli.determinism.fixed_shape import FixedShape, without_fixed_shape
from bncli.distributed.ranks import Ranks
from bncli.distributed.shards import without_repeats
from bncli.evaluation.evaluate import Evaluation, evaluate
from bncli.evaluation.gap import Gap, PhaseProgress, measure_gap
from bncli.evaluation.labelled_images import labelled_images
from bncli.evaluation.sweep import SweepPoint, sweep_batch_sizes, wilson_interval
from bncli.evaluation.views import AugmentedEvaluation, Views, evaluate_augmented
from bncli.indexed import Indexed, Indices, in_order, pick
from bncli.sample import random_order, stratified_sample

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

CERTIFYING = "test images, each alone and in batches"
VIEWS = "test images, averaged over views"
SAMPLE_SIZES = (1, 8, 64)  # batch sizes at which the accuracy of the sample is measured in both modes


@dataclass(frozen=True)
class Evaluations:
    """What is measured on all images, which several processes can share; parts not asked for are empty."""

    plain: Evaluation
    augmented: AugmentedEvaluation | None
    sweep: tuple[SweepPoint, ...]
    gap: Gap | None


@dataclass(frozen=True)
class Examination:
    """What was found about one network on one set of labelled images; parts not asked for are empty."""

    evaluation: Evaluation
    sample: tuple[int, ...]  # indices of the images that the certificate compares: see `bncli.sample`
    certificate: Certificate
    sample_sweep: tuple[SweepPoint, ...]  # accuracy of the same images in small batches
    sweep: tuple[SweepPoint, ...]
    gap: Gap | None
    tta: AugmentedEvaluation | None

    @property
    def passed(self) -> bool:
        """No prediction depends on the batch; of a FixedShape, not one bit of any logit."""
        return self.certificate.holds

    @property
    def is_confident_at_chance(self) -> bool:
        """Whether accuracy is that of guessing, as far as the images can tell, while probabilities are high.

        A network that knows nothing, and says so, is not. Chance is one in as many classes as have images;
        probabilities are high from half of the way from there to 1 on, if they contradict the accuracy.
        """
        evaluation = self.evaluation
        if evaluation.confidence is None:
            return False
        low, high = wilson_interval(evaluation.accuracy, evaluation.num_images)
        return low <= self.chance and evaluation.confidence > max(high, (1 + self.chance) / 2)

    @property
    def chance(self) -> float:
        """The accuracy of guessing among the classes that have images."""
        return 1 / sum(accuracy is not None for accuracy in self.evaluation.per_class_accuracy)

    def to_dict(self, class_names: Sequence[str] = ()) -> dict[str, Any]:
        """The JSON document: the evaluation's keys at the top, the certificate under `determinism`."""
        evaluation = asdict(self.evaluation)
        del evaluation["confidence"]
        per_class = evaluation.pop("per_class_accuracy")
        names = class_names or [str(label) for label in range(len(per_class))]
        return {
            **evaluation,
            "per_class_accuracy": dict(zip(names, per_class, strict=True)),
            "batch_invariant": self.certificate.fixed_rows is not None,
            "fixed_rows": self.certificate.fixed_rows,
            "determinism": self.certificate.to_dict(),
            "sample_sweep": [asdict(point) for point in self.sample_sweep],
            "sweep": [asdict(point) for point in self.sweep],
            "gap": None if self.gap is None else self.gap.to_dict(),
            "tta": None if self.tta is None else asdict(self.tta),
        }

    def __str__(self) -> str:
        """What each part says of itself."""
        parts = [self.evaluation, self.tta, *self.sample_sweep, *self.sweep, self.certificate, self.gap]
        return "\n".join(str(part) for part in parts if part is not None)


def examine(
    model: nn.Module,
    data: Batches | Indexed,
    training: Batches | None = None,
    *,
    shuffled: Batches | None = None,
    num_images: int = DEFAULT_NUM_IMAGES,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    batch_size: int = 256,
    sweep: Sequence[int] = (),
    views: Views | None = None,
    place: Callable[[Tensor], Tensor] = lambda images: images,
    known: Evaluations | None = None,
    get_input: GetTensor | None = None,
    get_labels: GetTensor | None = None,
    progress: PhaseProgress = lambda phase, done, total: None,
) -> Examination:
    """Evaluate a classifier in eval mode and certify it; on request sweep, gap and views. It stays as it was.

    `data` are labelled images (see `bncli.batches`), all held in memory unless they are given as a pair of
    tensors, images (N, ...) and labels (N,), or as `bncli.indexed`. They are computed in batches of
    `batch_size`; `place` brings a batch to where and how the model computes. `num_images` and `batch_sizes`
    are the certificate's, whose images are a random sample over all classes (`bncli.sample`). The sample's
    accuracy is also measured in batches of 1, 8 and 64, in both modes. `sweep` lists batch sizes at which
    that of all images is measured.
    With `training` images, unaugmented, the gap between the modes is taken apart, on `shuffled`: the same
    data in an order in which every batch is a sample of all classes (default: one random order). For another
    precision call this inside `torch.autocast`. `known` is what `evaluate_whole` found before, as several
    processes do together; then `training`, `shuffled`, `sweep` and `views` are not used.

    Raises DataError for data that cannot be used, BncliError for a model that is no classifier, or where the
    gap is asked for and no layer has running statistics.
    """
    images, labels = labelled_images(data, get_input, get_labels)
    if known is None:
        known = evaluate_whole(
            model,
            images,
            training,
            shuffled=shuffled,
            batch_size=batch_size,
            sweep=sweep,
            views=views,
            place=place,
            get_input=get_input,
            progress=progress,
        )
    chosen = stratified_sample(labels, num_images)
    sample = place(pick(images, chosen))
    certificate = certify(model, sample, batch_sizes=batch_sizes, progress=partial(progress, CERTIFYING))
    sample_sweep = sweep_batch_sizes(
        model,
        (sample, labels[chosen]),
        [size for size in SAMPLE_SIZES if size <= len(chosen)],
        progress=partial(progress, _passes_over("compared images", model)),
    )
    return Examination(
        known.plain,
        tuple(chosen.tolist()),
        certificate,
        sample_sweep,
        known.sweep,
        known.gap,
        known.augmented,
    )


def evaluate_whole(
    model: nn.Module,
    images: Indexed,
    training: Batches | None = None,
    *,
    shuffled: Batches | None = None,
    batch_size: int = 256,
    sweep: Sequence[int] = (),
    views: Views | None = None,
    place: Callable[[Tensor], Tensor] = lambda images: images,
    group: "ProcessGroup | None" = None,
    get_input: GetTensor | None = None,
    progress: PhaseProgress = lambda phase, done, total: None,
) -> Evaluations:
    """Evaluate all images in eval mode, in order, and what else is asked for: see `examine`.

    With a process `group` each rank has all images and computes its part of the batches; `training` and
    `shuffled` are its own part of those.
    """
    ranks = Ranks.of(group)
    rows = model.rows if isinstance(model, FixedShape) else 1
    size = -(-batch_size // rows) * rows  # whole chunks: the same bits, and no padding to pay for

    def dealt(batches: Iterable[Indices]) -> Iterator[tuple[Tensor, Tensor]]:
        own = islice(batches, ranks.rank, None, ranks.size)
        return ((place(part), truth) for part, truth in images.batches_of(own))

    plain = evaluate(
        model,
        dealt(in_order(len(images), size)),
        group=group,
        progress=lambda done: progress("test images in eval mode", done, len(images)),
    )
    augmented, gap = None, None
    points: tuple[SweepPoint, ...] = ()
    if views is not None:
        augmented = evaluate_augmented(
            model,
            dealt(in_order(len(images), batch_size)),
            views,
            group=group,
            progress=lambda done: progress(VIEWS, done, len(images)),
        )
    if sweep:
        points = sweep_batch_sizes(
            model,
            images,
            sweep,
            place=place,
            group=group,
            progress=partial(progress, _passes_over("test images", model)),
        )
    if training is not None:
        order = random_order(len(images)).split(max(2, batch_size))  # one image may have no variance
        gap = measure_gap(
            without_fixed_shape(model),
            shuffled or (lambda: dealt(order)),
            without_repeats(training, get_input),
            group=group,
            progress=progress,
        )
    return Evaluations(plain, augmented, points, gap)


def _passes_over(images: str, model: nn.Module) -> str:
    """The phase's name: without BatchNorm, as in an exported file, both modes are one."""
    return f"passes over the {images}" + (", in both modes" if batch_norm_layers(model) else "")
