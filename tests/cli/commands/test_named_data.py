"""Commands on data sets by name: the user's own code, and when it is run."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bncli.checkpoints import load_checkpoint
from bncli.export.exported_file import exported_record
from tests.conftest import Bncli

NETWORK = """
from torch import nn

def net(num_classes=3, channels=3):
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, num_classes),
    )

def sequence():
    return nn.Sequential(nn.Flatten(), nn.Linear(10, 3), nn.BatchNorm1d(3))
"""
DATA = Path(__file__).parents[2] / "data" / "own_data.py"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of net(), which lies beside it as net.py."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NETWORK)
    namespace: dict[str, object] = {}
    exec(NETWORK, namespace)
    torch.save(namespace["net"]().state_dict(), tmp_path / "net.pt")
    torch.save(namespace["sequence"]().state_dict(), tmp_path / "sequence.pt")
    return tmp_path / "net.pt"


def words(name: str, *more: str) -> list[str]:
    sets = [f"data.name={DATA}:{name}", "data.workers=0", "runtime.threads=1", *more]
    return [word for one in sets for word in ("--set", one)]


def evaluated(bncli: Bncli, file: Path, *options: object) -> float:
    sizes = ("--num-images", "2", "--batch-sizes", "2", "--json")
    outcome = bncli("eval", file, "--model", "net.py:net", *sizes, *options)
    assert outcome.code == 0, outcome.err
    return outcome.json["loss"]


@pytest.mark.slow
def test_pictures_are_evaluated_as_pytorch_evaluates_them(bncli, file):
    """The oracle: the network itself, on the same pixels from 0 to 1."""
    from tests.data.own_data import Pictures

    pictures = Pictures(train=False)
    images = torch.stack([to_tensor(pictures[number][0]) for number in range(6)])
    namespace: dict[str, object] = {}
    exec(NETWORK, namespace)
    network = namespace["net"]()
    network.load_state_dict(torch.load(file))
    with torch.no_grad():
        loss = nn.functional.cross_entropy(network.eval()(images), torch.tensor([0, 1, 2] * 2)).item()
    found = evaluated(bncli, file, *words("Pictures", "data.normalization=none"))
    assert found == pytest.approx(loss, rel=1e-5)
    assert evaluated(bncli, file, *words("Pictures"), "--normalization", "none") == found
    streamed = words("Pictures", "data.normalization=none", "data.stream=true")
    assert evaluated(bncli, file, *streamed) == found
    other = evaluated(bncli, file, *words("Pictures", "data.normalization=0.1,0.2,0.3/0.5,0.5,0.5"))
    assert other != pytest.approx(found, rel=1e-3)


def to_tensor(image: object) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def test_inputs_that_are_normalised_already_are_not_normalised_again(bncli, file):
    from tests.data.own_data import Floats

    samples = [Floats("val")[number] for number in range(6)]
    images = torch.stack([sample["pixel_values"].float() for sample in samples])
    namespace: dict[str, object] = {}
    exec(NETWORK, namespace)
    network = namespace["net"]()
    network.load_state_dict(torch.load(file))
    with torch.no_grad():
        loss = nn.functional.cross_entropy(network.eval()(images), torch.tensor([0, 1, 2] * 2)).item()
    assert evaluated(bncli, file, *words("Floats")) == pytest.approx(loss, rel=1e-5)


def test_sequences_without_labels_are_recalibrated(bncli, file, tmp_path):
    from tests.data.own_data import sequences

    outcome = bncli(
        *("recalibrate", tmp_path / "sequence.pt", "-o", tmp_path / "new.pt", "--model", "net.py:sequence"),
        *("--no-evaluate", *words("sequences")),
    )
    assert outcome.code == 0, outcome.err
    state = torch.load(tmp_path / "new.pt")
    inputs = torch.stack(sequences(train=True)).double().flatten(1)
    expected = inputs @ state["1.weight"].double().T + state["1.bias"].double()
    torch.testing.assert_close(state["2.running_mean"].double(), expected.mean(0), rtol=1e-5, atol=1e-5)


def test_two_normalizations_are_one_too_many(bncli, file):
    outcome = bncli(
        *("eval", file, "--model", "net.py:net", "--normalization", "half"),
        *words("Pictures", "data.normalization=none"),
    )
    assert outcome.code == 2
    assert "--normalization: it says half, but data.normalization says none" in outcome.err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raising", "making the data set failed: RuntimeError: no luck"),
        ("nothing", "its training split has no samples"),
        ("sequences", "cannot compute"),
        ("far_label", "label 7 found"),
    ],
)
def test_bad_data_is_one_line_and_nothing_is_written(bncli, file, tmp_path, name, message):
    outcome = bncli("recalibrate", file, "-o", tmp_path / "new.pt", "--model", "net.py:net", *words(name))
    assert outcome.code == 2
    assert message in outcome.err.splitlines()[-1]
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "new.pt").exists()


@pytest.mark.parametrize("command", ["eval", "recalibrate"])
@pytest.mark.parametrize("stream", ["true", "false"])
def test_labels_that_cannot_be_evaluated_are_told_with_the_data_set(bncli, file, tmp_path, command, stream):
    new = ("-o", tmp_path / "new.pt") if command == "recalibrate" else ()
    common = (command, file, *new, "--model", "net.py:net")
    outcome = bncli(*common, *words("Unlabelled", f"data.stream={stream}"))
    fix = "--no-evaluate recalibrates without any" if new else "bncli predict needs none"
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1].endswith(f"data {DATA}:Unlabelled: the images have no labels; {fix}")
    outcome = bncli(*common, *words("TooFar", f"data.stream={stream}"))
    assert outcome.code == 2
    expected = (
        "label 7 found, but its classes are 0 to 2" if stream == "true" else "has 8; give images of its"
    )
    assert f"{DATA}:TooFar" in outcome.err.splitlines()[-1]
    assert expected in outcome.err.splitlines()[-1]
    assert not (tmp_path / "new.pt").exists()


CONFIG = """
data: {{name: "{name}", workers: 0}}
augment: {{crop_padding: 1}}
model: {{widths: [4], blocks_per_stage: 1}}
train: {{epochs: 1, batch_size: 4}}
runtime: {{device: cpu, precision: float32, threads: 1}}
"""


def test_a_checkpoint_never_runs_the_data_set_that_it_records(bncli, file, tmp_path):
    """Training runs it, as the user's own file says so; later it has to be repeated."""
    code = tmp_path / "mine.py"
    code.write_text(DATA.read_text())
    (tmp_path / "c.yaml").write_text(CONFIG.format(name="mine.py:Pictures"))
    assert bncli("train", tmp_path / "c.yaml", "--run-dir", tmp_path / "run").code == 0
    last = tmp_path / "run" / "last.pt"
    assert load_checkpoint(last).class_names == ("0", "1", "2")
    code.write_text("raise SystemExit('this code was run')")
    for command in (
        ("eval", last),
        ("recalibrate", last, "-o", "x.pt"),
        ("train", "--resume", tmp_path / "run"),
    ):
        outcome = bncli(*command)
        assert outcome.code == 2
        assert "which is code; it is run where --set data.name=NAME repeats it" in outcome.err
        assert "this code was run" not in outcome.err
    code.write_text(DATA.read_text())
    options = ("--num-images", "2", "--batch-sizes", "2")
    assert bncli("eval", last, *options, "--set", f"data.name={code}:Pictures").code == 0


