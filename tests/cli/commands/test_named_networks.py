"""`--model` on eval, recalibrate and predict: anybody's network and anybody's checkpoint.

Numbers are compared with a plain loop of PyTorch over the same images.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from bncli.checkpoints import load_weights
from bncli.config import SyntheticConfig
from bncli.data import Dataset, load_dataset
from bncli.models import build_network
from tests.conftest import Bncli

NET = """
import torch
from torch import nn


def make(num_classes=10, width=4):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes),
    )


class Answers(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = make()

    def forward(self, images):
        return {"scores": self.net(images)}


def twice():
    norm = nn.BatchNorm2d(3)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10)
    return nn.Sequential(norm, nn.Conv2d(3, 3, 3), norm, *head)


class Wide(nn.Linear):
    def __init__(self):
        super().__init__(12, 10)


def groups():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))
"""
DATA = ("--set", "data.name=synthetic", "--set", "data.num_train=60", "--set", "data.num_test=40")
COMPUTED = ("--set", "runtime.precision=float32", "--device", "cpu")
MEAN_STD = (0.5, 0.25)
NORMALIZED = ("--normalization", "0.5,0.5,0.5/0.25,0.25,0.25")
FEW = ("--num-images", 8, "--batch-sizes", "2,4")


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """The user's network after some steps, in whose folder the commands run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    model = build_network("net.py:make")
    with torch.no_grad():
        for tensor in (value for value in model.state_dict().values() if value.is_floating_point()):
            tensor.uniform_(0.5, 1.5) if tensor.ndim == 1 else tensor.normal_(std=0.3)
        model[1].num_batches_tracked.fill_(3)
    return model.eval()


@pytest.fixture
def dataset() -> Dataset:
    return load_dataset(SyntheticConfig(num_train=60, num_test=40))


def normalized(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return (images.to(dtype) / 255 - MEAN_STD[0]) / MEAN_STD[1]


def accuracy_of(model: nn.Module, dataset: Dataset) -> float:
    with torch.no_grad():
        return float(
            (model(normalized(dataset.test.images)).argmax(1) == dataset.test.labels).double().mean()
        )


def test_eval_computes_what_a_plain_loop_does(bncli: Bncli, network: nn.Module, dataset: Dataset) -> None:
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in network.state_dict().items()}}, "a.pt"
    )
    model = ("--model", "net.py:make", "--model-arg", "width=4")
    outcome = bncli("eval", "a.pt", *model, *DATA, *COMPUTED, *NORMALIZED, *FEW, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["accuracy"] == accuracy_of(network, dataset)
    with torch.no_grad():
        loss = nn.functional.cross_entropy(network(normalized(dataset.test.images)), dataset.test.labels)
    assert outcome.json["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert outcome.json["epoch"] is None
    assert outcome.json["model"] == {
        "name": "net.py:make",
        "arguments": {"width": 4},
        "normalization": NORMALIZED[1],
        "weights": {
            "kind": "torch zip",
            "key": "state_dict",
            "num_loaded": 14,
            "num_tensors": 14,
            "kept": [],
            "left_over": [],
        },
    }
    assert "bncli: a.pt: loaded 14 of 14 tensors into net.py:make\n" in outcome.err
    shown = bncli("eval", "a.pt", *model, *DATA, *COMPUTED, *NORMALIZED, *FEW, "--gap", "--details")
    assert shown.code == 0, shown.err
    assert "In eval mode a prediction does not depend on its batch" in " ".join(shown.out.split())
    assert "after epoch" not in shown.out
    assert max(map(len, shown.out.splitlines())) <= 80


def oracle(network: nn.Module, dataset: Dataset) -> dict[str, Tensor]:
    """Population statistics layer by layer in float64: each layer after those before it have theirs."""
    model = build_network("net.py:make").double()
    model.load_state_dict(network.state_dict())
    x = normalized(dataset.train.images, torch.float64)
    found = {}
    with torch.no_grad():
        for index, layer in enumerate(model.eval()):
            if isinstance(layer, nn.BatchNorm2d):
                var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
                layer.running_mean.copy_(mean)
                layer.running_var.copy_(var)
                found |= {f"{index}.running_mean": mean, f"{index}.running_var": var}
            x = layer(x)
    return found


def save_zip(state: dict[str, Tensor], path: Path) -> None:
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}, "lr": 0.1}, path)


def load_zip(path: Path) -> dict[str, Tensor]:
    content = torch.load(path, weights_only=True)
    assert set(content) == {"state_dict", "lr"}
    return {key.removeprefix("module."): value for key, value in content["state_dict"].items()}


