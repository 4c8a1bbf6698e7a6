"""`bncli predict`: every kind of image file, each answered as if it were alone."""

import io
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bncli.checkpoints import load_checkpoint, load_model
from bncli.config_file import config_from_dict
from bncli.data import load_dataset
from bncli.determinism import FixedShape
from tests.conftest import Bncli, save_as_if_whole

SIDE = 32


@pytest.fixture(scope="module")
def pixels(finished_run: Path) -> np.ndarray:
    """Test images of the run, (N, 32, 32, 3) uint8."""
    config = load_checkpoint(finished_run / "last.pt").config
    return load_dataset(config.data).test.images[:8].permute(0, 2, 3, 1).numpy()


@pytest.fixture
def expect(finished_run: Path) -> Callable[[np.ndarray], tuple[str, float]]:
    """The oracle: the network itself on pixels (32, 32, 3), in a batch of one."""
    checkpoint = load_checkpoint(finished_run / "last.pt")
    model = load_model(checkpoint).to(memory_format=torch.channels_last)

    def answer(image: np.ndarray) -> tuple[str, float]:
        batch = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None]
        with torch.no_grad():
            probabilities = model(batch.to(memory_format=torch.channels_last)).double().softmax(1)[0]
        return checkpoint.class_names[int(probabilities.argmax())], float(probabilities.max())

    return answer


def save(pixels: np.ndarray, path: Path, mode: str | None = None, **options: object) -> Path:
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def test_a_line_per_image_and_json_agree_with_the_network(
    bncli: Bncli, finished_run: Path, tmp_path: Path, pixels: np.ndarray, expect: Callable
) -> None:
    paths = [save(image, tmp_path / f"{index}.png") for index, image in enumerate(pixels[:3])]
    expected = [expect(image) for image in pixels[:3]]
    outcome = bncli("predict", finished_run / "last.pt", *paths)
    assert outcome.code == 0
    assert outcome.err == ""
    lines = [f"{path}: {name} {value:.1%}" for path, (name, value) in zip(paths, expected, strict=True)]
    assert outcome.out.splitlines() == lines
    found = bncli("predict", finished_run / "last.pt", *paths, "--json").json["predictions"]
    assert [item["image"] for item in found] == [str(path) for path in paths]
    assert [(item["class"], item["probability"]) for item in found] == expected
    for item in found:
        assert item["top"] == [{"class": item["class"], "probability": item["probability"]}]


def test_top_shows_so_many_classes_in_falling_order(
    bncli: Bncli, finished_run: Path, tmp_path: Path, pixels: np.ndarray
) -> None:
    path = save(pixels[0], tmp_path / "0.png")
    top = bncli("predict", finished_run / "last.pt", path, "--json", "--top", 99).json["predictions"][0][
        "top"
    ]
    names = load_checkpoint(finished_run / "last.pt").class_names
    assert sorted(item["class"] for item in top) == sorted(names)
    values = [item["probability"] for item in top]
    assert values == sorted(values, reverse=True)
    assert sum(values) == pytest.approx(1)
    for number in (2, 10):  # too long for a line, they stand below the image's path, which stays whole
        lines = bncli("predict", finished_run / "last.pt", path, "--top", number).out.splitlines()
        classes = ", ".join(f"{x['class']} {x['probability']:.1%}" for x in top[:number])
        assert " ".join(line.strip() for line in lines) == f"{path}: {classes}"
        assert all(line.startswith("  ") and len(line) <= 80 for line in lines[1:])
    assert bncli("predict", finished_run / "last.pt", path, "--top", 0).code == 2


def turned(pixels: np.ndarray, path: Path) -> np.ndarray:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    save(pixels, path, exif=exif)
    return np.rot90(pixels, -1)


def palette(pixels: np.ndarray, path: Path) -> np.ndarray:
    image = Image.fromarray(pixels).quantize(16)
    image.save(path)
    return np.asarray(image.convert("RGB"))


def transparent_palette(pixels: np.ndarray, path: Path) -> np.ndarray:
    image = Image.fromarray(pixels).quantize(16)
    image.save(path, transparency=0)
    seen = np.asarray(image.convert("RGB")).copy()
    seen[np.asarray(image) == 0] = 0  # transparent images are laid on black
    return seen


def alpha(pixels: np.ndarray, path: Path) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE, 1), np.uint8)
    mask[8:] = 255
    save(np.concatenate([pixels, mask], 2), path)
    return pixels * (mask > 0)