SIZED = """
from torch.utils.data import TensorDataset
import torch

def sized(number=30, side=16):
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (number, 3, side, side), dtype=torch.uint8, generator=random)
    return TensorDataset(images, torch.arange(number) % 3)
"""


def test_arguments_that_are_not_followed_are_told(bncli, file, tmp_path):
    """They may name places; without a word they would be the defaults."""
    (tmp_path / "sized.py").write_text(SIZED)
    (tmp_path / "c.yaml").write_text(CONFIG.format(name="sized.py:sized"))
    run, last, exported = tmp_path / "run", tmp_path / "run" / "last.pt", tmp_path / "a.safetensors"
    told = "data.arguments={'number': 12}: not used"
    assert (
        bncli("train", tmp_path / "c.yaml", "--run-dir", run, "--set", "data.arguments.number=12").code == 0
    )
    repeated = ("--num-images", 2, "--batch-sizes", 2, "--set", f"data.name={tmp_path / 'sized.py'}:sized")
    outcome = bncli("eval", last, *repeated, "--json")
    assert (outcome.code, outcome.json["num_images"]) == (0, 30)
    assert f"{last} names {told}" in " ".join(outcome.err.split())
    outcome = bncli("eval", last, *repeated, "--set", "data.arguments.number=12", "--json")
    assert outcome.json["num_images"] == 12
    assert "not used" not in outcome.err
    outcome = bncli("eval", last, *repeated, "--set", "data.arguments.side=8")
    assert outcome.code == 2
    assert "its images are 8x8 pixels" in outcome.err
    assert bncli("export", last, "-o", exported, "--num-images", 2).code == 0
    data = exported_record(exported).config["data"]
    assert (data["name"], data["arguments"]) == ("sized.py:sized", {"number": 12})  # without its folder