@pytest.mark.parametrize(
    ("save", "load"),
    [(save_zip, load_zip), (safetensors.torch.save_file, safetensors.torch.load_file)],
    ids=["zip", "safetensors"],
)
def test_recalibrate_gives_back_the_same_kind_of_file(
    bncli: Bncli,
    network: nn.Module,
    dataset: Dataset,
    save: Callable[[dict[str, Tensor], Path], None],
    load: Callable[[Path], dict[str, Tensor]],
) -> None:
    old, new = Path("old"), Path("new")
    save(network.state_dict(), old)
    before = old.read_bytes()
    command = ("recalibrate", "old", "--model", "net.py:make", *DATA, *COMPUTED, *NORMALIZED)
    outcome = bncli(*command, "-o", "new", "--verify", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["verification"]["self_consistent"]
    assert old.read_bytes() == before
    found, expected = load(new), oracle(network, dataset)
    assert list(found) == list(load(old))
    for name, value in load(old).items():
        if name in expected:
            assert (found[name] - expected[name]).abs().max() <= 1e-6 * expected[name].abs().max()
            assert not torch.equal(found[name], value)
        else:
            assert torch.equal(found[name], value)
    again = build_network("net.py:make").eval()
    load_weights(again, new)
    assert outcome.json["after"]["accuracy"] == accuracy_of(again, dataset)
    assert outcome.json["before"]["accuracy"] == accuracy_of(network, dataset)
    assert bncli(*command[:1], "new", *command[2:], "--verify").code == 0
    shown = bncli(*command, "--verify")
    assert shown.code == 1
    assert "Not self-consistent" in shown.out
    shown = bncli(*command, "-o", "newer", "--method", "precise", "--layers", "1")
    assert shown.code == 0, shown.err
    assert "old, unchanged" in shown.out
    assert torch.equal(load(Path("newer"))["4.running_mean"], network[4].running_mean)


def test_predict_names_the_classes_of_the_data(bncli: Bncli, network: nn.Module, dataset: Dataset) -> None:
    torch.save(network.state_dict(), "a.pt")
    pixels = dataset.test.images[3]
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save("image.png")
    outcome = bncli(
        "predict", "a.pt", "image.png", "--model", "net.py:make", *DATA, *COMPUTED, *NORMALIZED, "--json"
    )
    assert outcome.code == 0, outcome.err
    (answer,) = outcome.json["predictions"]
    with torch.no_grad():
        probabilities = network(normalized(pixels[None])).softmax(1)[0]
    assert answer["class"] == dataset.class_names[int(probabilities.argmax())]
    assert answer["probability"] == pytest.approx(float(probabilities.max()), rel=1e-5)


def test_predict_needs_the_names_of_classes_and_no_test_images(
    bncli: Bncli, network: nn.Module, tmp_path: Path
) -> None:
    torch.save(network.state_dict(), "a.pt")
    Image.new("RGB", (32, 32), (20, 0, 25)).save("image.png")
    command = ("predict", "a.pt", "image.png", "--model", "net.py:make", *COMPUTED, *NORMALIZED)
    outcome = bncli(*command)
    assert (outcome.code, outcome.out) == (2, "")
    asked = "bncli predict --model: which classes? The checkpoint does not say; give --set data.classes=FILE"
    assert asked in outcome.err.splitlines()[-1]
    names = [f"class {number}" for number in range(10)]
    (tmp_path / "names.txt").write_text("\n".join(names))
    for name in names:
        (tmp_path / "images" / "train" / name).mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "images" / "train" / names[0] / "a.png")
    size = ("--set", "data.image_size=32")
    by_list = bncli(*command, *size, "--set", f"data.classes={tmp_path / 'names.txt'}")
    by_folders = bncli(*command, *size, "--data-root", str(tmp_path / "images"))
    assert (by_list.code, by_folders.code) == (0, 0), by_folders.err
    assert by_list.out == by_folders.out != ""