def grey(pixels: np.ndarray, path: Path) -> np.ndarray:
    save(pixels, path, mode="L")
    return np.stack([np.asarray(Image.fromarray(pixels).convert("L"))] * 3, 2)


def grey_16_bits(pixels: np.ndarray, path: Path) -> np.ndarray:
    values = pixels[..., 0].astype(np.uint16) * 257
    Image.fromarray(values).save(path)
    return np.stack([pixels[..., 0]] * 3, 2)


def one_bit(pixels: np.ndarray, path: Path) -> np.ndarray:
    image = Image.fromarray(pixels).convert("1")
    image.save(path)
    return np.stack([np.asarray(image).astype(np.uint8) * 255] * 3, 2)


def cmyk(pixels: np.ndarray, path: Path) -> np.ndarray:
    path = path.with_suffix(".jpg")
    save(pixels, path, mode="CMYK")
    return np.asarray(Image.open(path).convert("RGB"))


def jpeg(pixels: np.ndarray, path: Path) -> np.ndarray:
    save(pixels, path.with_suffix(".jpg"))
    return np.asarray(Image.open(path.with_suffix(".jpg")))


def webp(pixels: np.ndarray, path: Path) -> np.ndarray:
    save(pixels, path.with_suffix(".webp"), lossless=True)
    return pixels


def larger(pixels: np.ndarray, path: Path) -> np.ndarray:
    image = Image.fromarray(pixels).resize((70, 50), Image.Resampling.NEAREST)
    image.save(path)
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def one_pixel(pixels: np.ndarray, path: Path) -> np.ndarray:
    save(pixels[:1, :1], path)
    return np.broadcast_to(pixels[:1, :1], pixels.shape)


@pytest.mark.parametrize(
    "kind",
    [
        turned,
        palette,
        transparent_palette,
        alpha,
        grey,
        grey_16_bits,
        one_bit,
        cmyk,
        jpeg,
        webp,
        larger,
        one_pixel,
    ],
    ids=lambda kind: kind.__name__,
)
def test_every_kind_of_image_is_answered_for_the_pixels_that_it_shows(
    bncli: Bncli, finished_run: Path, tmp_path: Path, pixels: np.ndarray, expect: Callable, kind: Callable
) -> None:
    name, probability = expect(kind(pixels[1], tmp_path / "image.png"))
    found = bncli("predict", finished_run / "last.pt", tmp_path, "--json").json["predictions"][0]
    assert (found["class"], found["probability"]) == (name, probability)


def test_what_is_no_image_is_named_and_the_others_are_answered(
    bncli: Bncli, finished_run: Path, tmp_path: Path, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)  # 32 x 32 may pass, 80 x 80 may not
    good = save(pixels[0], tmp_path / "good.png")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    (tmp_path / "truncated.png").write_bytes(good.read_bytes()[:-30])
    save(np.zeros((80, 80, 3), np.uint8), tmp_path / "bomb.png")
    save(np.zeros((500, 500, 3), np.uint8), tmp_path / "bigger-bomb.png")
    (tmp_path / "folder").mkdir()
    bad = ["text.png", "empty.png", "truncated.png", "bomb.png", "bigger-bomb.png", "missing.png", "folder"]
    paths = [str(tmp_path / name) for name in bad]
    outcome = bncli("predict", finished_run / "last.pt", *paths[:3], good, *paths[3:], good)
    assert outcome.code == 2
    assert [line.split(":")[0] for line in outcome.out.splitlines()] == [str(good)] * 2
    messages = outcome.err.splitlines()
    assert len(messages) == len(bad)
    for message, path in zip(messages, paths, strict=True):
        assert message.startswith(f"bncli: error: {path}: ")
        assert "0x" not in message
    answered = bncli("predict", finished_run / "last.pt", paths[0], good, "--json")
    assert answered.code == 2
    assert [item["image"] for item in answered.json["predictions"]] == [str(good)]
    none = bncli("predict", finished_run / "last.pt", paths[0], "--json")
    assert (none.code, none.json["predictions"]) == (2, [])


