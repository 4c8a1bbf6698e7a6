"""`bncli convert` and `bncli compare` on files of Keras, with Keras' own answers as the oracle."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bncli.checkpoints import open_checkpoint
from bncli.checkpoints.convert import convert_layers
from bncli.checkpoints.convert_to_keras import LEAVES
from bncli.errors import CheckpointError
from tests.checkpoints.formats.framework_answers import FILES, Corpus, unpack
from tests.conftest import Bncli


@pytest.fixture(scope="module")
def keras(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return unpack("keras", tmp_path_factory.mktemp("keras"))


def loaded(path: Path, name: str, answer: dict[str, object]) -> nn.BatchNorm1d:
    """The layer, loaded strictly into PyTorch's own."""
    state = torch.load(path, weights_only=True)
    own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
    layer = nn.BatchNorm1d(
        len(own["running_mean"]), eps=float(str(answer["epsilon"])), affine="weight" in own
    )
    layer.load_state_dict(own)
    return layer


def test_what_is_written_is_what_keras_says(bncli: Bncli, keras: Corpus, tmp_path: Path) -> None:
    outcome = bncli("convert", keras.folder / "flat.keras", "-o", tmp_path / "new.pt", "--json")
    assert outcome.code == 0, outcome.err
    written = {layer["name"]: layer for layer in json.loads(outcome.out)["layers"]}
    for answer in keras.answers("flat.keras"):
        layer = loaded(tmp_path / "new.pt", str(answer["name"]), answer)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        assert layer.running_mean.tolist() == pytest.approx(answer["moving_mean"], rel=1e-6)
        assert layer.running_var.tolist() == pytest.approx(answer["moving_variance"], rel=1e-6)
        told = written[answer["name"]]
        assert told["momentum"] == pytest.approx(1 - answer["momentum"])
        assert told["eps"] == pytest.approx(answer["epsilon"])
        assert (1 - told["momentum"]) ** told["num_batches_tracked"] <= 1e-3


def test_a_counter_keeps_the_statistics_from_being_wiped(bncli: Bncli, keras: Corpus, tmp_path: Path) -> None:
    assert bncli("convert", keras.folder / "flat.keras", "-o", tmp_path / "new.pt").code == 0
    answer = keras.answers("flat.keras")[0]
    layer = loaded(tmp_path / "new.pt", str(answer["name"]), answer)
    layer.momentum = None
    assert layer.running_mean is not None
    before = layer.running_mean.clone()
    layer(torch.randn(16, len(before)) + 100)
    assert bool(((layer.running_mean - before).abs() < 10).all())


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_other_containers_hold_the_same(bncli: Bncli, keras: Corpus, tmp_path: Path, suffix: str) -> None:
    for name in ("new.pt", f"new.{suffix}"):
        assert bncli("convert", keras.folder / "flat.keras", "-o", tmp_path / name).code == 0
    state = torch.load(tmp_path / "new.pt", weights_only=True)
    if suffix == "npz":
        with np.load(tmp_path / "new.npz") as archive:
            other = {name: torch.from_numpy(archive[name]) for name in archive.files}
    else:
        from safetensors.torch import load_file

        other = load_file(tmp_path / "new.safetensors")
    assert other.keys() == state.keys()
    assert all(torch.equal(other[name], state[name]) for name in state)


def test_variances_are_corrected_by_a_stated_n(bncli: Bncli, keras: Corpus, tmp_path: Path) -> None:
    for name, more in (("plain", ()), ("corrected", ("--values-per-channel", "8"))):
        assert bncli("convert", keras.folder / "flat.keras", "-o", tmp_path / f"{name}.pt", *more).code == 0
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("plain", "corrected"))
    for name, value in one.items():
        factor = 8 / 7 if name.endswith("running_var") else 1
        torch.testing.assert_close(two[name], value * factor if factor != 1 else value)
    outcome = bncli("compare", tmp_path / "plain.pt", tmp_path / "corrected.pt")
    assert outcome.code == 1
    assert "with n = 8 values per channel" in " ".join(outcome.out.split())