def test_pixels_are_normalised_as_asked_for(bncli: Bncli, network: nn.Module, dataset: Dataset) -> None:
    torch.save(network.state_dict(), "a.pt")
    command = ("eval", "a.pt", "--model", "net.py:make", *DATA, *COMPUTED, *FEW, "--json")
    images = dataset.train.images.double() / 255
    known = {
        "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        "half": ((0.5,) * 3, (0.5,) * 3),
        "none": ((0.0,) * 3, (1.0,) * 3),
        "measured": (images.mean((0, 2, 3)).tolist(), images.std((0, 2, 3), correction=0).tolist()),
    }
    for name, (mean, std) in known.items():
        outcome = bncli(*command, "--normalization", name)
        assert outcome.code == 0, outcome.err
        pixels = dataset.test.images.float() / 255
        x = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        with torch.no_grad():
            loss = nn.functional.cross_entropy(network(x.float()), dataset.test.labels)
        assert outcome.json["loss"] == pytest.approx(float(loss), rel=1e-4)
        assert ("pixels are normalised as measured" in outcome.err) == (name == "measured")
    for wrong in ("imagnet", "0.5/0.5", "1,2,3/4,5,6", "0,0,0/0,1,1", "nan,0,0/1,1,1"):
        outcome = bncli(*command, "--normalization", wrong)
        assert (outcome.code, outcome.out) == (2, "")
        assert "--normalization: expected imagenet, half, none, measured, or means" in outcome.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "net.py:mak"), "model net.py:mak: net.py has no mak; the nearest: make"),
        (
            ("--model", "torchvision:resnt18"),
            "model torchvision:resnt18: torchvision has no such network; the nearest",
        ),
        (
            ("--model", "net.py:make", "--model-arg", "width=8"),
            "different: 0.weight is float32 (4, 3, 3, 3) in the file",
        ),
        (
            ("--model", "net.py:make", "--model-arg", "width"),
            "--model-arg: expected KEY=VALUE such as num_classes=10",
        ),
        (("--model", "net.py:make", "--model-arg", "width=[1"), "--model-arg: width: no valid YAML"),
        (
            ("--model", "net.py:make", "--key", "ema"),
            "a.pt: no tensors under the key 'ema'; there are the top",
        ),
        (
            ("--model", "net.py:make", "--partial", "9.*"),
            "a.pt: no tensor of the file or the network matches '9.*'",
        ),
        (
            ("--model", "net.py:Answers"),
            "model net.py:Answers: expected logits of shape (N, classes), found a dict with scores; --logits",
        ),
        (
            ("--model", "net.py:make", "--model-arg", "num_classes=7"),
            "8 has 10 classes in the file and 7 in the network",
        ),
        (
            ("--model", "net.py:make", "--model-arg", "num_classes=7", "--partial", "!8.*"),
            "a.pt: the network has 7 classes, but synthetic has 10",
        ),
        (("--key", "ema"), "--key: goes with --model NAME of another network"),
        (("--partial", "1.*"), "--partial: goes with --model NAME of another network"),
        (
            ("--model", "convnet", "--model-arg", "widths=[4]"),
            "--model-arg: goes with --model NAME of another",
        ),
        (
            (),
            "a.pt: a torch file, but no bncli checkpoint (made by `bncli train`); name its network with",
        ),
    ],
)
@pytest.mark.parametrize("command", ["eval", "recalibrate", "predict"])
def test_what_cannot_be_done_is_told_on_one_line(
    bncli: Bncli, network: nn.Module, command: str, words: tuple[str, ...], message: str
) -> None:
    torch.save(network.state_dict(), "a.pt")
    more = {"eval": FEW, "recalibrate": ("-o", "new.pt"), "predict": ("image.png",)}[command]
    data = DATA if "--model" in words and words[1] != "convnet" else ()
    outcome = bncli(command, "a.pt", *more, *words, *data, *COMPUTED)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err.splitlines()[-1]
    assert not Path("new.pt").exists()


def test_a_network_that_cannot_compute_the_images_says_why(bncli: Bncli, network: nn.Module) -> None:
    state = {"weight": torch.zeros(10, 12), "bias": torch.zeros(10)}
    torch.save({**state, "norm.running_mean": torch.zeros(2), "norm.running_var": torch.ones(2)}, "a.pt")
    command = ("eval", "a.pt", "--model", "net.py:Wide", "--partial", "!norm.*", *DATA, *COMPUTED)
    outcome = bncli(*command)
    assert outcome.code == 2
    expected = (
        "model net.py:Wide: cannot compute images of 3x32x32 values: RuntimeError: mat1 and mat2 shapes"
    )
    assert expected in outcome.err.splitlines()[-1]
    torch.save(build_network("net.py:groups").state_dict(), "b.pt")
    outcome = bncli("recalibrate", "b.pt", "-o", "new.pt", "--model", "net.py:groups", *DATA)
    assert outcome.code == 2
    assert "no BatchNorm layer with running statistics in it, but 4 tensors" in outcome.err


