"""Checkpoints of `bncli train` with other networks than its own: what commands do, and whose code runs."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bncli.checkpoints import load_checkpoint, load_model, recorded_network
from bncli.config_file import load_config
from bncli.errors import CheckpointError
from bncli.training import train
from tests.conftest import Bncli, save_as_if_whole

NET = """
from pathlib import Path
from torch import nn

Path(__file__).with_name("was-imported").touch()


def net(num_classes, width=4):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, bias=False), nn.BatchNorm2d(width, 1e-3, 0.3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes),
    )
"""
CONFIG = """
data: {name: synthetic, num_train: 60, num_test: 40}
model: {name: net.py:net, arguments: {width: 5}}
train: {epochs: 1, batch_size: 20}
runtime: {device: cpu, precision: float32, threads: 1}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with net.py, net.yaml and run/; tests only read it."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "net.py").write_text(NET)
    (folder / "net.yaml").write_text(CONFIG)
    train(load_config(folder / "net.yaml"), folder / "run")
    return folder


@pytest.fixture(scope="module")
def of_torchvision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """last.pt of torchvision's smallest network."""
    folder = tmp_path_factory.mktemp("torchvision")
    overrides = ["model.name=torchvision:shufflenet_v2_x0_5", "model.arguments={}"]
    (folder / "net.yaml").write_text(CONFIG)
    train(load_config(folder / "net.yaml", overrides), folder / "run")
    return folder / "run" / "last.pt"


def changed(source: Path, target: Path, **model: Any) -> Path:
    """The checkpoint as a stranger would write it: another `model` section, and digests that fit."""
    content = torch.load(source, weights_only=True)
    content["config"]["model"] = {**content["config"]["model"], **model}
    save_as_if_whole(content, target)
    return target


