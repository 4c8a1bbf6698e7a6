"""`bncli export`: files that compute what the checkpoint does, and refusals of what would be wrong."""

import contextlib
import importlib.util
import io
import json
import resource
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import bncli
from bncli.checkpoints import file_sha256, load_checkpoint, load_model
from bncli.cli.app import main
from bncli.cli.export_source import _without_folders
from bncli.data import load_dataset
from bncli.export import export_network
from bncli.export.exported_file import exported_record
from tests.conftest import Bncli
from tests.export.awkward_networks import Awkward
from tests.export.exported_networks import AWKWARD, HERE, TORCHVISION, export, make_network, round_trip
from tests.limits import limited

NEEDS = {
    ".onnx": ("onnx", "onnxscript", "onnxruntime"),
    ".xml": ("openvino",),
    ".pt2": (),
    ".safetensors": (),
}
EXAMPLE = ("--num-images", 20)


def skip_without_engine(suffix: str) -> None:
    missing = [name for name in NEEDS.get(suffix, ()) if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed here")


@pytest.fixture(scope="module")
def exported(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One file of torch.export, and what was said of it."""
    output = tmp_path_factory.mktemp("exported") / "net.pt2"
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["export", str(finished_run / "last.pt"), "-o", str(output), "--json"]) == 0
    return {"path": output, **json.loads(out.getvalue())}


def test_the_document_tells_the_proof_the_layers_and_where_it_is_from(
    exported: dict[str, Any], finished_run: Path
) -> None:
    checkpoint = finished_run / "last.pt"
    assert exported["source"] == {"file": "last.pt", "sha256": file_sha256(checkpoint), "epoch": 2}
    assert exported["num_bytes"] == exported["path"].stat().st_size
    assert exported["proof"]["holds"]
    assert exported["proof"]["predictions_changed"] == 0
    assert exported["proof"]["images"] == "120 test images of synthetic"
    assert [layer["name"] for layer in exported["layers"]] == ["stages.0.0.norm", "stages.1.0.norm"]
    assert exported["kept"] == []
    with zipfile.ZipFile(exported["path"]) as archive:
        for name in archive.namelist():  # no path of this machine
            assert str(Path(bncli.__file__).parent).encode() not in archive.read(name)
    assert exported["class_names"] == list(load_checkpoint(checkpoint).class_names)


def test_eval_of_the_file_finds_what_eval_of_the_checkpoint_does(
    bncli: Bncli, exported: dict[str, Any], finished_run: Path
) -> None:
    few = ("--num-images", 16, "--batch-sizes", "2,16", "--json")
    theirs = bncli("eval", exported["path"], *few, "--tta", "flip").json
    ours = bncli("eval", finished_run / "last.pt", *few, "--tta", "flip").json
    for key in ("accuracy", "per_class_accuracy", "dataset", "num_images", "epoch"):
        assert theirs[key] == ours[key]
    assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5)
    assert theirs["tta"]["accuracy"] == ours["tta"]["accuracy"]
    assert theirs["determinism"]["train_mode"] is None
    assert theirs["runtime"]["engine"].startswith("torch.export ")
    shown = bncli("eval", exported["path"], *few[:-1])
    assert shown.code == 0
    assert "in eval mode alone: 2 of 2 BatchNorm layers" in " ".join(shown.out.split())
    assert "train mode  " not in shown.out
    fixed = bncli("eval", exported["path"], "--batch-invariant", *few).json
    assert fixed["determinism"]["claims"]["batch_size"]["bitwise_equal"]


def test_predict_of_the_file_answers_as_the_network_does(
    bncli: Bncli, exported: dict[str, Any], finished_run: Path, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = bncli("predict", exported["path"], tmp_path / "a.png", "--top", 3, "--json").json
    answer = found["predictions"][0]
    with torch.no_grad():
        logits = load_model(finished_run / "last.pt")(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    probabilities, labels = logits[0].double().softmax(0).sort(descending=True)
    names = load_checkpoint(finished_run / "last.pt").class_names
    assert [one["class"] for one in answer["top"]] == [names[label] for label in labels[:3]]
    assert [one["probability"] for one in answer["top"]] == pytest.approx(
        probabilities[:3].tolist(), rel=1e-4
    )


def test_inspect_stats_says_where_batch_norm_went(
    bncli: Bncli, exported: dict[str, Any], finished_run: Path
) -> None:
    outcome = bncli("inspect-stats", exported["path"])
    assert outcome.code == 2
    assert "folded all 2 BatchNorm layers away (stages.0.0.norm into stages.0.0.conv" in outcome.err
    assert f"last.pt (SHA-256 {file_sha256(finished_run / 'last.pt')[:12]}" in outcome.err


def test_the_tensors_in_safetensors_are_the_folded_ones(
    bncli: Bncli, finished_run: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    assert bncli("export", finished_run / "last.pt", "-o", tmp_path / "a.safetensors", "--fold").code == 0
    state = load_file(tmp_path / "a.safetensors")
    own = load_model(finished_run / "last.pt").double().state_dict()
    scale = own["stages.0.0.norm.weight"] / (own["stages.0.0.norm.running_var"] + 1e-5).sqrt()
    weight = own["stages.0.0.conv.weight"] * scale[:, None, None, None]
    bias = own["stages.0.0.norm.bias"] - own["stages.0.0.norm.running_mean"] * scale
    torch.testing.assert_close(state["stages.0.0.conv.weight"], weight.float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(state["stages.0.0.conv.bias"], bias.float(), rtol=1e-6, atol=1e-7)
    assert not any("norm" in name for name in state)
    by_default = bncli("export", finished_run / "last.pt", "-o", tmp_path / "b.safetensors")
    assert by_default.code == 0
    assert "Kept (--fold folds them): stages.0.0.norm, stages.1.0.norm" in " ".join(by_default.out.split())
    asked = bncli("export", finished_run / "last.pt", "-o", tmp_path / "c.safetensors", "--keep-batch-norm")
    assert "Kept, as asked for: stages.0.0.norm" in " ".join(asked.out.split())
    plain, kept = load_file(tmp_path / "b.safetensors"), load_model(finished_run / "last.pt").state_dict()
    assert plain.keys() == kept.keys()
    assert all(torch.equal(plain[name], value) for name, value in kept.items())


@pytest.mark.parametrize("name", AWKWARD)
def test_layers_that_are_hard_to_fold_are_folded_exactly_or_named(name: str, tmp_path: Path) -> None:
    row = round_trip(f"{HERE}{name}", AWKWARD[name], tmp_path, "safetensors")
    assert row.float64_error <= 1e-12
    assert row.file_error <= 1e-5
    expected = {
        "Awkward": (6, ["before_padded"]),
        "FallingActivations": (2, []),
        "SharedConvolution": (0, ["first", "second"]),
    }
    num_folded, kept = expected.get(name, (1, []))
    assert row.num_folded == num_folded
    assert [layer for layer, _ in row.kept] == kept


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pt2", ".onnx", ".xml"])
@pytest.mark.parametrize("name", AWKWARD)
def test_engines_compute_networks_that_are_hard_to_fold(name: str, suffix: str, tmp_path: Path) -> None:
    skip_without_engine(suffix)
    row = round_trip(f"{HERE}{name}", AWKWARD[name], tmp_path, suffix[1:])
    assert row.file_error <= 1e-5
    assert row.predictions_changed == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_networks_are_exported(name: str, tmp_path: Path) -> None:
    suffix = "onnx" if importlib.util.find_spec("onnxscript") is not None else "pt2"
    row = round_trip(f"torchvision:{name}", TORCHVISION[name], tmp_path, suffix)
    assert row.float64_error <= 1e-12
    assert row.file_error <= 1e-4
    assert row.num_folded + len(row.kept) >= 8  # of vgg11_bn


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        (".onnx", ()),
        (".xml", ()),
        (".onnx", ("--keep-batch-norm",)),
        (".onnx", ("--precision", "float16", "--pixels", "float32")),
        (".xml", ("--precision", "float16", "--pixels", "float32")),
    ],
)
def test_engines_evaluate_and_predict(
    bncli: Bncli, finished_run: Path, tmp_path: Path, suffix: str, options: tuple[str, ...]
) -> None:
    skip_without_engine(suffix)
    output = tmp_path / f"net{suffix}"
    made = bncli("export", finished_run / "last.pt", "-o", output, *options, "--json")
    assert made.code == 0, made.err
    assert len(made.json["layers"]) == (0 if "--keep-batch-norm" in options else 2)
    if "--keep-batch-norm" in options and suffix == ".onnx":
        layers = {layer["name"]: layer for layer in bncli("inspect-stats", output, "--json").json["layers"]}
        own = bncli("inspect-stats", finished_run / "last.pt", "--json").json["layers"]
        for layer in own:
            assert layers[layer["name"]]["running_var"] == layer["running_var"]
    found = bncli("eval", output, "--num-images", 8, "--batch-sizes", 2, "--json").json
    ours = bncli("eval", finished_run / "last.pt", "--num-images", 8, "--batch-sizes", 2, "--json").json
    assert abs(found["accuracy"] - ours["accuracy"]) <= (0.02 if "float16" in options else 0)
    if suffix == ".onnx":
        import onnx

        model = onnx.load(output)
        shape = [axis.dim_param or axis.dim_value for axis in model.graph.input[0].type.tensor_type.shape.dim]
        assert (model.graph.input[0].name, shape) == ("images", ["N", 3, 32, 32])
        assert model.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "N"
    content = output.read_bytes()
    assert str(Path(np.__file__).parent.parent).encode() not in content
    assert str(Path(__file__).parent.parent).encode() not in content  # no path of this machine
    Image.new("RGB", (32, 32), (200, 30, 30)).save(tmp_path / "a.png")
    theirs, mine = (
        bncli("predict", path, tmp_path / "a.png", "--json").json["predictions"][0]
        for path in (output, finished_run / "last.pt")
    )
    assert theirs["class"] == mine["class"]
    assert theirs["probability"] == pytest.approx(mine["probability"], rel=0.05)


def save_awkward(path: Path, **changes: torch.Tensor) -> Path:
    state = make_network(f"{HERE}Awkward", 32).state_dict()
    torch.save(state | changes, path)
    return path


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"of_linear.running_mean": torch.zeros(7), "of_linear.running_var": torch.ones(7)},
            "BN001): of_linear",
        ),
        ({"of_grouped.running_var": torch.full((12,), float("nan"))}, "non_finite (BN003): of_grouped"),
        ({"of_grouped.running_var": torch.full((12,), -1.0)}, "negative_variance (BN004): of_grouped"),
    ],
)
def test_statistics_that_are_wrong_are_refused(
    bncli: Bncli, tmp_path: Path, changes: dict[str, torch.Tensor], reason: str
) -> None:
    path = save_awkward(tmp_path / "a.pt", **changes)
    words = ("export", path, "--model", f"{HERE}Awkward", "--normalization", "half", *EXAMPLE)
    size = ("--set", "data.image_size=32")
    outcome = bncli(*words, *size, "-o", tmp_path / "b.safetensors")
    assert outcome.code == 2
    assert reason in outcome.err
    assert [one.name for one in tmp_path.iterdir()] == ["a.pt"]
    if "BN001" in reason:
        forced = bncli(*words, *size, "-o", tmp_path / "b.safetensors", "--force")
        assert forced.code == 0
        assert "exported all the same: running statistics that were never updated" in forced.err


NETWORKS = """
import torch
from torch import nn

class Stays(nn.BatchNorm2d):
    def train(self, mode=True):
        return super().train(True)

def body(norm, last=nn.Identity()):
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), last, nn.AdaptiveAvgPool2d(1), nn.Flatten())

