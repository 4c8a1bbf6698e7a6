"""One claim about a model: what it is judged by, and what was found."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from bncli.batchnorm.bits import bitwise_equal, differing_rows
from bncli.determinism.layer_trace import first_differing_layer
from bncli.determinism.pairing import Pairing, differ


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