def test_compare_finds_the_same_layers_across_frameworks(bncli: Bncli, keras: Corpus, tmp_path: Path) -> None:
    assert bncli("convert", keras.folder / "flat.keras", "-o", tmp_path / "new.pt").code == 0
    outcome = bncli("compare", keras.folder / "flat.keras", tmp_path / "new.pt")
    text = " ".join(outcome.out.split())
    assert outcome.code == 0, outcome.out
    assert "The same in Keras 3 and PyTorch" in text
    assert "(assumed) in the second: with equal statistics, outputs differ by up to" in text


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("nested.keras", "nested.weights.h5"),
        ("nested.h5", "nested_export"),
        ("nested.keras", "checkpoints/ck-1"),
        ("wrapped.keras", "wrapped.weights.h5"),
        ("subclassed.keras", "subclassed_export/variables/variables.index"),
    ],
)
def test_exports_of_one_network_are_the_same_whatever_they_call_its_layers(
    bncli: Bncli, keras: Corpus, first: str, second: str
) -> None:
    outcome = bncli("compare", keras.folder / first, keras.folder / second, "--json")
    found = json.loads(outcome.out)
    assert (found["only_in_first"], found["only_in_second"]) == ([], [])
    assert {layer["relation"] for layer in found["layers"]} == {"equal"}
    assert found["num_layers"] == len(keras.answers(first))


def test_compare_names_each_mistake_of_a_conversion(bncli: Bncli, keras: Corpus, tmp_path: Path) -> None:
    assert bncli("convert", keras.folder / "flat.keras", "-o", tmp_path / "new.pt").code == 0
    state = torch.load(tmp_path / "new.pt", weights_only=True)
    names = list(dict.fromkeys(key.rpartition(".")[0] for key in state))
    wrong = {f"other_{key}": value for key, value in state.items() if not key.startswith(f"{names[2]}.")}
    first, second = f"other_{names[0]}", f"other_{names[1]}"
    wrong[f"{first}.running_mean"], wrong[f"{first}.running_var"] = (
        wrong[f"{first}.running_var"], wrong[f"{first}.running_mean"],
    )  # fmt: skip
    wrong[f"{second}.running_var"] = wrong[f"{second}.running_var"] * (64 / 63)
    torch.save(wrong, tmp_path / "wrong.pt")
    outcome = bncli("compare", keras.folder / "flat.keras", tmp_path / "wrong.pt", "--json")
    assert outcome.code == 1
    found = json.loads(outcome.out)
    kinds = {layer["name"]: layer["relation"] for layer in found["layers"]}
    assert found["matched_by"] == "values"
    assert found["only_in_first"] == [names[2]]
    assert kinds[names[0]] == "swapped"
    assert kinds[names[1]] == "bessel"
    assert {kind for name, kind in kinds.items() if name not in names[:2]} == {"equal"}


def test_what_is_assumed_is_taken_only_where_the_file_is_silent(bncli: Bncli, keras: Corpus) -> None:
    for name, momentum, eps in (("flat.weights.h5", 0.25, 0.5), ("flat.keras", 0.1, 0.01)):
        outcome = bncli(
            "inspect-stats", keras.folder / name, "--assume", "momentum=0.25,eps=0.5", "--json",
            "--fail-on", "never",
        )  # fmt: skip
        first = json.loads(outcome.out)["layers"][0]
        assert (first["momentum"], first["eps"]) == pytest.approx((momentum, eps))
        assert first["framework"] == "Keras 3"
        assert first["variance"] == "biased"


def test_momentum_is_shown_as_the_framework_writes_it_too(bncli: Bncli, keras: Corpus) -> None:
    file = keras.folder / "flat.keras"
    shown = {layer["name"]: layer for layer in bncli("inspect-stats", file, "--json").json["layers"]}
    for answer in keras.answers("flat.keras"):
        layer = shown[answer["name"]]
        assert layer["framework_momentum"] == pytest.approx(answer["momentum"], abs=1e-12)
        assert layer["momentum"] == pytest.approx(1 - answer["momentum"], abs=1e-12)
    text = bncli("inspect-stats", file, "--channels", "--layer", "norm1").out
    assert text.startswith("norm1: momentum 0.11 (0.89 in Keras 3), eps 0.02\n")
    silent = bncli("inspect-stats", keras.folder / "flat.weights.h5", "--json").json["layers"]
    assert {layer["framework_momentum"] for layer in silent} == {None}


