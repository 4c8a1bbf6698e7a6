"""`bncli recalibrate` of networks that are no classifiers, and of files that cannot be rewritten.

Numbers are compared with those that plain hooks see in the new network, in float64.
"""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from bncli.checkpoints import load_checkpoint, load_weights
from bncli.config import SyntheticConfig
from bncli.data import load_dataset
from bncli.models import build_network
from tests.conftest import Bncli

NETS = """
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import nn


def block(inputs, outputs, stride=2):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class AutoEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(block(3, 4), block(4, 6))
        self.decoder = nn.Sequential(nn.Upsample(scale_factor=4), block(6, 3, 1))

    def forward(self, images):
        code = self.encoder(images)
        return {"code": code, "image": self.decoder(code)}


class Segmenter(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head, self.aux = block(3, 4), nn.Conv2d(4, 5, 1), block(4, 5, 1)

    def forward(self, images):
        features = self.body(images)
        result = OrderedDict(out=self.head(features))
        if self.training:
            result["aux"] = self.aux(features)
        return result


class FrozenBatchNorm2d(nn.Module):
    def __init__(self, channels):
        super().__init__()
        for name, value in dict(weight=1.0, bias=0.0, running_mean=0.0, running_var=1.0).items():
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):
        scale, shape = self.weight / (self.running_var + 1e-5).sqrt(), (1, -1, 1, 1)
        return (x - self.running_mean.view(shape)) * scale.view(shape) + self.bias.view(shape)


def frozen():
    norms = FrozenBatchNorm2d(4), FrozenBatchNorm2d(4)
    return nn.Sequential(nn.Conv2d(3, 4, 1), norms[0], nn.Conv2d(4, 4, 1), norms[1], block(4, 4))


def twice():
    norm = nn.BatchNorm2d(3)
    return nn.Sequential(norm, nn.Conv2d(3, 3, 3), norm)


class Boxes(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = block(3, 4)

    def forward(self, images):
        assert not self.training
        return [{"boxes": features.flatten(1)[:, :4].T} for features in self.body(images)]
"""
DATA = ("--set", "data.name=synthetic", "--set", "data.num_train=60", "--set", "data.num_test=40")
COMPUTED = ("--set", "runtime.precision=float32", "--device", "cpu", "--set", "runtime.threads=1")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the networks are, and the commands run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(NETS)
    return tmp_path


def save_ruined(name: str) -> dict[str, Tensor]:
    """The state dict of a network whose statistics are those of nothing, in a.pt."""
    state = {key: value.clone() for key, value in build_network(f"nets.py:{name}").state_dict().items()}
    for key, value in state.items():
        if key.endswith(".running_mean"):
            value.add_(0.5)
        if key.endswith(".running_var"):
            value.mul_(3)
    torch.save({"state_dict": state, "lr": 0.1}, "a.pt")
    return state


def inputs_in_eval_mode(name: str, path: str, shift: float, scale: float) -> dict[str, tuple[Tensor, ...]]:
    """Variance and mean in float64 of what enters each BatchNorm layer of the network in a file."""
    network = build_network(f"nets.py:{name}").eval()
    load_weights(network, path)
    seen: dict[str, list[Tensor]] = {}
    for key, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(
                lambda _, args, key=key: seen.setdefault(key, []).append(args[0].double())
            )
    images = load_dataset(SyntheticConfig(num_train=60, num_test=40)).train.images
    with torch.no_grad():
        network((images.float() / 255 - shift) / scale)
    return {
        key: torch.var_mean(
            torch.cat([values.transpose(0, 1).flatten(1) for values in parts], 1), 1, correction=0
        )
        for key, parts in seen.items()
    }


