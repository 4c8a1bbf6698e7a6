"""CIFAR-10 in pieces, and back: every byte, or an error."""

from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks.gpu import data

NUM_IMAGES = 40


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files as CIFAR-10's are, with fewer images: something before them, and something behind."""
    monkeypatch.setattr(data, "IMAGE_BYTES", NUM_IMAGES * 3072)
    folder = tmp_path / "source" / data.FOLDER
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in data.NAMES:
        images = rng.integers(0, 256, (NUM_IMAGES, 3, 32, 32), dtype=np.uint8)
        images[: NUM_IMAGES // 2] = np.arange(32, dtype=np.uint8)  # smooth
        middle = data.IMAGE_BYTES.to_bytes(4, "little") + images.tobytes()
        content = b"before" + middle + rng.bytes(50)
        (folder / name).write_bytes(b"names" if name == "batches.meta" else content)
    return tmp_path / "source"


def test_what_was_packed_comes_back_from_pieces_that_are_small_enough(source: Path, tmp_path: Path) -> None:
    pieces = data.pack(source, tmp_path / "pieces", 300_000)
    assert len(pieces) == 2
    for piece in pieces:
        parts = list(piece.iterdir())
        assert sum(part.stat().st_size for part in parts if part.suffix == ".xz") <= 300_000
        (tmp_path / "all").mkdir(exist_ok=True)
        for part in parts:
            (tmp_path / "all" / part.name).write_bytes(part.read_bytes())
    data.unpack(tmp_path / "all", tmp_path / "target")
    for name in data.NAMES:
        found, expected = ((root / data.FOLDER / name).read_bytes() for root in (tmp_path / "target", source))
        assert found == expected, name


def test_a_part_that_is_not_the_one_that_was_packed_is_refused(source: Path, tmp_path: Path) -> None:
    (piece,) = data.pack(source, tmp_path / "pieces", 10**9)
    (piece / "test_batch.1.xz").write_bytes((piece / "data_batch_1.1.xz").read_bytes())
    with pytest.raises(ValueError, match="test_batch: its SHA-256 is not that"):
        data.unpack(piece, tmp_path / "target")
    assert not (tmp_path / "target" / data.FOLDER / "test_batch").exists()


def test_differences_from_a_guess_are_small_where_an_image_is_smooth() -> None:
    images = np.tile(np.arange(0, 64, 2, dtype=np.uint8), (2, 3, 32, 1))
    missed = data.residuals(images)
    assert missed[1, :, :, 1:].max() == 2  # green; the guess of a ramp's first row is the pixel at the left
    assert (missed[1, :, 1:, 1:] == 0).all()
    assert (missed[[0, 2]] == 0).all()  # less green there is nothing left
    assert (data.images_of(missed) == images).all()