def test_the_path_of_a_network_begins_at_the_folder_of_the_yaml_and_with_set_at_the_current_one(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(trained / "net.yaml").model.name == f"{trained / 'net.py'}:net"
    assert load_config(trained / "net.yaml", ["model.name=x/n.py:N"]).model.name == f"{tmp_path}/x/n.py:N"
    assert load_config(None, ["model.name=~/n.py:N"]).model.name == f"{Path('~').expanduser()}/n.py:N"
    assert load_config(None, ["model.name=a.b:C"]).model.name == "a.b:C"
    assert load_config(trained / "run" / "config.yaml") == load_config(trained / "net.yaml")


@pytest.mark.parametrize(
    "command", [["eval"], ["recalibrate", "-o", "new.pt"], ["predict"], ["inspect-stats"]]
)
def test_torchvisions_networks_are_known_without_options(
    bncli: Bncli, of_torchvision: Path, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    from PIL import Image

    Image.new("RGB", (32, 32)).save("a.png")
    images = ["a.png"] if command[0] == "predict" else []
    outcome = bncli(command[0], of_torchvision, *images, *command[1:], "--json")
    assert outcome.code == 0, outcome.err
    if command[0] == "eval":
        saved = load_checkpoint(of_torchvision).test_accuracy
        assert outcome.json["accuracy"] == saved
    if command[0] == "recalibrate":
        assert bncli("compare", of_torchvision, "new.pt").code == 1  # they differ
        assert bncli("recalibrate", "new.pt", "--verify").code == 0


def test_a_torchvision_run_is_resumed_without_options(
    bncli: Bncli, of_torchvision: Path, tmp_path: Path
) -> None:
    shutil.copytree(of_torchvision.parent, tmp_path / "run")
    assert bncli("train", "--resume", tmp_path / "run", "--set", "train.epochs=2").code == 0
    assert load_checkpoint(tmp_path / "run" / "last.pt").epoch == 2


@pytest.mark.parametrize(
    "command", [["eval"], ["recalibrate", "-o", "new.pt"], ["predict", "a.png"], ["demo"], ["bench", "eval"]]
)
def test_code_that_a_checkpoint_names_does_not_run(
    bncli: Bncli, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    for name in (f"{tmp_path / 'net.py'}:net", "net:net", "net.py:net", "./net.py:net"):
        last = changed(trained / "run" / "last.pt", tmp_path / "stranger.pt", name=name)
        where = 2 if command[0] == "bench" else 1
        outcome = bncli(*command[:where], last, *command[where:])
        assert outcome.code == 2
        assert f"{last}: its network is made by {name}, and code that a file names is not run" in outcome.err
        assert f"--model {name}" in outcome.err
        assert outcome.err.count("\n") == 1
        assert not (tmp_path / "was-imported").exists()
    assert not (tmp_path / "new.pt").exists()


def test_a_run_directory_brings_no_code_that_a_resumed_run_imports(
    bncli: Bncli, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "run", tmp_path / "run")
    (tmp_path / "run" / "net.py").write_text(NET)
    config = (tmp_path / "run" / "config.yaml").read_text()
    for name in ("net.py:net", "./net.py:net", "run.net:net", f"{tmp_path}/run/net.py:net"):
        text = config.replace(f"{trained / 'net.py'}:net", name)
        assert text != config
        (tmp_path / "run" / "config.yaml").write_text(text)
        outcome = bncli("train", "--resume", "run", "--set", "train.epochs=2")
        assert (outcome.code, outcome.err.count("\n")) == (2, 1)
        assert "code inside the run directory" in outcome.err
    assert not (tmp_path / "run" / "was-imported").exists()
    (tmp_path / "run" / "config.yaml").write_text(config)
    assert bncli("train", "--resume", "run", "--set", "train.epochs=2").code == 0


def test_a_run_goes_on_where_its_network_lies_elsewhere_now(
    bncli: Bncli, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "run", "run")
    Path("code").mkdir()
    Path("code/net.py").write_text(NET)
    Path("code/other.py").write_text(NET)
    more = ("--set", "train.epochs=2", "--set")
    outcome = bncli("train", "--resume", "run", *more, "model.name=code/other.py:net")
    assert outcome.code == 2
    assert "cannot resume with another configuration: model.name was" in outcome.err
    assert bncli("train", "--resume", "run", *more, "model.name=code/net.py:net").code == 0
    last = load_checkpoint("run/last.pt")
    assert (last.epoch, last.config.model.name) == (2, f"{tmp_path}/code/net.py:net")


def test_inspect_stats_knows_eps_and_momentum_of_every_layer(bncli: Bncli, trained: Path) -> None:
    (layer,) = bncli("inspect-stats", trained / "run" / "last.pt", "--json").json["layers"]
    assert (layer["eps"], layer["momentum"], layer["hyperparameters_known"]) == (1e-3, 0.3, True)


@pytest.mark.parametrize("layers", [{"1": 3}, {"1": {"eps": "x", "momentum": [1]}}, {"other": {}}, {}, 3])
def test_strange_records_of_layers_are_refused_or_unknown(
    bncli: Bncli, trained: Path, tmp_path: Path, layers: object
) -> None:
    content = torch.load(trained / "run" / "last.pt", weights_only=True)
    save_as_if_whole({**content, "batch_norm_layers": layers}, tmp_path / "last.pt")
    outcome = bncli("inspect-stats", tmp_path / "last.pt", "--json")
    assert outcome.code == 0
    assert outcome.json["layers"][0]["hyperparameters_known"] is False
    if layers == 3:
        with pytest.raises(CheckpointError, match="batch_norm_layers: expected names and values"):
            load_checkpoint(tmp_path / "last.pt")


def test_reading_commands_need_no_code(bncli: Bncli, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    last = changed(trained / "run" / "last.pt", tmp_path / "last.pt", name=f"{tmp_path / 'net.py'}:net")
    assert bncli("inspect-stats", last).code == 0
    assert bncli("compare", last, trained / "run" / "last.pt").code == 0
    outcome = bncli("doctor", last)
    assert "net.py:net" in outcome.out.replace("\n", "")
    assert recorded_network(last) == f"{tmp_path / 'net.py'}:net"
    assert not (tmp_path / "was-imported").exists()


def test_the_library_asks_for_the_name_as_well(trained: Path) -> None:
    last = trained / "run" / "last.pt"
    (trained / "was-imported").unlink(missing_ok=True)
    for refused in (lambda: load_model(last), lambda: load_model(load_checkpoint(last))):
        with pytest.raises(CheckpointError, match="code that a file names is not run"):
            refused()
    assert not (trained / "was-imported").exists()
    with pytest.raises(CheckpointError, match=r"it records the network .*net\.py:net, not a\.py:net"):
        load_model(last, model="a.py:net")
    assert isinstance(load_model(last, model=f"{trained / 'net.py'}:net"), nn.Sequential)


def test_a_checkpoint_cannot_say_of_itself_that_it_may_run_code(trained: Path, tmp_path: Path) -> None:
    content = torch.load(trained / "run" / "last.pt", weights_only=True)
    assert "may_import" not in content
    save_as_if_whole({**content, "may_import": True}, tmp_path / "last.pt")
    assert load_checkpoint(tmp_path / "last.pt").may_import is False


def test_repeating_the_name_runs_it_also_where_the_file_has_moved(
    bncli: Bncli, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    last = trained / "run" / "last.pt"
    saved = load_checkpoint(last).test_accuracy
    assert bncli("eval", last, "--model", f"{trained / 'net.py'}:net", "--json").json["accuracy"] == saved
    outcome = bncli("eval", last, "--model", "net.py:net", "--json")
    assert (outcome.code, outcome.json["accuracy"]) == (0, saved)
    new = tmp_path / "new.pt"
    assert bncli("recalibrate", last, "-o", new, "--verify", "--model", "net.py:net").code == 0
    assert load_checkpoint(new).config.model.arguments == {"width": 5}
    assert bncli("eval", new, "--model", "net.py:net").code == 0
    exported = bncli("export", last, "-o", "net.pt2", "--model", "net.py:net", "--json")
    assert exported.code == 0, exported.err
    assert bncli("eval", "net.pt2", "--json").json["accuracy"] == saved  # it carries the computation itself


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--model", "other.py:net"],
            ":net, not other.py:net; a file may have moved, but not changed its name\n",
        ),
        (["--model", "torchvision:resnet18"], ":net, not torchvision:resnet18\n"),
        (["--model", "net.py:net", "--key", "ema"], "--key: a checkpoint of `bncli train` records it"),
        (["--model", "net.py:net", "--logits", "0"], "--logits: a checkpoint"),
        (
            ["--model", "net.py:net", "--model-arg", "width=6"],
            "its tensors do not fit its configuration: 0.weight",
        ),
        (["--model", "net.py:net", "--model-arg", "depth=6"], "it has no argument depth"),
    ],
)
def test_options_that_do_not_fit_the_checkpoint_are_refused_in_one_line(
    bncli: Bncli, trained: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], expected: str
) -> None:
    monkeypatch.chdir(trained)
    outcome = bncli("eval", "run/last.pt", *options)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert expected in outcome.err


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("torchvision:shufflenet_v2_x0_5", {"num_classes": 10**9}),
        ("torchvision:resnet18", {"width_per_group": 10**6}),
        ("torchvision:densenet121", {"block_config": [10**6, 1, 1, 1]}),
        ("torchvision:shufflenet_v2_x0_5", {"num_classes": -1}),
        ("torchvision:shufflenet_v2_x0_5", {"num_classes": "a"}),
        ("torchvision:shufflenet_v2_x0_5", {"weights": "DEFAULT"}),
        ("torchvision:no_such_network", {}),
        ("torchvision:resnet50", {}),
    ],
)
def test_recorded_arguments_fill_no_memory_and_fetch_nothing(
    of_torchvision: Path, tmp_path: Path, name: str, arguments: dict[str, Any]
) -> None:
    last = changed(of_torchvision, tmp_path / "stranger.pt", name=name, arguments=arguments)
    with pytest.raises(CheckpointError) as caught:
        load_model(last)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{last}: ")


def test_the_network_of_a_built_in_configuration_is_bnclis_own_code(tmp_path: Path) -> None:
    config = load_config("resnet18", ["data={name: synthetic, num_train: 20, num_test: 10}"])
    assert Path(config.model.name.rpartition(":")[0]).is_file()
    network = load_model_of(config.model.name, tmp_path)
    assert network.conv1.stride == (1, 1)
    assert network.fc.out_features == 10


def load_model_of(name: str, folder: Path) -> nn.Module:
    """Through a checkpoint, without repeating the name."""
    from dataclasses import replace

    from bncli.checkpoints import save_checkpoint
    from bncli.training import prepare
    from bncli.training.run import Run

    overrides = [
        f"model.name={name}",
        "data={name: synthetic, num_train: 20, num_test: 10}",
        "train.batch_size=5",
    ]
    run = Run.start(prepare(load_config(None, [*overrides, "runtime.threads=1"])))
    save_checkpoint(replace(run.checkpoint(run.model, None).finished()), folder / "last.pt")
    return load_model(folder / "last.pt")