def test_a_streamed_data_set_of_ones_own_trains_as_one_in_memory(bncli, file, tmp_path):
    found = []
    for stream in ("true", "false"):
        (tmp_path / "c.yaml").write_text(CONFIG.format(name=f"{DATA}:Pictures"))
        run = tmp_path / stream
        outcome = bncli("train", tmp_path / "c.yaml", "--run-dir", run, "--set", f"data.stream={stream}")
        assert outcome.code == 0, outcome.err
        found.append(load_checkpoint(run / "last.pt"))
    for key, tensor in found[0].state_dict.items():
        assert torch.equal(tensor, found[1].state_dict[key]), key


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Two of three classes, of one colour each."""
    from PIL import Image

    for split in ("train", "test"):
        for name, colour in (("cat", (200, 0, 0)), ("dog", (0, 0, 200))):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(30):
                Image.new("RGB", (8, 8), colour).save(folder / f"{number}.png")
    return tmp_path / "images"


COLOURS = """
import torch
from torch import nn

def net():
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3), nn.Linear(3, 3))
    return network
"""


@pytest.fixture
def colours(file: Path) -> Path:
    """A checkpoint of a network that is right: dog is output 0, eel 1 and cat 2."""
    (file.parent / "colours.py").write_text(COLOURS)
    weight = torch.tensor([[0.0, 0, 9], [0, 9, 0], [9, 0, 0]])
    state = nn.Sequential(nn.Identity(), nn.Identity(), nn.BatchNorm1d(3), nn.Linear(3, 3)).state_dict()
    torch.save(state | {"3.weight": weight, "3.bias": torch.zeros(3)}, file.parent / "colours.pt")
    (file.parent / "right.txt").write_text("dog\neel\ncat")
    (file.parent / "wrong.txt").write_text("cat\neel\ndog")
    return file.parent / "colours.pt"


IN_COLOURS = ("--model", "colours.py:net", "--normalization", "none", "--set", "data.image_size=8")
SIZES = ("--num-images", "2", "--batch-sizes", "2")


@pytest.mark.parametrize("stream", ["true", "false"])
def test_the_order_of_the_networks_classes_decides(bncli, colours, folders, stream):
    options = (*IN_COLOURS, *SIZES, "--set", f"data.stream={stream}", "--data-root", folders)
    options = (*options, "--set", f"data.cache={colours.parent / 'cache'}")
    found = bncli("eval", colours, *options, "--set", "data.classes=right.txt")
    assert found.code == 0, found.err
    assert "accuracy 100.00% of 60 test images" in found.out
    assert "data.classes" not in found.out
    found = bncli("eval", colours, *options, "--set", "data.classes=wrong.txt")
    said = " ".join(found.out.split())
    assert "accuracy 0.00% of 60 test images" in said
    assert "That is chance (50.00%), yet the network is sure of its answers" in said
    assert said.index("(data.classes)") < said.index("(--normalization)") < said.index("bncli inspect-stats")
    found = bncli("eval", colours, *options)
    assert found.code == 2
    assert "the network has 3 classes, but imagefolder has 2; data.classes names a file" in found.err


def test_predict_reads_no_image_of_the_data_set_for_its_names(bncli, colours, folders, tmp_path):
    image = folders / "test" / "cat" / "0.png"
    names = ("--set", "data.classes=right.txt")
    found = bncli("predict", colours, image, *IN_COLOURS, *names, "--json")  # no data set at all
    assert found.json["predictions"][0]["class"] == "cat"
    for path in folders.rglob("*.png"):
        if path != image:
            path.write_bytes(b"no image")
    (folders / "train" / "eel").mkdir()
    found = bncli("predict", colours, image, *IN_COLOURS, "--data-root", folders, "--json")
    assert found.code == 0, found.err
    assert found.json["predictions"][0]["class"] == "eel"  # the third of the sorted folders
    assert not (tmp_path / "cache").exists()


def test_a_checkpoint_may_be_an_address(bncli, colours, folders):
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    content = colours.read_bytes()

    class Ranges(BaseHTTPRequestHandler):
        """A server that can send a part of its only file."""

        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            first, last = (wanted or f"bytes=0-{len(content) - 1}").removeprefix("bytes=").split("-")
            part = content[int(first) : int(last or len(content)) + 1]
            self.send_response(206 if wanted else 200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(part)))
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(part)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Ranges) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/colours.pt"
        image = folders / "test" / "dog" / "0.png"
        found = bncli("predict", address, image, *IN_COLOURS, "--set", "data.classes=right.txt", "--json")
        server.shutdown()
    assert found.code == 0, found.err
    assert found.json["predictions"][0]["class"] == "dog"