@pytest.mark.parametrize("text", ["eps", "eps=0", "momentum=2", "decay=0.1", "eps=nan"])
def test_assumptions_that_cannot_be_are_refused(bncli: Bncli, keras: Corpus, text: str) -> None:
    outcome = bncli("inspect-stats", keras.folder / "flat.keras", "--assume", text)
    assert outcome.code == 2
    assert outcome.err.startswith("bncli: error: --assume: expected")


def test_a_momentum_that_keras_would_write_is_answered_with_its_complement(
    bncli: Bncli, keras: Corpus
) -> None:
    file = keras.folder / "flat.keras"
    outcome = bncli("inspect-stats", file, "--assume", "momentum=0.99")
    assert "as in Keras and Flax, give momentum=0.01\n" in outcome.err
    assert "--assume" not in bncli("inspect-stats", file, "--assume", "momentum=0.1").err


def test_bad_input_is_told_in_one_line_and_nothing_is_written(
    bncli: Bncli, keras: Corpus, tmp_path: Path
) -> None:
    source, new = keras.folder / "flat.keras", tmp_path / "new.pt"
    cases = {
        "says what to write": ["convert", source, "-o", tmp_path / "new.onnx"],
        "has a weight or a bias, and": ["convert", keras.folder / "flat.weights.h5", "-o", new],
        "are not those of the network, which has 20": [
            "convert", source, "-o", new, "--model", "torchvision:resnet18",
        ],
        "there is no directory": ["convert", source, "-o", tmp_path / "none" / "new.pt"],
        "NumPy has no bfloat16": ["convert", keras.folder / "bfloat16.keras", "-o", tmp_path / "new.npz"],
    }  # fmt: skip
    for said, command in cases.items():
        outcome = bncli(*command)
        assert outcome.code == 2, command
        assert said in outcome.err
        assert not list(tmp_path.iterdir())


def test_layers_take_the_names_of_a_network(bncli: Bncli, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))\n"
    )
    torch.save({f"anything.{key}": value for key, value in nn.BatchNorm2d(4).state_dict().items()},
               tmp_path / "old.pt")  # fmt: skip
    new, network = tmp_path / "new.pt", f"{tmp_path / 'net.py'}:make"
    outcome = bncli("convert", tmp_path / "old.pt", "-o", new, "--model", network)
    assert outcome.code == 0, outcome.err
    assert {key.rpartition(".")[0] for key in torch.load(new, weights_only=True)} == {"1"}
    assert "Layers were matched by their order" in " ".join(outcome.out.split())
    outcome = bncli("convert", new, "-o", tmp_path / "again.pt", "--model", network)
    assert " ".join(outcome.out.partition("momentum=0.1).")[2].split()) == (
        "The file is PyTorch's already, so only its BatchNorm layers are written; --to keras converts the"
        " network."
    )


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        (None, "BatchNorm1d, 2d or 3d"),
        ("nn.BatchNorm1d(4)", "BatchNorm1d"),
        ("type('Own', (nn.BatchNorm3d,), {})(4)", "BatchNorm3d"),
        ("nn.BatchNorm2d(4), nn.Flatten(), nn.BatchNorm1d(4)", "BatchNorm1d or BatchNorm2d"),
    ],
)
def test_layers_are_to_be_built_as_they_are_in_the_network(
    bncli: Bncli, tmp_path: Path, layers: str | None, said: str
) -> None:
    made = nn.Sequential(*eval(f"({layers or 'nn.BatchNorm2d(4)'},)"))
    torch.save(made.state_dict(), tmp_path / "old.pt")
    (tmp_path / "net.py").write_text(
        f"from torch import nn\ndef make():\n    return nn.Sequential({layers})\n"
    )
    model = () if layers is None else ("--model", f"{tmp_path / 'net.py'}:make")
    outcome = bncli("convert", tmp_path / "old.pt", "-o", tmp_path / "new.pt", *model)
    assert f"build every layer as torch.nn.{said}(C, eps=1e-05, momentum=0.1)." in " ".join(
        outcome.out.split()
    )