def test_a_folder_stands_for_its_images_sorted(
    bncli: Bncli, finished_run: Path, tmp_path: Path, pixels: np.ndarray
) -> None:
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    for name in ("b.png", "a.PNG", "deeper/0.jpg", ".hidden.png"):
        save(pixels[0], tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("passed over")
    outcome = bncli("predict", finished_run / "last.pt", tmp_path / "in", "--json")
    assert outcome.code == 0
    found = [item["image"] for item in outcome.json["predictions"]]
    assert found == [str(tmp_path / "in" / name) for name in ("a.PNG", "b.png", "deeper/0.jpg")]


def test_standard_input_is_an_image_too(
    bncli: Bncli, finished_run: Path, pixels: np.ndarray, expect: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = io.BytesIO()
    Image.fromarray(pixels[2]).save(content, format="webp", lossless=True)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.getvalue())))
    found = bncli("predict", finished_run / "last.pt", "-", "--json").json["predictions"][0]
    assert (found["image"], found["class"], found["probability"]) == ("-", *expect(pixels[2]))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    outcome = bncli("predict", finished_run / "last.pt", "-")
    assert outcome.code == 2
    assert outcome.err.startswith("bncli: error: -: not a readable image")


@pytest.mark.parametrize("option", [(), ("--batch-invariant",)])
def test_an_answer_does_not_depend_on_what_else_is_asked(
    bncli: Bncli, finished_run: Path, tmp_path: Path, pixels: np.ndarray, option: tuple
) -> None:
    paths = [save(image, tmp_path / f"{index}.png") for index, image in enumerate(pixels[:4])]
    (tmp_path / "text.png").write_text("no image")
    together = bncli("predict", finished_run / "last.pt", *paths, *option, "--json").json["predictions"]
    mixed = bncli(
        "predict", finished_run / "last.pt", paths[3], tmp_path / "text.png", *paths[::-1], *option, "--json"
    )
    for path, expected in zip(paths, together, strict=True):
        alone = bncli("predict", finished_run / "last.pt", path, *option, "--json").json["predictions"]
        assert alone == [expected]
        assert expected in mixed.json["predictions"]


def test_batch_invariant_answers_have_the_bits_of_a_batch(
    bncli: Bncli, finished_run: Path, tmp_path: Path, pixels: np.ndarray
) -> None:
    for index, image in enumerate(pixels):
        save(image, tmp_path / f"{index}.png")
    model = FixedShape(load_model(finished_run / "last.pt"))
    batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = model.to(memory_format=torch.channels_last)(batch).double().softmax(1).amax(1).tolist()
    outcome = bncli("predict", finished_run / "last.pt", tmp_path, "--batch-invariant", "--json").json
    assert outcome["batch_invariant"] is True
    assert [item["probability"] for item in outcome["predictions"]] == expected


def test_a_network_that_answers_nan_says_so(
    bncli: Bncli, finished_run: Path, tmp_path: Path, pixels: np.ndarray
) -> None:
    content = torch.load(finished_run / "last.pt", weights_only=True)
    content["state_dict"]["stages.0.0.norm.running_var"][0] = float("nan")
    save_as_if_whole(content, tmp_path / "nan.pt")
    path = save(pixels[0], tmp_path / "0.png")
    outcome = bncli("predict", tmp_path / "nan.pt", path)
    assert outcome.code == 2
    assert outcome.err == (
        f"bncli: error: {path}: the network answers NaN; look for it in its weights and running statistics\n"
    )


def test_runtime_overrides_are_taken_and_wrong_ones_refused(
    bncli: Bncli, finished_run: Path, tmp_path: Path, pixels: np.ndarray
) -> None:
    path = save(pixels[0], tmp_path / "0.png")
    arguments = ("predict", finished_run / "last.pt", path, "--json", "--set")
    assert bncli(*arguments, "runtime.precision=bfloat16").json["runtime"]["precision"] == "bfloat16"
    outcome = bncli(*arguments, "runtime.precision=half")
    assert outcome.code == 2
    assert "runtime.precision" in outcome.err


def test_the_images_of_the_data_set_get_the_answers_of_the_evaluation(
    bncli: Bncli, finished_run: Path, tmp_path: Path
) -> None:
    """From the file to the class: what eval counts as right, predict gets right."""
    checkpoint = load_checkpoint(finished_run / "last.pt")
    config = config_from_dict(checkpoint.config.model_dump(mode="json"), None, source="test")
    test = load_dataset(config.data).test
    for index, image in enumerate(test.images):
        save(image.permute(1, 2, 0).numpy(), tmp_path / f"{index:03}.png")
    found = bncli("predict", finished_run / "last.pt", tmp_path, "--json").json["predictions"]
    right = [
        item["class"] == checkpoint.class_names[label]
        for item, label in zip(found, test.labels.tolist(), strict=True)
    ]
    assert sum(right) / len(right) == checkpoint.test_accuracy
