"""The certificate: on what does an image's answer depend, beside the image? Bit by bit, in eval mode.

Four claims, each tested with the others held still:

    repeat      the same batch, computed twice
    neighbours  the same image at the same place in a batch of the same size, with other companions
    position    the same image with the same companions, at another place
    batch_size  the same image alone, and in batches of every size

Eval-mode BatchNorm uses only the running statistics, so in exact arithmetic all four are true. With real
kernels the last need not be, because another number of rows may select another order of summation
(pytorch#116501). So the bits and the predictions are judged apart. `bncli.FixedShape` gives all images
batches of one size, which leaves kernels no choice.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, starmap
from typing import Any

import torch
from torch import Tensor, nn

from bncli.batches import Batches, GetTensor, gather_inputs
from bncli.batchnorm.bits import as_bytes, bitwise_equal, differing_rows
from bncli.batchnorm.layers import batch_norm_layers
from bncli.batchnorm.modes import buffers_digest, eval_mode, preserved_buffers, train_mode
from bncli.determinism.fixed_shape import FixedShape, without_fixed_shape
from bncli.determinism.layer_trace import WHOLE_MODEL, first_differing_layer
from bncli.determinism.pairing import (
    Pairing,
    Pairings,
    Pass,
    consecutive,
    differ,
    num_computed,
    one_by_one,
)
from bncli.forward import is_too_few_values, model_device
from bncli.sample import random_order
from bncli.wording import plural


@dataclass(frozen=True)
class Claim:
    """One claim, over all images and all batch sizes."""

    bitwise_equal: bool
    max_abs_diff: float  # between logits; inf: a NaN in one where the other has none
    max_rel_diff: float  # relative to the largest logit, in magnitude, of the same image
    max_ulp: int | None  # in units in the last place; None: a NaN in one where the other has none
    prediction_flips: int  # images that got another prediction at least once
    first_differing_layer: str | None  # None where the claim holds; "(model)" for the root module


def examine_claim(model: nn.Module, images: Tensor, pairings: Sequence[Pairing]) -> Claim:
    """Compare all pairs, and find the layer where the first that differs begins to do so."""
    difference, num_flips = differ(pairings)
    return Claim(
        bitwise_equal=difference.bitwise_equal,
        max_abs_diff=difference.max_abs_diff,
        max_rel_diff=difference.max_rel_diff,
        max_ulp=difference.max_ulp,
        prediction_flips=num_flips,
        first_differing_layer=None if difference.bitwise_equal else _find_layer(model, images, pairings),
    )


def _find_layer(model: nn.Module, images: Tensor, pairings: Sequence[Pairing]) -> str:
    pairing = next(pairing for pairing in pairings if not bitwise_equal(*pairing.logits))
    index = int(differing_rows(*pairing.logits).nonzero()[0])
    return first_differing_layer(model, *pairing.seats(images, index))


BATCH_SIZES = (2, 3, 7, 16, 64, 256)
DEFAULT_NUM_IMAGES = 256  # of batches without a number


@dataclass(frozen=True)
class Claims:
    """What the answer for an image does not depend on, as far as each claim holds."""

    repeat: Claim
    neighbours: Claim
    position: Claim
    batch_size: Claim

    def __iter__(self) -> Iterator[Claim]:
        """Iterate over them in this order."""
        return iter(self.by_name().values())

    def by_name(self) -> dict[str, Claim]:
        """The claims by name."""
        return {
            "repeat": self.repeat,
            "neighbours": self.neighbours,
            "position": self.position,
            "batch_size": self.batch_size,
        }


@dataclass(frozen=True)
class BatchSizeCheck:
    """Batches of one size against every image alone, in the given order and with the places shuffled."""

    batch_size: int
    bitwise_equal: bool  # in both orders
    shuffled_bitwise_equal: bool  # in the shuffled order
    max_abs_diff: float  # between logits, in both orders; inf: a NaN in one where the other has none
    max_ulp: int | None
    prediction_flips: int  # images whose prediction differs in either order


@dataclass(frozen=True)
class Apart:
    """How far the same images are apart in two or more computations."""

    max_abs_diff: float  # between logits
    prediction_flips: int  # images that got another prediction at least once


@dataclass(frozen=True)
class TrainModeContrast:
    """The same comparison in train mode, where batch statistics tie the images together.

    Its batches are drawn at random: images may come sorted by class, and training does not see them so.
    """

    batch_size: int  # the largest
    reference_batch_size: int  # 1, or 2 where BatchNorm refuses a batch of one
    max_abs_diff: float  # between logits, in batches of `batch_size`
    prediction_flips: int
    any_batch_size: Apart  # in batches of every size


@dataclass(frozen=True)
class Certificate:
    """What was found for one model and one set of images."""

    num_images: int
    seed: int  # of the shuffled places and of train mode's random numbers
    repeat_bitwise_equal: bool  # as claims.repeat says
    claims: Claims
    batch_sizes: tuple[BatchSizeCheck, ...]
    train_mode: TrainModeContrast
    running_stats_unchanged: bool  # every buffer, after eval mode and at the end, bit for bit
    logits_sha256: str  # of every image's logits when it is alone, (N, num_classes) in row-major order
    rounding: float  # the largest max_rel_diff that rounding accounts for, at the precision computed in
    num_batch_norm_layers: int
    layers_without_running_stats: tuple[str, ...]  # BatchNorm layers that use batch statistics in eval mode
    fixed_rows: int | None = None  # of a FixedShape, which promises the same bits; None for other modules

    @property
    def bitwise_equal(self) -> bool:
        """All four claims hold to the last bit."""
        return all(claim.bitwise_equal for claim in self.claims)

    @property
    def deterministic(self) -> bool:
        """No prediction depends on the batch in eval mode, whatever the last bits do."""
        return all(claim.prediction_flips == 0 for claim in self.claims)

    @property
    def holds(self) -> bool:
        """No prediction depends on the batch; of a FixedShape, not one bit of any logit."""
        return self.deterministic and (self.bitwise_equal or self.fixed_rows is None)

    @property
    def eval_mode(self) -> Apart:
        """The same images alone, and in all batches, places and companies, in eval mode."""
        return Apart(
            max(claim.max_abs_diff for claim in self.claims),
            max(claim.prediction_flips for claim in self.claims),
        )

    @property
    def within_rounding(self) -> bool:
        """The logits of an image differ by no more than rounding accounts for."""
        return all(claim.max_rel_diff <= self.rounding for claim in self.claims)

    @property
    def verdict(self) -> str:
        """Does a prediction depend on its batch in eval mode? Where it does, from which layer on, and why."""
        first_layer = f"The first layer whose output depends on the batch is {self._first_layer}."
        if not self.deterministic:
            num_changed = self.eval_mode.prediction_flips
            return (
                f"In eval mode {num_changed:,} of {plural(self.num_images, 'prediction')}"
                f" {'changes' if num_changed == 1 else 'change'} with the batch. {first_layer} {self._remedy}"
            )
        if not self.holds:
            return f"Batches of a fixed shape do not give equal bits on this machine. {first_layer}"
        if not self.within_rounding:
            return (
                "In eval mode no prediction changes with its batch, but logits change by more than rounding."
                f" {first_layer} {self._remedy}"
            )
        equally = ", and neither does any bit of its logits" if self.bitwise_equal else ""
        return f"In eval mode a prediction does not depend on its batch{equally}."

    @property
    def _first_layer(self) -> str:
        """Where companions alone change predictions, no kernel is to blame that looks at the batch size."""
        claims = sorted(self.claims, key=lambda claim: claim.prediction_flips == 0)  # stable
        return next((one.first_differing_layer for one in claims if one.first_differing_layer), WHOLE_MODEL)

    @property
    def _remedy(self) -> str:
        if self._first_layer in self.layers_without_running_stats:
            return (
                "It has no running statistics, so it uses batch statistics in eval mode too: train it with"
                " track_running_stats=True."
            )
        if not self.repeat_bitwise_equal:
            return "The same batch gives other logits each time: look for random numbers in that layer."
        if self.within_rounding:
            return "The difference is rounding, which --batch-invariant (bncli.FixedShape) prevents."
        return "Look for code in that layer that mixes the images of a batch."

    def to_dict(self) -> dict[str, Any]:
        """The JSON document: all fields, and what follows from them."""
        return {**asdict(self), "within_rounding": self.within_rounding, "verdict": self.verdict}

    def __str__(self) -> str:
        """A line for each claim, and the verdict."""
        lines = [
            f"{name.replace('_', ' '):10}  {'same bits' if claim.bitwise_equal else 'other bits'},"
            f" logits differ by up to {claim.max_abs_diff:.2g}, {claim.prediction_flips} predictions change"
            for name, claim in self.claims.by_name().items()
        ]
        return "\n".join([f"{plural(self.num_images, 'image')} in eval mode", *lines, self.verdict])


def certify(
    model: nn.Module,
    images: Batches,
    *,
    num_images: int | None = None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    seed: int = 0,
    get_input: GetTensor | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Certificate:
    """Test the four claims in eval mode, and show the contrast in train mode.

    Works for any module that returns logits (N, num_classes), a `FixedShape` included. `images` is a tensor
    (N, ...), all of which are taken unless `num_images` says how many; or batches (see `bncli.batches`), of
    which the first 256 images are taken. A batch size beyond the number of images means all of them. Batches
    that the images do not fill are filled from their start again; a single image gets a blank one for
    company.
    Modes, buffers, hooks and the random-number state (CPU, and the model's CUDA device) are restored,
    also if the model raises. Costs 3 N forward passes of one image, five passes over the images per batch
    size. Keeps logits only, and one image's activations to find a layer. `progress`
    is told how many images were computed, one as often as it was computed, and how many will be.

    >>> import torch
    >>> from torchvision.models import resnet18
    >>> from bncli import FixedShape, certify
    >>> images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    >>> found = certify(FixedShape(resnet18(weights=None), rows=16), images, batch_sizes=(2, 7, 16))
    >>> found.bitwise_equal, found.claims.batch_size.max_ulp
    (True, 0)
    >>> found.train_mode.max_abs_diff > 0.1
    True

    Raises DataError without images, ValueError for a batch size below 1 or if none is above 1.
    """
    if not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"batch sizes must be 1 or more, got {list(batch_sizes)}")
    if max(batch_sizes) == 1:
        raise ValueError("batch sizes must not all be 1: an image alone has no neighbours")
    wanted = num_images or (len(images) if isinstance(images, Tensor) else DEFAULT_NUM_IMAGES)
    images = gather_inputs(images, wanted, get_input)
    num_images = len(images)
    if num_images == 1:
        images = torch.cat([images, torch.zeros_like(images)])
    batch_sizes = sorted({min(size, len(images)) for size in batch_sizes})
    total, done = num_computed(len(images), batch_sizes), 0

    def computed(count: int) -> None:
        nonlocal done
        if done < total:  # where train mode wants pairs, one image may be computed twice
            done = min(done + count, total)
            progress(done, total)

    before = buffers_digest(model)
    with preserved_buffers(model), _preserved_rng(model), torch.no_grad():
        with eval_mode(model):
            pairings = Pairings.of(
                model, images, batch_sizes, num_images=num_images, seed=seed, computed=computed
            )
            claims = Claims(
                repeat=examine_claim(model, images, pairings.repeat),
                neighbours=examine_claim(model, images, pairings.neighbours),
                position=examine_claim(model, images, pairings.position),
                batch_size=examine_claim(model, images, list(chain(*pairings.batch_size.values()))),
            )
        unchanged = buffers_digest(model) == before
        with train_mode(model):
            contrast = _contrast(without_fixed_shape(model), images, batch_sizes, seed, num_images, computed)
    layers = batch_norm_layers(without_fixed_shape(model))
    return Certificate(
        num_images=num_images,
        seed=seed,
        repeat_bitwise_equal=claims.repeat.bitwise_equal,
        claims=claims,
        batch_sizes=tuple(starmap(_check, pairings.batch_size.items())),
        train_mode=contrast,
        running_stats_unchanged=unchanged and buffers_digest(model) == before,
        logits_sha256=_sha256(pairings.alone.logits[:num_images]),
        rounding=_rounding(model),
        num_batch_norm_layers=len(layers),
        layers_without_running_stats=tuple(name for name, layer in layers if layer.running_mean is None),
        fixed_rows=model.rows if isinstance(model, FixedShape) else None,
    )


def _check(batch_size: int, pairings: tuple[Pairing, Pairing]) -> BatchSizeCheck:
    both, num_flips = differ(pairings)
    return BatchSizeCheck(
        batch_size=batch_size,
        bitwise_equal=both.bitwise_equal,
        shuffled_bitwise_equal=differ(pairings[1:])[0].bitwise_equal,
        max_abs_diff=both.max_abs_diff,
        max_ulp=both.max_ulp,
        prediction_flips=num_flips,
    )


def _contrast(
    model: nn.Module,
    images: Tensor,
    batch_sizes: Sequence[int],
    seed: int,
    num_images: int,
    computed: Callable[[int], None],
) -> TrainModeContrast:
    order = random_order(len(images), seed)
    compute = partial(Pass.of, model, images, computed=computed)
    reference_size = 1
    _seed(model, seed)
    try:
        reference = compute(one_by_one(len(images)))
    except ValueError as error:
        if not is_too_few_values(error):
            raise
        reference_size = 2
        _seed(model, seed)
        reference = compute(order[consecutive(len(images), 2)])
    rows = torch.empty(len(images), dtype=torch.int64)  # where the reference has each image
    rows[reference.index.flatten()] = torch.arange(reference.index.numel())

    def against_reference(batch_size: int) -> Pairing:
        num_batches = -(-len(images) // batch_size)  # a further one would only hold two images in turn
        together = compute(order[consecutive(len(images), batch_size)[:num_batches]])
        return Pairing(together, reference, rows[together.index], num_images)

    # the largest first: what dropout draws for it is then the same whatever the other sizes
    pairings = [against_reference(size) for size in sorted(batch_sizes, reverse=True) if size > 1]
    (largest, num_flips), (all_sizes, num_flips_in_any) = differ(pairings[:1]), differ(pairings)
    return TrainModeContrast(
        batch_size=max(batch_sizes),
        reference_batch_size=reference_size,
        max_abs_diff=largest.max_abs_diff,
        prediction_flips=num_flips,
        any_batch_size=Apart(all_sizes.max_abs_diff, num_flips_in_any),
    )


def _rounding(model: nn.Module) -> float:
    """The relative difference that rounding accounts for: 256 units of the coarsest number format in use.

    A sum of many numbers in another order differs by a few units, and layers on layers add to it: 26 units
    were seen in a ResNet-50 in float32. Never more than a tenth, which of bfloat16 are 13 units.
    """
    device = model_device(model) or torch.device("cpu")
    tensors = chain(model.parameters(), model.buffers())
    units = [torch.finfo(tensor.dtype).eps for tensor in tensors if tensor.is_floating_point()]
    if torch.is_autocast_enabled(device.type):
        units.append(torch.finfo(torch.get_autocast_dtype(device.type)).eps)
    if device.type == "cuda" and torch.float32 in {tensor.dtype for tensor in model.parameters()}:
        units.append(2**-10)  # of TF32, which convolutions compute float32 in
    return min(0.1, 256 * max(units, default=torch.finfo(torch.float32).eps))


def _sha256(logits: Tensor) -> str:
    return hashlib.sha256(as_bytes(logits).numpy().data).hexdigest()


def _preserved_rng(model: nn.Module) -> AbstractContextManager[None]:
    """Restore the random-number state of the CPU and of the model's CUDA device at the end."""
    return torch.random.fork_rng(_cuda_devices(model), device_type="cuda")


def _seed(model: nn.Module, seed: int) -> None:
    # not torch.manual_seed: it would also reseed devices whose state is not restored
    torch.default_generator.manual_seed(seed)
    for index in _cuda_devices(model):
        torch.cuda.default_generators[index].manual_seed(seed)


def _cuda_devices(model: nn.Module) -> list[int]:
    device = model_device(model)
    return [device.index] if device is not None and device.type == "cuda" else []