@pytest.mark.parametrize("name", ["AutoEncoder", "Segmenter", "frozen", "Boxes"])
def test_a_network_of_any_outputs_gets_the_statistics_of_its_inputs(
    bncli: Bncli, folder: Path, name: str
) -> None:
    state = save_ruined(name)
    command = ("recalibrate", "a.pt", "-o", "new.pt", "--model", f"nets.py:{name}", *DATA, *COMPUTED)
    outcome = bncli(*command, "--normalization", "half", "--no-evaluate", "--verify", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["verification"]["self_consistent"]
    assert (outcome.json["before"], outcome.json["after"], outcome.json["difference"]) == (None, None, None)
    assert outcome.json["verdict"] == "The network was not evaluated."
    new = torch.load("new.pt", weights_only=True)
    assert new["lr"] == 0.1
    expected = inputs_in_eval_mode(name, "new.pt", 0.5, 0.5)
    changed = {key for key, value in new["state_dict"].items() if not torch.equal(value, state[key])}
    assert changed == {f"{key}.{leaf}" for key in expected for leaf in ("running_mean", "running_var")}
    for key, (var, mean) in expected.items():
        assert ((new["state_dict"][f"{key}.running_mean"] - mean).abs() / var.sqrt()).max() <= 1e-6
        assert ((new["state_dict"][f"{key}.running_var"] - var).abs() / var).max() <= 1e-6
    skipped = {one["name"]: one["reason"] for one in outcome.json["skipped"]}
    assert skipped == {
        "Segmenter": {"aux.1": "saw no input"},
        "frozen": dict.fromkeys("13", "is frozen: a FrozenBatchNorm2d never updates its statistics"),
    }.get(name, {})


def test_what_was_not_evaluated_is_told_so(bncli: Bncli, folder: Path) -> None:
    save_ruined("frozen")
    command = ("recalibrate", "a.pt", "-o", "new.pt", "--model", "nets.py:frozen", *DATA, *COMPUTED)
    outcome = bncli(*command, "--no-evaluate")
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert "test split  not evaluated" in outcome.out
    assert "accuracy" not in outcome.out
    assert lines[-1] == "The network was not evaluated."
    assert max(map(len, lines)) <= 80
    assert "left unchanged: 1, 3; each is frozen: a FrozenBatchNorm2d never" in " ".join(outcome.out.split())


def test_a_layer_that_is_used_twice_has_the_statistics_of_both_uses(bncli: Bncli, folder: Path) -> None:
    save_ruined("twice")
    command = ("recalibrate", "a.pt", "-o", "new.pt", "--model", "nets.py:twice", *DATA, *COMPUTED)
    outcome = bncli(*command, "--normalization", "half", "--no-evaluate")
    assert outcome.code == 0, outcome.err
    ((var, mean),) = inputs_in_eval_mode("twice", "new.pt", 0.5, 0.5).values()
    new = torch.load("new.pt", weights_only=True)["state_dict"]
    for name in "02":
        torch.testing.assert_close(new[f"{name}.running_mean"].double(), mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(new[f"{name}.running_var"].double(), var, rtol=1e-5, atol=0)


def test_a_network_that_classifies_nothing_is_told_of_no_evaluate(bncli: Bncli, folder: Path) -> None:
    save_ruined("AutoEncoder")
    command = ("recalibrate", "a.pt", "--model", "nets.py:AutoEncoder", *DATA, *COMPUTED)
    outcome = bncli(*command, "-o", "new.pt")
    assert (outcome.code, outcome.out) == (2, "")
    expected = (
        "expected logits of shape (N, classes), found a dict with code, image; --logits NAME takes one of"
    )
    assert "; --no-evaluate recalibrates a network that is no classifier" in outcome.err
    assert expected in outcome.err.splitlines()[-1]
    assert not Path("new.pt").exists()
    assert bncli(*command, "--verify").code == 1  # evaluates nothing


def test_a_checkpoint_of_our_own_is_not_evaluated_either(
    bncli: Bncli, finished_run: Path, tmp_path: Path
) -> None:
    old, new = finished_run / "last.pt", tmp_path / "new.pt"
    outcome = bncli("recalibrate", old, "-o", new, "--num-images", 100, "--no-evaluate", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["before"] is None
    made = load_checkpoint(new)
    assert made.test_accuracy is None
    assert made.test_loss is None
    assert made.recalibration is not None
    assert made.recalibration["after"] is None
    evaluated = tmp_path / "evaluated.pt"
    assert bncli("recalibrate", old, "-o", evaluated, "--num-images", 100).code == 0
    for key, value in load_checkpoint(evaluated).state_dict.items():
        assert torch.equal(value, made.state_dict[key])
    assert bncli("eval", new, "--num-images", 4, "--json").code == 0


def test_a_file_that_cannot_be_rewritten_is_refused_before_anything_is_measured(
    bncli: Bncli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def computed(*_: object, **__: object) -> None:
        raise AssertionError("images were asked for")

    state = save_ruined("AutoEncoder")
    shared = state["encoder.0.1.running_mean"].view(-1)  # another tensor in the same memory
    torch.save({"state_dict": {**state, "encoder.0.1.bias": shared}}, "a.pt")
    safetensors.torch.save_file(state, "b.safetensors")
    command = ("-o", "new.pt", "--model", "nets.py:AutoEncoder", *DATA, *COMPUTED, "--no-evaluate")
    with monkeypatch.context() as patch:
        patch.setattr("bncli.data.load_dataset", computed)
        outcome = bncli("recalibrate", "a.pt", *command)
        unknown = bncli("recalibrate", "b.safetensors", *command, "--layers", "nothing.*")
    assert (outcome.code, outcome.out) == (2, "")
    (line,) = [line for line in outcome.err.splitlines() if "error" in line]
    assert "a.pt: encoder.0.1.running_mean shares its memory in the file with encoder.0.1.bias" in line
    assert unknown.code == 2
    assert "no BatchNorm layer matches 'nothing.*'" in unknown.err.splitlines()[-1]
    assert not Path("new.pt").exists()
    # what is not written does not matter
    outcome = bncli("recalibrate", "a.pt", *command, "--layers", "decoder.*")
    assert outcome.code == 0, outcome.err


def test_debias_asks_for_no_images_where_nothing_is_evaluated(
    bncli: Bncli, folder: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def computed(*_: object, **__: object) -> None:
        raise AssertionError("images were asked for")

    monkeypatch.setattr("bncli.data.load_dataset", computed)
    state = save_ruined("AutoEncoder")
    torch.save({**state, "encoder.0.1.num_batches_tracked": torch.tensor(3)}, "a.pt")
    how = ("--method", "debias", "--no-evaluate", "--layers", "encoder.0.1", "--json")
    outcome = bncli("recalibrate", "a.pt", "-o", "new.pt", "--model", "nets.py:AutoEncoder", *how)
    assert outcome.code == 0, outcome.err
    assert (outcome.json["dataset"], outcome.json["num_images"]) == (None, 0)
    rest = 0.9**3
    mean = state["encoder.0.1.running_mean"]
    torch.testing.assert_close(torch.load("new.pt")["encoder.0.1.running_mean"], mean / (1 - rest))
    own = bncli(
        "recalibrate", finished_run / "last.pt", "-o", "own.pt", "--method", "debias", "--no-evaluate"
    )
    assert own.code == 0, own.err


def test_an_address_is_answered_before_the_work_begins(bncli: Bncli, folder: Path) -> None:
    named = ("--model", "nets.py:AutoEncoder", *DATA)
    for address in ("http://host.invalid/a.pt", "s3://bucket/a.pt"):
        outcome = bncli("recalibrate", address, "-o", "new.pt", *named)
        said = f"bncli: error: {address}: new ones are made of files on this machine; download it first\n"
        assert (outcome.code, outcome.err) == (2, said)
        own = bncli("eval", address)
        assert (own.code, own.err.count("\n")) == (2, 1)
        assert f"{address}: a checkpoint of `bncli train` is read from this machine; download" in own.err


ONLY_TRAIN = """
from torch.utils.data import Dataset, IterableDataset
import torch


class Images(Dataset):
    def __init__(self, split):
        assert split == "train", "another split was made"

    def __len__(self):
        return 30

    def __getitem__(self, index):
        return torch.full((3, 8, 8), 8 * index, dtype=torch.uint8), index % 2


class Stream(IterableDataset):
    def __init__(self, split):
        self.images = Images(split)

    def __iter__(self):
        return (self.images[index] for index in range(30))
"""


@pytest.mark.parametrize("data", ["folder", "streamed", "Images", "Stream"])
def test_no_test_image_is_read_where_nothing_is_evaluated(bncli: Bncli, folder: Path, data: str) -> None:
    save_ruined("twice")
    how = ("--model", "nets.py:twice", "--no-evaluate", "--normalization", "half", *COMPUTED)
    if data in ("Images", "Stream"):
        (folder / "own.py").write_text(ONLY_TRAIN)
        words = ("--set", f"data.name=own.py:{data}", *how)
    else:
        for number in range(4):
            path = Path(f"photos/train/class{number % 2}/{number}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (60 * number, 9, 200)).save(path)
        stream = ("--set", f"data.stream={str(data == 'streamed').lower()}")
        cache = ("--set", f"data.cache={folder / 'cache'}", "--set", "data.image_size=8")
        words = ("--data-root", "photos", *cache, *stream, *how)
        # no test split is looked for, and one that is there is not opened
        assert bncli("recalibrate", "a.pt", "-o", "first.pt", *words).code == 0
        without = [word for word in words if word != "--no-evaluate"]
        (line,) = bncli("recalibrate", "a.pt", "-o", "x.pt", *without).err.splitlines()[-1:]
        assert "photos/test: no such folder" in line
        assert line.endswith("; --no-evaluate recalibrates without any")
        Path("photos/test/another").mkdir(parents=True)
        Path("photos/test/another/broken.png").write_bytes(b"no image")
    outcome = bncli("recalibrate", "a.pt", "-o", "new.pt", *words, "--verify")
    assert outcome.code == 0, outcome.err
    assert "test" not in outcome.err
    evaluating = [word for word in words if word != "--no-evaluate"]
    assert bncli("recalibrate", "a.pt", "-o", "other.pt", *evaluating).code == 2  # which needs them
    assert not Path("other.pt").exists()


DATA_SETS = """
import torch
from torch.utils.data import Dataset


class Spectra(Dataset):
    def __init__(self, split):
        self.first = 100 * (split == "test")

    def __len__(self):
        return 30

    def __getitem__(self, index):
        return torch.rand(7, 50, generator=torch.Generator().manual_seed(self.first + index))


def lines(classes=False):
    layers = [torch.nn.Conv1d(7, 4, 3), torch.nn.BatchNorm1d(4)]
    pool = [torch.nn.AdaptiveAvgPool1d(1), torch.nn.Flatten()]
    return torch.nn.Sequential(*layers, *(pool if classes else []))
"""


def test_inputs_need_be_neither_images_nor_labelled(bncli: Bncli, folder: Path) -> None:
    (folder / "nets.py").write_text(DATA_SETS)
    network = build_network("nets.py:lines")
    torch.save(network.state_dict(), "a.pt")
    command = ("recalibrate", "a.pt", "-o", "new.pt", "--set", "data.name=nets.py:Spectra", *COMPUTED)
    outcome = bncli(*command, "--model", "nets.py:lines", "--no-evaluate", "--verify")
    assert outcome.code == 0, outcome.err
    assert "Self-consistent: no mean or variance differs" in outcome.out
    assert outcome.out.splitlines()[-1] == "The network was not evaluated."
    generators = (torch.Generator().manual_seed(index) for index in range(30))
    with torch.no_grad():
        values = network[0](torch.stack([torch.rand(7, 50, generator=one) for one in generators])).double()
    var, mean = torch.var_mean(values, (0, 2), correction=0)
    new = torch.load("new.pt", weights_only=True)
    torch.testing.assert_close(new["1.running_mean"].double(), mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(new["1.running_var"].double(), var, rtol=1e-6, atol=0)
    Path("new.pt").unlink()
    outcome = bncli(*command, "--model", "nets.py:lines", "--model-arg", "classes=true")
    assert (outcome.code, outcome.out) == (2, "")
    assert "the images have no labels; --no-evaluate recalibrates without any" in outcome.err.splitlines()[-1]
    assert not Path("new.pt").exists()
