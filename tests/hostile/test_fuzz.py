"""Seeded mutations of configurations, checkpoints and images through the real entry point.

Whatever comes in, a command ends in time with exit code 0, 1 or 2; with 2 it says why on one line; and
neither stdout nor stderr holds anything that a terminal would obey.
"""

import io
import random
import re
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from bncli.checkpoints.part_digests import digest_parts
from tests.conftest import Bncli
from tests.hostile.mutations import mutated, with_changed_bytes

SECONDS = 20  # of one case; the slowest took a fraction of one
MEMORY = 1 << 20  # KiB that the process may grow by over all cases
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
# cases of configurations, of checkpoints and of images
QUICK, SLOW = (60, 80, 60), (2_500, 4_500, 3_000)


@contextmanager
def limited(case: str) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"{case}: not done after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check(bncli: Bncli, case: str, *arguments: object) -> str:
    """Run one command under its limits, check how it ends, and return its stdout if it ended with 0."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with limited(case):
        outcome = bncli(*arguments)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    told = f"{case}: {arguments} gave {outcome}"
    assert outcome.code in {0, 1, 2}, told
    assert "this is a bug" not in outcome.err, told
    assert "out of memory" not in outcome.err, told
    assert "Traceback" not in outcome.err + outcome.out, told
    assert not CONTROL.search(outcome.out + outcome.err), told
    assert grown < MEMORY, told
    if outcome.code == 2:
        errors = [line for line in outcome.err.splitlines() if line.startswith("bncli: error: ")]
        assert len(errors) == 1, told
        assert outcome.err.splitlines()[-1] == errors[0], told
    return outcome.out if outcome.code == 0 else ""


def numbers_of_cases(place: int) -> list[object]:
    return [QUICK[place], pytest.param(SLOW[place], marks=pytest.mark.slow)]


@pytest.mark.parametrize("num_cases", numbers_of_cases(0))
def test_no_mutated_configuration_breaks_a_dry_run(
    bncli: Bncli, smallest_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_cases: int
) -> None:
    monkeypatch.chdir(tmp_path)
    # what a mutation may name must cost nothing: no host, and no million images
    monkeypatch.setattr("bncli.data.synthetic.load_synthetic", _few_images())
    values = yaml.safe_load(smallest_config.read_text())
    values |= {"augment": {"crop_padding": 2, "flip": "random", "cutout": 4}}
    values["model"]["batch_norm"] = {"momentum": 0.1, "eps": 1e-5, "affine": True}
    path = tmp_path / "config.yaml"
    num_accepted = 0
    for seed in range(num_cases):
        rng = random.Random(seed)
        if rng.random() < 0.7:
            text = yaml.dump(mutated(values, rng)).encode(errors="surrogatepass")
        else:
            text = with_changed_bytes(smallest_config.read_bytes(), rng)
        path.write_bytes(text)
        json = ["--json"] if rng.random() < 0.5 else []
        num_accepted += bool(check(bncli, f"configuration {seed}", "train", path, "--dry-run", *json))
    assert 0 < num_accepted < num_cases * 0.7


@pytest.mark.parametrize("num_cases", numbers_of_cases(1))
def test_no_mutated_checkpoint_breaks_a_command_or_gives_another_answer(
    bncli: Bncli, smallest_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_cases: int
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.arange(3072, dtype=np.uint8).reshape(32, 32, 3)).save(tmp_path / "image.png")
    path = tmp_path / "checkpoint.pt"
    whole = (smallest_run / "last.pt").read_bytes()
    content = torch.load(smallest_run / "last.pt", weights_only=True)
    content["class_names"] = list(content["class_names"])
    commands = [
        ["predict", path, "image.png"],
        ["predict", path, "image.png", "--top", 3, "--json"],
        ["doctor", path],
        ["eval", path, "--num-images", 2, "--batch-sizes", "2"],
    ]
    path.write_bytes(whole)
    answers = [check(bncli, "whole", *command) for command in commands]
    assert all(answers)
    for seed in range(num_cases):
        rng = random.Random(seed)
        which = rng.choices(range(4), (5, 3, 3, 1))[0]
        if rng.random() < 0.5:
            path.write_bytes(with_changed_bytes(whole, rng))
            answer = check(bncli, f"checkpoint bytes {seed}", *commands[which])
            if which < 2:
                assert answer in {"", answers[which]}, f"checkpoint {seed} silently gives another answer"
            continue
        changed = mutated(content, rng, tensors=rng.random() < 0.5)
        if isinstance(changed, dict) and rng.random() < 0.8:  # a forger signs what he forged
            changed.pop("digests", None)
            try:
                changed["digests"] = digest_parts(changed)
            except (ValueError, RuntimeError, NotImplementedError, TypeError):
                continue  # such a tensor cannot be signed
        torch.save(changed, path)
        check(bncli, f"checkpoint values {seed}", *commands[which])


@pytest.mark.parametrize("num_cases", numbers_of_cases(2))
def test_no_mutated_image_breaks_predict(
    bncli: Bncli, smallest_run: Path, tmp_path: Path, num_cases: int
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 4), np.uint8)
    wholes = []
    for mode, kind in (("RGB", "PNG"), ("RGBA", "PNG"), ("L", "PNG"), ("P", "PNG"), ("RGB", "JPEG"), ("CMYK", "JPEG"),  # noqa: E501
                       ("RGB", "WEBP"), ("RGBA", "WEBP"), ("I;16", "PNG"), ("RGB", "GIF"), ("RGB", "TIFF")):  # fmt: skip  # noqa: E501
        image = Image.fromarray(pixels).convert("RGB" if mode == "I;16" else mode)
        image = image.convert("L").convert("I").convert("I;16") if mode == "I;16" else image
        file = io.BytesIO()
        image.save(file, kind, **({"icc_profile": b"x" * 50, "exif": Image.Exif()} if kind == "JPEG" else {}))
        wholes.append(file.getvalue())
    for seed in range(num_cases):
        rng = random.Random(seed)
        path = tmp_path / f"image{rng.choice(['.png', '.jpg', '.webp', ''])}"
        path.write_bytes(with_changed_bytes(rng.choice(wholes), rng))
        json = ["--json"] if rng.random() < 0.3 else []
        check(bncli, f"image {seed}", "predict", smallest_run / "last.pt", path, *json)


def _few_images():
    from bncli.config import SyntheticConfig
    from bncli.data.synthetic import load_synthetic

    cache = load_synthetic(SyntheticConfig(num_train=20, num_test=10))
    return lambda *_, **_options: cache
