"""How images become the input that a network was trained for, where its library says so."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from bncli.models.detectors import is_detector
from bncli.models.normalized import NAMED, NONE
from bncli.torchvision_compat import import_torchvision

Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True)
class Preset:
    """What evaluation does with an image. Mean and deviation are in units of [0, 1], red, green and blue.

    Networks for segmentation and detection take whole images: then there is no size.
    """

    image_size: int | None  # height and width in pixels
    resize: int | None  # the shorter side in pixels, before the middle is cut out
    interpolation: Interpolation
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def normalization(self) -> str:
        """As `--normalization` writes it."""
        for name in ("imagenet", "none"):
            if (self.mean, self.std) == NAMED[name]:
                return name
        return "/".join(",".join(f"{number:g}" for number in part) for part in (self.mean, self.std))


def preset_of(name: str, model: nn.Module) -> Preset | None:
    """That of torchvision's default weights, or of timm's; None where the library says nothing.

    Nothing is downloaded. `name` is one that `build_network` has taken, and `model` what it made.
    """
    if is_detector(model):
        return Preset(None, None, "bilinear", *NONE)
    kind, _, rest = name.partition(":")
    if kind == "torchvision":
        return _of_torchvision(rest)
    if kind == "timm":
        return _of_timm(getattr(model, "pretrained_cfg", None) or {})
    return None


def _of_torchvision(name: str) -> Preset | None:
    models = import_torchvision().models
    transforms = models.get_model_weights(name).DEFAULT.transforms()
    if not hasattr(transforms, "mean"):
        return None
    is_cropped = hasattr(transforms, "crop_size")  # not for segmentation
    return Preset(
        image_size=transforms.crop_size[0] if is_cropped else None,
        resize=transforms.resize_size[0] if is_cropped else None,
        interpolation=_interpolation(transforms.interpolation.value),
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
    )


def _of_timm(config: dict[str, Any]) -> Preset | None:
    try:
        height, share = int(config["input_size"][1]), float(config["crop_pct"])
        return Preset(
            image_size=height,
            resize=int(height / share),
            interpolation=_interpolation(config["interpolation"]),
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
        )
    except (KeyError, TypeError, ValueError, IndexError):
        return None


def _interpolation(name: object) -> Interpolation:
    return "bicubic" if name == "bicubic" else "bilinear"