def untracked():
    return nn.Sequential(nn.BatchNorm2d(3), body(nn.BatchNorm2d(4, track_running_stats=False)))

def in_train_mode():
    return body(Stays(4))

class Depends(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x

def depends():
    return body(nn.BatchNorm2d(4), Depends())

class Fixed(nn.Module):
    def forward(self, x):
        return x.reshape(2, 4, -1)[:, :, :4].reshape(2, 4, 2, 2) if len(x) == 2 else x

def fixed():
    return body(nn.BatchNorm2d(4), Fixed())

class Bessel(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)

class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = body(nn.BatchNorm2d(4))
        self.special = Bessel()

    def forward(self, x):
        return self.special(self.body(x))

def several():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = body(nn.BatchNorm2d(4))
        def forward(self, x):
            return self.body(x), x
    return Two()
"""


def export_of_code(bncli: Bncli, folder: Path, factory: str, suffix: str = ".pt2", *options: object) -> Any:
    """The command on a network of NETWORKS whose statistics were updated once."""
    code = folder / "nets.py"
    code.write_text(NETWORKS)
    namespace: dict[str, Any] = {}
    exec(NETWORKS, namespace)
    network: nn.Module = namespace[factory]()
    network.train()(torch.randn(8, 3, 16, 16))
    torch.save(network.state_dict(), folder / "net.pt")
    words = ("export", folder / "net.pt", "--model", f"{code}:{factory}", "--normalization", "none")
    return bncli(*words, "--set", "data.image_size=16", "-o", folder / f"out{suffix}", *EXAMPLE, *options)


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        ("untracked", "no running statistics (track_running_stats=False)"),
        ("in_train_mode", "in train mode even after eval(): 1"),
        ("depends", "what it computes depends on the numbers in an image"),
        ("fixed", "its code works for batches of one size only"),
        ("several", "an exported file has one output, the network returns a tuple of 2 outputs: 0 to 1"),
    ],
)
def test_networks_that_cannot_be_exported_are_refused_in_one_line(
    bncli: Bncli, tmp_path: Path, factory: str, reason: str
) -> None:
    outcome = export_of_code(bncli, tmp_path, factory)
    assert outcome.code == 2
    assert reason in outcome.err.splitlines()[-1]
    assert "Traceback" not in outcome.err
    assert not [one for one in tmp_path.iterdir() if "out" in one.name]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_an_operator_that_the_engine_lacks_is_named_with_its_layer(
    bncli: Bncli, tmp_path: Path, suffix: str
) -> None:
    skip_without_engine(suffix)
    outcome = export_of_code(bncli, tmp_path, "Named", suffix)
    assert outcome.code == 2
    assert "no such operator there: aten.special_bessel_j0.default (in special)" in outcome.err


@pytest.mark.parametrize(
    ("suffix", "package", "extra"), [(".onnx", "onnxscript", "onnx"), (".xml", "openvino", "openvino")]
)
def test_a_missing_engine_is_named_with_its_extra(
    bncli: Bncli,
    finished_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    suffix: str,
    package: str,
    extra: str,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *more: (
            None if name == package else find("json") if name in NEEDS[suffix] else find(name, *more)
        ),
    )
    outcome = bncli("export", finished_run / "last.pt", "-o", tmp_path / f"a{suffix}")
    assert outcome.code == 2
    assert f"{package} is not installed: pip install 'bncli[{extra}]'" in outcome.err


def test_a_file_that_computes_something_else_is_not_kept(
    bncli: Bncli, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = export_network.prepare

    def wrong(model: nn.Module, **options: Any) -> Any:
        folding = real(model, **options)
        with torch.no_grad():
            folding.model.get_submodule("head").bias[0] += 5
        return folding

    monkeypatch.setattr(export_network, "prepare", wrong)
    output = tmp_path / "a.safetensors"
    outcome = bncli("export", finished_run / "last.pt", "-o", output, *EXAMPLE)
    assert outcome.code == 1
    assert "does NOT compute what the checkpoint does" in " ".join(outcome.out.split())
    assert not list(tmp_path.iterdir())
    document = bncli("export", finished_run / "last.pt", "-o", output, *EXAMPLE, "--json").json
    assert document["files"] == []
    assert document["proof"]["max_abs_diff"] == pytest.approx(5, rel=1e-5)
    assert document["proof"]["predictions_changed"] > 0
    assert bncli("export", finished_run / "last.pt", "-o", output, *EXAMPLE, "--force").code == 1
    assert output.exists()
    output.unlink()
    allowed = bncli("export", finished_run / "last.pt", "-o", output, *EXAMPLE, "--tolerance", 1000)
    assert allowed.code == 0
    assert "computes what the checkpoint does, within the tolerance of 1000." in " ".join(allowed.out.split())
    assert "rounding" not in allowed.out


@pytest.mark.parametrize(
    "suffix",
    [".pt2", ".safetensors", *(pytest.param(one, marks=pytest.mark.slow) for one in (".onnx", ".xml"))],
)
def test_a_full_disk_is_told_in_one_line_and_leaves_nothing(
    bncli: Bncli, finished_run: Path, tmp_path: Path, suffix: str
) -> None:
    skip_without_engine(suffix)
    with limited(resource.RLIMIT_FSIZE, 4096):
        outcome = bncli("export", finished_run / "last.pt", "-o", tmp_path / f"a{suffix}", *EXAMPLE)
    assert outcome.code == 2
    assert "cannot be written: File too large" in outcome.err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_what_exists_and_what_means_nothing_is_refused(
    bncli: Bncli, exported: dict[str, Any], finished_run: Path, tmp_path: Path
) -> None:
    checkpoint, path = finished_run / "last.pt", exported["path"]
    before = path.read_bytes()
    for words, reason in (
        (("export", checkpoint, "-o", path), "exists already"),
        (("export", checkpoint, "-o", tmp_path / "a.tflite"), "expected a name that ends in .onnx"),
        (("export", path, "-o", tmp_path / "a.pt2"), "is an exported file already"),
        (
            ("export", checkpoint, "-o", tmp_path / "a.pt2", "--tolerance", "nan"),
            "a finite number of 0 or more",
        ),
        (
            ("export", checkpoint, "-o", tmp_path / "a.pt2", "--tolerance", "inf"),
            "a finite number of 0 or more",
        ),
        (
            ("export", checkpoint, "-o", tmp_path / "a.onnx", "--precision", "bfloat16"),
            "no convolution in bfloat16",
        ),
        (
            ("export", checkpoint, "-o", tmp_path / "a.xml", "--keep-batch-norm"),
            "OpenVINO folds BatchNorm itself",
        ),
        (("eval", path, "--gap"), "it has no train mode"),
        (("eval", path, "--model", "x:y"), "it records that itself"),
        (("eval", path, "--set", "runtime.precision=bfloat16"), "these keys do"),
        (("predict", path, "x.png", "--data-root", "x"), "it records that itself"),
        (("predict", path, "x.png", "--set", "runtime.device=cpu"), "these keys do: runtime.threads"),
    ):
        outcome = bncli(*words)
        assert outcome.code == 2, words
        assert reason in outcome.err, words
    assert path.read_bytes() == before


def test_commands_that_need_the_checkpoint_ask_for_it(
    bncli: Bncli, exported: dict[str, Any], finished_run: Path, tmp_path: Path
) -> None:
    tensors = tmp_path / "net.safetensors"
    assert bncli("export", finished_run / "last.pt", "-o", tensors, *EXAMPLE).code == 0
    for arguments, said in (
        (("eval", tensors), "tensors that `bncli export` wrote, without their network; give last.pt, or"),
        (
            ("recalibrate", exported["path"], "-o", tmp_path / "new.pt"),
            "(.pt2); bncli does not read it: give the",
        ),
    ):
        outcome = bncli(*arguments)
        assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
        assert said in outcome.err, outcome.err


def test_named_networks_need_to_know_their_images(bncli: Bncli, tmp_path: Path) -> None:
    path = save_awkward(tmp_path / "a.pt")
    words = ("export", path, "--model", f"{HERE}Awkward", "-o", tmp_path / "b.safetensors")
    both = bncli(*words)
    assert both.code == 2
    assert "images of which size" in both.err.splitlines()[-1]
    assert "how are pixels normalised?" in both.err.splitlines()[-1]
    assert "normalised" not in bncli(*words, "--normalization", "half").err
    outcome = bncli(*words, "--set", "data.image_size=32")
    assert outcome.code == 2
    assert "how are pixels normalised?" in outcome.err


def test_a_named_network_takes_raw_pixels_in_the_file(tmp_path: Path) -> None:
    save_awkward(tmp_path / "a.pt")
    made = export(tmp_path / "a.pt", f"{HERE}Awkward", 32, tmp_path / "b.pt2")
    assert made["normalization"] == {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    network = Awkward().eval()
    network.load_state_dict(torch.load(tmp_path / "a.pt"))
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        expected = network((images / 255 - 0.5) / 0.5)
        found = torch.export.load(tmp_path / "b.pt2").module()(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("suffix", [".pt2", ".safetensors"])
def test_no_absolute_path_travels_in_the_file(bncli: Bncli, tmp_path: Path, suffix: str) -> None:
    save_awkward(tmp_path / "a.pt")
    output = tmp_path / f"b{suffix}"
    export(tmp_path / "a.pt", f"{HERE}Awkward", 32, output)
    record = exported_record(output)
    assert record is not None
    assert record.network == "awkward_networks.py:Awkward"
    places = [str(tmp_path).encode(), str(Path(HERE).parent).encode()]
    with contextlib.ExitStack() as stack:
        parts = [output.read_bytes()]
        if suffix == ".pt2":
            archive = stack.enter_context(zipfile.ZipFile(output))
            parts = [archive.read(name) for name in archive.namelist()]
        assert not [place for place in places for part in parts if place in part]


def test_a_configuration_travels_without_its_folders() -> None:
    values = {"a": ["/home/me/x/net.py:Net", "net.py:Net", r"C:\Users\me\w.pt"], "b": {"c": "~/w"}, "d": 1}
    assert _without_folders(values) == {"a": ["net.py:Net", "net.py:Net", "w.pt"], "b": {"c": "w"}, "d": 1}


@pytest.mark.parametrize("statistics", ["pooled", "recalibrate"])
def test_an_average_says_how_its_statistics_were_made(
    bncli: Bncli, finished_run: Path, tmp_path: Path, statistics: str
) -> None:
    both = [finished_run / name for name in ("best.pt", "last.pt")]
    words = ("average", *both, "-o", tmp_path / "new.pt", "--no-evaluate", "--statistics", statistics)
    assert bncli(*words).code == 0
    assert bncli("export", tmp_path / "new.pt", "-o", tmp_path / "a.safetensors", *EXAMPLE).code == 0
    record = exported_record(tmp_path / "a.safetensors")
    assert record is not None
    found = record.statistics
    assert found["method"] == {"pooled": "pooled", "recalibrate": "exact"}[statistics]
    assert [(one["file"], one["share"], one["sha256"]) for one in found["average_of"]] == [
        (path.name, 0.5, file_sha256(path)) for path in both
    ]


def test_images_of_a_folder_prove_it_too(bncli: Bncli, finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for index in range(3):
        Image.new("RGB", (40, 30), (index * 90, 20, 30)).save(tmp_path / "images" / f"{index}.png")
    words = ("export", finished_run / "last.pt", "-o", tmp_path / "a.safetensors", "--images")
    assert bncli(*words, tmp_path / "images", "--json").json["proof"]["num_images"] == 3
    assert (
        bncli("export", finished_run / "last.pt", "-o", tmp_path / "b.pt2", "--images", "nowhere").code == 2
    )


def test_the_test_split_is_what_proves_it(finished_run: Path) -> None:
    assert len(load_dataset(load_checkpoint(finished_run / "last.pt").config.data).test) == 120
