"""CIFAR-10 in pieces small enough to be carried to another machine, and back into its files, bit for bit.

Pictures compress badly as they are: xz leaves 143 MiB of them, and 95 MiB of what each pixel differs by from
its neighbours' guess, red and blue less green (WebP, lossless, in mosaics: 95 MiB, in 15 times the time).
The guess is the median edge detector of LOCO-I (Weinberger, Seroussi and Sapiro 2000). Needs NumPy alone.
"""

import hashlib
import json
import lzma
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

NAMES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta")
FOLDER = "cifar-10-batches-py"
IMAGE_BYTES = 10_000 * 3 * 32 * 32  # of a batch file, all in one place
NUM_PARTS = 2  # of a batch file's images, each compressed alone, so that every core has something to do
# What is left is almost noise. Looking far back for repetitions costs 6 times the time and makes it longer
_FILTERS = [
    {
        "id": lzma.FILTER_LZMA2,
        "dict_size": 1 << 16,
        "mf": lzma.MF_HC3,
        "depth": 4,
        "nice_len": 8,
        "lc": 0,
        "pb": 0,
    }
]

Planes = npt.NDArray[np.uint8]


def pack(source: Path, target: Path, piece_bytes: int) -> list[Path]:
    """Write the files of `source`/cifar-10-batches-py into folders of at most `piece_bytes` each."""
    target.mkdir(parents=True, exist_ok=True)
    contents = {name: (source / FOLDER / name).read_bytes() for name in NAMES}
    jobs: list[tuple[str, bytes]] = []
    facts: dict[str, dict[str, object]] = {}
    for name, content in contents.items():
        start = _find_images(content) if len(content) > IMAGE_BYTES else len(content)
        images = content[start : start + IMAGE_BYTES]
        facts[name] = {"sha256": hashlib.sha256(content).hexdigest(), "start": start}
        jobs.append((f"{name}.rest.xz", content[:start] + content[start + len(images) :]))
        if images:
            pixels = np.frombuffer(images, np.uint8).reshape(-1, 3, 32, 32)
            parts = np.split(pixels, NUM_PARTS)
            jobs += [(f"{name}.{i}.xz", residuals(part).tobytes()) for i, part in enumerate(parts)]
    with ThreadPoolExecutor() as threads:
        packed = list(threads.map(lambda job: lzma.compress(job[1], filters=_FILTERS), jobs))
    pieces: list[Path] = []
    room = 0
    for (name, _), data in zip(jobs, packed, strict=True):
        if len(data) > room:
            pieces.append(target / f"piece{len(pieces)}")
            pieces[-1].mkdir(exist_ok=True)
            room = piece_bytes
        (pieces[-1] / name).write_bytes(data)
        room -= len(data)
    for piece in pieces:  # whichever of them arrives
        (piece / "facts.json").write_text(json.dumps(facts))
    return pieces


def unpack(source: Path, target: Path) -> None:
    """Write CIFAR-10's files from what all pieces together held; OSError or ValueError without a part."""
    facts = json.loads((source / "facts.json").read_text())
    folder = target / FOLDER
    folder.mkdir(parents=True, exist_ok=True)

    def restore(name: str) -> None:
        rest = lzma.decompress((source / f"{name}.rest.xz").read_bytes())
        start, images = facts[name]["start"], b""
        if start < len(rest):
            with ThreadPoolExecutor(NUM_PARTS) as threads:
                parts = list(threads.map(lambda i: _restored(source / f"{name}.{i}.xz"), range(NUM_PARTS)))
            images = b"".join(parts)
        content = rest[:start] + images + rest[start:]
        if hashlib.sha256(content).hexdigest() != facts[name]["sha256"]:
            raise ValueError(f"{name}: its SHA-256 is not that of the file that was packed")
        (folder / name).write_bytes(content)

    with ThreadPoolExecutor() as threads:
        list(threads.map(restore, facts))


def residuals(images: Planes) -> Planes:
    """What the guess misses, by channel (3, N, 32, 32), of images (N, 3, 32, 32); all modulo 256."""
    planes = images.transpose(1, 0, 2, 3).copy()
    planes[0] -= planes[1]
    planes[2] -= planes[1]
    padded = np.pad(planes, ((0, 0), (0, 0), (1, 0), (1, 0)))
    return planes - _guess(padded[..., 1:, :-1], padded[..., :-1, 1:], padded[..., :-1, :-1])


def images_of(missed: Planes) -> Planes:
    """The images (N, 3, 32, 32) that `residuals` (3, N, 32, 32) are of."""
    # pixel by pixel, since each guess needs the ones before; of all images at once
    missed = missed.transpose(2, 3, 0, 1)
    pixels = np.zeros((33, 33, *missed.shape[2:]), np.uint8)  # with a row and a column of zeros before
    for y in range(32):
        for x in range(32):
            guess = _guess(pixels[y + 1, x], pixels[y, x + 1], pixels[y, x])
            np.add(missed[y, x], guess, out=pixels[y + 1, x + 1])
    planes = pixels[1:, 1:].transpose(2, 3, 0, 1).copy()  # (3, N, 32, 32)
    planes[0] += planes[1]
    planes[2] += planes[1]
    return np.ascontiguousarray(planes.transpose(1, 0, 2, 3))


def _guess(left: Planes, above: Planes, corner: Planes) -> Planes:
    """left + above - corner, between the two."""
    low, high = np.minimum(left, above), np.maximum(left, above)
    guess: Planes = np.where(corner >= high, low, np.where(corner <= low, high, left + above - corner))
    return guess


def _restored(path: Path) -> bytes:
    missed = np.frombuffer(lzma.decompress(path.read_bytes()), np.uint8).reshape(3, -1, 32, 32)
    return images_of(missed).tobytes()


def _find_images(content: bytes) -> int:
    """Where they begin: after NumPy's or Python's own marker of a string of so many bytes."""
    marker = content.index(IMAGE_BYTES.to_bytes(4, "little"))
    return marker + 4


if __name__ == "__main__":
    if sys.argv[1] == "pack":  # DATA TARGET MIB
        for one in pack(Path(sys.argv[2]), Path(sys.argv[3]), int(float(sys.argv[4]) * 2**20)):
            print(f"{one}: {sum(path.stat().st_size for path in one.iterdir()) / 2**20:.1f} MiB")
    else:  # unpack SOURCE TARGET
        unpack(Path(sys.argv[2]), Path(sys.argv[3]))
