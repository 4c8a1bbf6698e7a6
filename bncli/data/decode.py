"""One image file's bytes to uint8 RGB pixels of a fixed size, with PIL."""

import io
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from bncli.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP")  # whatever the file's name says; PIL's other decoders are less tried
MAX_FILE_BYTES = 512 << 20
VERSION = 1  # part of every cache key: raise it when the same file gives other pixels


@dataclass(frozen=True)
class Fit:
    """How an image of any size becomes a square."""

    image_size: int  # height and width in pixels
    resize: int | None = None  # the shorter side in pixels, before the middle is cut out; None: no cutting
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    def __str__(self) -> str:
        """What tells it from others in names of files; that of a plain square is its size."""
        if self == Fit(self.image_size):
            return str(self.image_size)
        return f"{self.image_size}-{self.resize}-{self.interpolation}"


def decode(content: bytes, fit: Fit) -> npt.NDArray[np.uint8]:
    """Decode to (3, image_size, image_size).

    The EXIF rotation is applied. Transparent images are laid on black. 16-bit grey keeps its upper 8 bits.
    Without `fit.resize` an image of another size or aspect ratio is resized to the square; one of the right
    size is taken bit for bit. With it the shorter side is resized and the middle cut out, as torchvision's
    `Resize` and `CenterCrop` do, with black where it is too small. PIL's filters are antialiased. Of an
    animation the first frame counts.

    Raises:
        Exception: whatever PIL raises; the types are many and undocumented.
    """
    with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
        opened.load()
        return to_pixels(ImageOps.exif_transpose(opened), fit)


def to_pixels(opened: Image.Image, fit: Fit | None) -> npt.NDArray[np.uint8]:
    """The pixels (3, image_size, image_size) of an image that is open, or of its own size without `fit`."""
    image = _to_rgb(opened)
    if fit is None:
        return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))
    size, filter_ = fit.image_size, Image.Resampling[fit.interpolation.upper()]
    if fit.resize is not None:
        image = _middle(_with_shorter_side(image, fit.resize, filter_), size)
    elif image.size != (size, size):
        image = image.resize((size, size), filter_)
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))


def _with_shorter_side(image: Image.Image, pixels: int, filter_: Image.Resampling) -> Image.Image:
    width, height = image.size
    shorter = min(width, height)
    # torchvision cuts the longer side down to a whole number
    size = (
        (pixels, int(pixels * height / width)) if width == shorter else (int(pixels * width / height), pixels)
    )
    return image if shorter == pixels else image.resize(size, filter_)


def _middle(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    # torchvision first fills up what is too small, then rounds to the even
    left = -((size - width) // 2) if width < size else round((width - size) / 2)
    top = -((size - height) // 2) if height < size else round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def read_file(path: Path) -> bytes:
    """Read an image file whole.

    Raises:
        DataError: it cannot be read, is too large for an image, or is no file: a pipe that nobody writes
            to would be waited for without end, and a device such as /dev/zero has none.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
            raise DataError("cannot be read: a pipe or a device, not a file")
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # a NUL in the name is a ValueError
        raise DataError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    check_size(content)
    return content


def decode_file(path: Path, fit: Fit) -> npt.NDArray[np.uint8]:
    """Read a file and decode it.

    Raises:
        DataError: it cannot be read, or is no image; it names the file.
    """
    try:
        content = read_file(path)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return decode_named(path, content, fit)


def decode_named(path: Path, content: bytes, fit: Fit) -> npt.NDArray[np.uint8]:
    """Decode what was read from a file; raises DataError, which names it, where it is no image."""
    with explained(before=f"{path}: ", after="; repair or remove it"):
        return decode(content, fit)


def check_size(content: bytes) -> None:
    """Raise DataError where `content` is larger than any image should be."""
    if len(content) > MAX_FILE_BYTES:
        raise DataError(f"larger than {MAX_FILE_BYTES >> 20} MiB: not read as an image")


def read_image(content: bytes, fit: Fit) -> "Tensor":
    """Decode a single image to (3, image_size, image_size) uint8, as `decode` does.

    Raises:
        DataError: it is no image, or one of more than 89 million pixels.
    """
    import torch

    return torch.from_numpy(read_pixels(content, fit))


def read_pixels(content: bytes, fit: Fit) -> npt.NDArray[np.uint8]:
    """The same as an array; PyTorch is not imported."""
    with bombs_refused(), explained():
        return decode(content, fit)


@contextmanager
def bombs_refused() -> Iterator[None]:
    """Make PIL refuse images of so many pixels that they may be meant to exhaust the memory.

    Enter it in the main thread, for all that decode inside: filters belong to the process.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


@contextmanager
def explained(*, before: str = "", after: str = "") -> Iterator[None]:
    """Raise whatever PIL raises as a DataError that says so between `before` and `after`."""
    try:
        yield
    except UnidentifiedImageError as error:  # its own message shows an address in memory
        raise DataError(f"{before}not a readable image: no PNG, JPEG or WebP{after}") from error
    except Exception as error:  # PIL's decoders raise many types, none of them documented
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{before}not a readable image: {reason}{after}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert explicitly: PIL's own conversion would drop the alpha channel and clip 16-bit grey."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.has_transparency_data:
        # before resizing, so that colours hidden under full transparency do not bleed into the edges
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB")
    if image.mode.startswith("I;16") or image.mode == "I":
        grey = np.asarray(image).astype(np.int64) >> 8
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")
