import io
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from bncli.data import decode
from bncli.errors import DataError


def png(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def test_transparency_is_laid_on_black(rng):
    rgba = rng.integers(0, 256, (9, 9, 4), dtype=np.uint8)
    alpha = rgba[..., 3:] / 255.0
    expected = (rgba[..., :3] * alpha).transpose(2, 0, 1)
    assert np.abs(decode.decode(png(Image.fromarray(rgba)), decode.Fit(9)) - expected).max() <= 1
    grey_alpha = decode.decode(png(Image.fromarray(rgba[..., 2:])), decode.Fit(9))
    assert np.abs(grey_alpha - expected[2:]).max() <= 1


def test_a_transparent_palette_entry_becomes_black():
    image = Image.new("P", (8, 8))
    image.putpalette([200, 100, 50, 10, 20, 30])
    image.putpixel((0, 0), 1)
    pixels = decode.decode(png(image, transparency=0), decode.Fit(8))
    assert pixels[:, 0, 0].tolist() == [10, 20, 30]
    assert pixels[:, 1, 1].tolist() == [0, 0, 0]
    assert decode.decode(png(image), decode.Fit(8))[:, 1, 1].tolist() == [200, 100, 50]


def test_grey_images_have_three_equal_channels(rng):
    grey = rng.integers(0, 256, (8, 8), dtype=np.uint8)
    assert np.array_equal(decode.decode(png(Image.fromarray(grey)), decode.Fit(8)), np.stack([grey] * 3))


def test_16_bit_grey_keeps_its_upper_bits(rng):
    grey = rng.integers(0, 2**16, (8, 8), dtype=np.uint16)
    assert np.array_equal(decode.decode(png(Image.fromarray(grey)), decode.Fit(8)), np.stack([grey >> 8] * 3))


def test_the_exif_rotation_is_applied(rng):
    pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter, clockwise
    turned = np.rot90(pixels, -1).transpose(2, 0, 1)
    assert np.array_equal(decode.decode(png(Image.fromarray(pixels), exif=exif), decode.Fit(8)), turned)


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (20, 24)])
def test_resizing_is_bilinear_with_antialiasing(rng, size):
    pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    source = torch.from_numpy(pixels).permute(2, 0, 1)[None].double()
    resized = F.interpolate(source, (32, 32), mode="bilinear", antialias=True)[0].numpy()
    assert np.abs(decode.decode(png(Image.fromarray(pixels)), decode.Fit(32)) - resized).max() <= 1


def test_a_single_image_of_too_many_pixels_is_refused_also_where_warnings_are_ignored(monkeypatch):
    content = png(Image.new("RGB", (80, 80)))
    assert decode.read_image(content, decode.Fit(8)).shape == (3, 8, 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)  # PIL only warns up to twice as many
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match="not a readable image: Image size"):
            decode.read_image(content, decode.Fit(8))