def test_a_layer_without_statistics_does_not_keep_the_others_from_being_converted(
    bncli: Bncli, tmp_path: Path
) -> None:
    with zipfile.ZipFile(FILES / "exported" / "files.zip") as archive:
        archive.extract("eval.pt2", tmp_path)
        archive.extract("eval.pt", tmp_path)
    new, state = tmp_path / "new.pt", torch.load(tmp_path / "eval.pt", weights_only=True)
    outcome = bncli("convert", tmp_path / "eval.pt2", "-o", new)
    assert outcome.code == 0, outcome.err
    written = torch.load(new, weights_only=True)
    owners = {key.removesuffix(".running_mean") for key in state if key.endswith(".running_mean")}
    owners.remove("deep.4")  # InstanceNorm, as the graph tells
    expected = {key for key in state if key.rpartition(".")[0] in owners | {"deep.3"}}
    assert written.keys() == expected
    assert {"deep.3.weight", "deep.3.bias"} <= written.keys()
    assert all(torch.equal(written[key], state[key]) for key in written if "num_batches" not in key)
    text = " ".join(outcome.out.split())
    assert "No running statistics in deep.3: build with track_running_stats=False there." in text
    outcome = bncli("convert", tmp_path / "eval.pt2", "-o", tmp_path / "new.npz", "--to", "keras", "--json")
    assert any(note.endswith("not written, deep.3.") for note in outcome.json["notes"])
    assert {"deep.3.weight", "deep.3.bias"} <= set(outcome.json["tensors_left_out"])
    with np.load(tmp_path / "new.npz") as arrays:
        assert {name.rpartition("/")[0] for name in arrays.files} == owners
    nothing = FILES / "onnx" / "untracked.onnx"
    with open_checkpoint(nothing) as checkpoint, pytest.raises(CheckpointError, match="no running stat"):
        convert_layers([layer for layer in checkpoint.layers() if not layer.is_tracked])


def test_bfloat16_is_written_for_keras_in_a_type_that_numpy_has(
    bncli: Bncli, keras: Corpus, tmp_path: Path
) -> None:
    source, new = keras.folder / "bfloat16.keras", tmp_path / "new.npz"
    outcome = bncli("convert", source, "-o", new, "--to", "keras")
    assert outcome.code == 0, outcome.err
    with open_checkpoint(source) as checkpoint, np.load(new) as arrays:
        (layer,) = checkpoint.layers()
        for leaf, role in LEAVES.items():
            (tensor, array) = getattr(layer, leaf), arrays[f"low/{role}"]
            assert (tensor.dtype, array.dtype) == (torch.bfloat16, np.float32)
            assert tensor.double().tolist() == array.tolist()


def test_unbiased_variances_are_not_corrected_again(bncli: Bncli, finished_run: Path, tmp_path: Path) -> None:
    outcome = bncli(
        "convert", finished_run / "last.pt", "-o", tmp_path / "new.pt", "--values-per-channel", "64"
    )
    assert outcome.code == 2
    assert "the variances of PyTorch are unbiased already" in outcome.err


def test_what_equinox_evaluates_with_follows_the_assumed_momentum(bncli: Bncli, tmp_path: Path) -> None:
    """It divides its averages by 1 - m^t: with m = 0.9 and t = 40 by 0.985, by its default's 0.331 else."""
    source = FILES / "equinox" / "batch-40.eqx"
    for name, more in (("default", ()), ("assumed", ("--assume", "momentum=0.1"))):
        assert bncli("convert", source, "-o", tmp_path / f"{name}.pt", *more).code == 0
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("default", "assumed"))
    for leaf in ("running_mean", "running_var"):
        stored = one[f"batch_norm_0.{leaf}"].double() * (1 - 0.99**40)
        torch.testing.assert_close(two[f"batch_norm_0.{leaf}"].double(), stored / (1 - 0.9**40))
    assert torch.equal(one["batch_norm_0.weight"], two["batch_norm_0.weight"])