def test_which_images_are_meant_is_told_by_their_folder_or_asked_for(
    bncli: Bncli, network: nn.Module, tmp_path: Path
) -> None:
    torch.save(network.state_dict(), "a.pt")
    outcome = bncli("eval", "a.pt", "--model", "net.py:make")
    assert outcome.code == 2
    assert (
        "bncli eval --model: which images? The checkpoint does not say; give --set data.root=" in outcome.err
    )
    for split in ("train", "test"):
        for number in range(10):
            folder = tmp_path / "images" / split / f"class {number}"
            folder.mkdir(parents=True)
            for shade in (20, 25 * number):
                Image.new("RGB", (32, 32), (shade, 0, 25 * number)).save(folder / f"{shade} {number}.png")
    cache = ("--set", f"data.cache={tmp_path / 'cache'}")
    command = ("--model", "net.py:make", "--data-root", "images", *cache, *COMPUTED, "--json")
    outcome = bncli("eval", "a.pt", *command, *FEW)
    assert outcome.code == 2
    assert "data.image_size: images of which size does the network take?" in outcome.err
    command = (*command, "--set", "data.image_size=32")
    outcome = bncli("eval", "a.pt", *command, *FEW)
    assert outcome.code == 0, outcome.err
    assert "images: resized to 32x32, --normalization measured" in outcome.err
    assert list(outcome.json["per_class_accuracy"]) == [f"class {number}" for number in range(10)]
    outcome = bncli("predict", "a.pt", "images/test/class 1/25 1.png", *command)
    assert outcome.json["predictions"][0]["class"].startswith("class ")
    outcome = bncli("predict", "a.pt", "x.png", "--data-root", "images")
    assert outcome.code == 2
    assert "--data-root: the checkpoint tells the classes; it goes with --model" in outcome.err


def test_a_network_that_a_checkpoint_names_is_shown_and_not_followed(
    bncli: Bncli, network: nn.Module, tmp_path: Path
) -> None:
    (tmp_path / "brought.py").write_text("raise AssertionError('a checkpoint was obeyed')\n")
    torch.save({"arch": "brought.py:make", "state_dict": network.state_dict()}, "a.pt")
    outcome = bncli("eval", "a.pt", *FEW)
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert "it calls its network 'brought.py:make'; name its network with --model" in line
    assert bncli("eval", "a.pt", "--model", "net.py:make", *DATA, *COMPUTED, *FEW).code == 0
    outcome = bncli("eval", "a.pt", "--model", "brought.py:make", *DATA, *COMPUTED, *FEW)
    assert outcome.code == 2  # the user repeats the name, and only then is it run
    assert "importing it failed: AssertionError: a checkpoint was obeyed" in outcome.err


def test_a_part_that_is_not_in_the_file_is_measured_and_not_written(bncli: Bncli, network: nn.Module) -> None:
    state = {name: value for name, value in network.state_dict().items() if not name.startswith("4.")}
    torch.save(state, "a.pt")
    command = ("recalibrate", "a.pt", "-o", "new.pt", "--model", "net.py:make", *DATA, *COMPUTED)
    outcome = bncli(*command, "--partial", "!4.*")
    assert outcome.code == 0, outcome.err
    assert "not written, as they are not in a.pt: 4.running_mean, 4.running_var" in outcome.err
    new = torch.load("new.pt", weights_only=True)
    assert list(new) == list(state)
    assert not torch.equal(new["1.running_mean"], state["1.running_mean"])


def test_both_names_of_a_layer_that_is_used_twice_are_written(bncli: Bncli, network: nn.Module) -> None:
    state = {name: value.clone() for name, value in build_network("net.py:twice").state_dict().items()}
    torch.save(state, "a.pt")
    outcome = bncli(
        *("recalibrate", "a.pt", "-o", "new.pt", "--method", "precise"),
        *("--model", "net.py:twice", *DATA, *COMPUTED),
    )
    assert outcome.code == 0, outcome.err
    new = torch.load("new.pt", weights_only=True)
    for leaf in ("running_mean", "running_var"):
        assert torch.equal(new[f"0.{leaf}"], new[f"2.{leaf}"])
        assert not torch.equal(new[f"0.{leaf}"], state[f"0.{leaf}"])


def test_a_network_of_timm_is_evaluated(bncli: Bncli, network: nn.Module) -> None:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    model = ("--model", "timm:resnet10t", "--model-arg", "num_classes=10")
    torch.save(build_network("timm:resnet10t", {"num_classes": 10}).state_dict(), "a.pt")
    outcome = bncli("eval", "a.pt", *model, *DATA, *COMPUTED, *FEW, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["model"]["weights"]["num_loaded"] == outcome.json["model"]["weights"]["num_tensors"]
