"""What an exported file says of itself: where it is from, what it takes, what became of its BatchNorm.

It travels as one JSON text in the file's own metadata. Reading it needs neither PyTorch nor an engine.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from bncli.errors import CheckpointError

KEY = "bncli"  # of the text, in every format
VERSION = 1
MAX_BYTES = 8 * 2**20  # of the text: names of 100,000 classes fit

Precision = Literal["float32", "bfloat16", "float16"]
Pixels = Literal["uint8", "float32"]


@dataclass(frozen=True, kw_only=True)
class ExportRecord:
    """Everything beside the numbers. Plain values only."""

    bncli: str  # version that wrote it
    source: Mapping[str, Any]  # file, sha256, epoch
    network: str  # its name
    pixels: Pixels  # of the input: uint8 in 0..255, or float32 in 0..1 (or as they are, if not normalised)
    image_shape: tuple[int, ...]  # of one input, such as (3, H, W)
    normalization: Mapping[str, Any] | None  # mean and std, which the file computes with; None: not known
    resize: int | None  # the shorter side in pixels, before the middle is cut out; None: no cutting
    interpolation: Literal["bilinear", "bicubic"]
    class_names: tuple[str, ...]
    precision: Precision
    folded: tuple[tuple[str, str], ...]  # BatchNorm layers that are gone, each with the layer that took it in
    kept: tuple[tuple[str, str], ...]  # those that are left, each with the reason
    statistics: Mapping[str, Any]  # how the running statistics were made
    config: Mapping[str, Any]  # the configuration, without places
    data_digest: str | None = None  # of the images that it was trained on

    @property
    def image_size(self) -> int:
        """Height and width in pixels; 0 where inputs are no square images."""
        shape = self.image_shape
        return shape[-1] if len(shape) == 3 and shape[-1] == shape[-2] else 0

    @property
    def sentence(self) -> str:
        """What became of BatchNorm, in words."""
        return folding_in_words(len(self.folded), len(self.kept))

    @property
    def origin(self) -> str:
        """The file that it was exported from, as far as is known."""
        sha256 = self.source.get("sha256")
        return f"{self.source.get('file')}" + (f" (SHA-256 {str(sha256)[:12]}...)" if sha256 else "")

    def to_json(self) -> str:
        """The text."""
        return json.dumps({"version": VERSION, **asdict(self)}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, source: str) -> "ExportRecord":
        """Read the text in the file `source`.

        Raises CheckpointError where it is damaged, or a newer bncli wrote it.
        """
        try:
            values = json.loads(text)
            if values.pop("version") != VERSION:
                raise CheckpointError(f"{source}: exported by a newer bncli; upgrade bncli")
            return cls(**_checked(values))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{source}: what `bncli export` wrote about it is damaged: {error}"
            ) from None


def folding_in_words(num_folded: int, num_kept: int) -> str:
    """What became of so many BatchNorm layers."""
    num_layers = num_folded + num_kept
    if not num_layers:
        return "the network had no BatchNorm layer"
    if num_layers == 1:
        return f"the only BatchNorm layer {'was folded away' if num_folded else 'is kept'}"
    if not num_folded:
        return f"all {num_layers:,} BatchNorm layers are kept"
    return f"{num_folded:,} of {num_layers:,} BatchNorm layers were folded away"


_KINDS: dict[str, tuple[type, ...]] = {
    "bncli": (str,),
    "source": (dict,),
    "network": (str,),
    "pixels": (str,),
    "image_shape": (list,),
    "normalization": (dict, type(None)),
    "resize": (int, type(None)),
    "interpolation": (str,),
    "class_names": (list,),
    "precision": (str,),
    "folded": (list,),
    "kept": (list,),
    "statistics": (dict,),
    "config": (dict,),
    "data_digest": (str, type(None)),
}
_CHOICES = {
    "pixels": ("uint8", "float32"),
    "precision": ("float32", "bfloat16", "float16"),
    "interpolation": ("bilinear", "bicubic"),
}


def _checked(values: dict[str, Any]) -> dict[str, Any]:
    """The values, lists as tuples. Raises ValueError for what is missing or of another kind."""
    assert _KINDS.keys() == {field.name for field in fields(ExportRecord)}
    for name, kinds in _KINDS.items():
        value = values.get(name)
        if type(value) not in kinds or value not in _CHOICES.get(name, (value,)):
            raise ValueError(f"{name} is {str(value)[:40]!r}")
    shape, names = values["image_shape"], values["class_names"]
    pairs = [*values["folded"], *values["kept"]]
    if not all(type(length) is int and 0 < length < 10**6 for length in shape) or not 0 < len(shape) < 8:
        raise ValueError("image_shape is no shape")
    if not all(type(name) is str for name in names):
        raise ValueError("class_names are no names")
    if not all(
        type(pair) is list and len(pair) == 2 and {type(one) for one in pair} == {str} for pair in pairs
    ):
        raise ValueError("its BatchNorm layers have no names")
    return {
        **{name: values[name] for name in _KINDS},
        "image_shape": tuple(shape),
        "class_names": tuple(names),
        "folded": tuple((name, into) for name, into in values["folded"]),
        "kept": tuple((name, reason) for name, reason in values["kept"]),
    }
