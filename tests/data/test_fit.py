"""How images of any size become squares, against torchvision's own transforms."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bncli.data.decode import Fit, decode
from bncli.torchvision_compat import import_torchvision

v2 = import_torchvision().transforms.v2


def photo(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def as_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("width", "height", "size", "resize"),
    [
        (50, 40, 24, 32),
        (40, 50, 24, 32),
        (33, 71, 25, 31),
        (32, 90, 24, 32),
        (20, 20, 24, 28),
        (45, 32, 40, 32),
    ],
)
def test_the_middle_of_the_resized_image_is_that_of_torchvision(
    width: int, height: int, size: int, resize: int, interpolation: str
) -> None:
    image = photo(width, height)
    mode = v2.InterpolationMode(interpolation)
    transform = v2.Compose([v2.Resize(resize, mode), v2.CenterCrop(size)])
    expected = np.asarray(transform(image)).transpose(2, 0, 1)
    found = decode(as_png(image), Fit(size, resize, interpolation))  # type: ignore[arg-type]
    np.testing.assert_array_equal(found, expected)


def test_without_resize_the_whole_image_becomes_the_square() -> None:
    image = photo(50, 40)
    expected = np.asarray(image.resize((24, 24), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    np.testing.assert_array_equal(decode(as_png(image), Fit(24, interpolation="bicubic")), expected)


def test_a_plain_square_has_the_name_that_caches_had_before() -> None:
    assert str(Fit(32)) == "32"
    assert (
        len({str(fit) for fit in (Fit(32), Fit(32, 40), Fit(32, 40, "bicubic"), Fit(32, None, "bicubic"))})
        == 4
    )


def test_a_folder_is_decoded_as_its_configuration_says_and_each_way_is_cached_apart(tmp_path: Path) -> None:
    from bncli.config import ImageFolderConfig
    from bncli.data import load_dataset

    image = photo(50, 40)
    for split in ("train", "test"):
        for name in ("a", "b"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            image.save(folder / "0.png")
    for fit in (Fit(24), Fit(24, 32), Fit(24, 32, "bicubic")):
        config = ImageFolderConfig(
            root=str(tmp_path), image_size=fit.image_size, resize=fit.resize,
            interpolation=fit.interpolation, cache=str(tmp_path / "cache"),
        )  # fmt: skip
        expected = torch.from_numpy(decode(as_png(image), fit))
        for _ in range(2):  # decoded, then from the cache
            assert torch.equal(load_dataset(config).test.images[1], expected)
