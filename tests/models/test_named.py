"""Networks by name: what is built, what is refused and in which words, and which code runs."""

import copy
import importlib.util
import inspect
import socket
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from bncli.errors import ConfigError
from bncli.models import ConvNet, build_network
from bncli.torchvision_compat import import_torchvision

torchvision = import_torchvision()


@pytest.fixture(autouse=True)
def nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """No name and no default of a library opens a connection, or loads weights from a file."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights are fetched")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", refuse)


def refusal(name: str, **arguments: object) -> str:
    """The one line that a user reads."""
    with pytest.raises(ConfigError) as caught:
        build_network(name, arguments)
    text = str(caught.value)
    assert text.startswith(f"model {name}: ")
    assert "\n" not in text
    assert caught.value.exit_code == 2
    return text.removeprefix(f"model {name}: ")


def test_ours_is_convnet_with_the_keys_of_a_configuration() -> None:
    network = build_network("convnet", {"widths": [4, 6], "num_classes": 3, "batch_norm": {"momentum": 0.3}})
    assert isinstance(network, ConvNet)
    assert network.head.out_features == 3
    assert [m.momentum for m in network.modules() if isinstance(m, nn.BatchNorm2d)] == [0.3] * 4
    assert "model.width: unknown key; did you mean 'widths'?" in refusal("convnet", width=[4])
    assert refusal("convnet", num_classes="ten").startswith(
        "num_classes: expected a whole number of 1 or more"
    )


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1"])
def test_torchvisions_networks_are_those_of_its_registry(name: str) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    network = build_network(f"torchvision:{name}", {"num_classes": 10}, seed=3)
    assert torch.equal(torch.get_rng_state(), before)  # the user's own random numbers go on as they would
    torch.manual_seed(3)
    expected = torchvision.models.get_model(name, weights=None, num_classes=10)
    assert type(network) is type(expected)
    found = network.state_dict()
    assert list(found) == list(expected.state_dict())
    assert all(torch.equal(found[key], value) for key, value in expected.state_dict().items())


def test_no_builder_of_torchvision_is_left_to_its_own_weights() -> None:
    """A backbone's weights are fetched by default: segmentation and detection would."""
    for name in torchvision.models.list_models():
        builder = torchvision.models.get_model_builder(name)
        defaults = [key for key in inspect.signature(builder).parameters if key.startswith("weights")]
        assert set(defaults) <= {"weights", "weights_backbone"}
    assert type(build_network("torchvision:lraspp_mobilenet_v3_large")).__name__ == "LRASPP"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build_network("torchvision:googlenet", {"num_classes": 4}).fc.out_features == 4


@pytest.mark.parametrize("argument", ["weights", "pretrained", "checkpoint_path"])
def test_pretrained_weights_are_not_asked_for(argument: str) -> None:
    for name in ("torchvision:resnet18", "timm:resnet10t"):
        assert refusal(name, **{argument: "DEFAULT"}).startswith(f"{argument}: the weights come from the ch")


def test_unknown_names_are_answered_with_the_nearest() -> None:
    near = "; the nearest: resnet18, resnet152, resnet101"
    assert refusal("torchvision:resnt18") == f"torchvision has no such network{near}"
    assert "; the nearest: torchvision:resnet18," in refusal("resnet18")
    assert refusal("convnt").startswith("no such network; the nearest: convnet")
    assert refusal("net.py") == "which function or class makes the network? Name it: net.py:FACTORY"
    assert refusal("torchvision:") == "torchvision has no such network"
    for incomplete in (":factory", "torch.nn:"):
        assert refusal(incomplete).startswith("expected convnet, torchvision:NAME, ")


def test_timms_networks_are_those_of_its_registry() -> None:
    timm = pytest.importorskip("timm")
    network = build_network("timm:mobilenetv3_small_050", {"num_classes": 4}, seed=3)
    torch.manual_seed(3)
    expected = timm.create_model("mobilenetv3_small_050", num_classes=4).state_dict()
    found = network.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert "mobilenetv3_small_050" in refusal("timm:mobilenetv3_smal_050")
    # of a hub nothing is fetched, not even a description
    assert refusal("timm:hf-hub:timm/resnet18.a1_in1k").startswith("timm has no such network")


def test_timm_is_asked_for_a_network_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def create_model(name: str, **arguments: object) -> nn.Module:
        asked.update(arguments, name=name)
        return nn.Linear(2, 2)

    fake = ModuleType("timm")
    fake.is_model = lambda name: name == "net_a"
    fake.list_models = lambda: ["net_a", "other"]
    fake.create_model = create_model
    fake.__spec__ = importlib.util.spec_from_loader("timm", None)
    monkeypatch.setitem(sys.modules, "timm", fake)
    assert isinstance(build_network("timm:net_a", {"drop_rate": 0.1}), nn.Linear)
    assert asked == {"name": "net_a", "pretrained": False, "drop_rate": 0.1}
    assert refusal("timm:net_b") == "timm has no such network; the nearest: net_a"


def test_without_timm_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "timm" else find_spec(name))
    assert refusal("timm:resnet18") == 'timm is not installed; pip install "bncli[timm]"'


def test_a_module_that_can_be_imported_gives_its_factory() -> None:
    assert isinstance(build_network("torch.nn:Linear", {"in_features": 3, "out_features": 2}), nn.Linear)
    assert isinstance(
        build_network("torch.nn.modules:linear.Linear", {"in_features": 3, "out_features": 2}), nn.Linear
    )
    needs = (
        "it needs in_features and out_features: --model-arg in_features=VALUE --model-arg out_features=VALUE"
        " (train: --set model.arguments.in_features=VALUE)"
    )
    assert refusal("torch.nn:Linear") == needs
    assert (
        refusal("torch.nn:Linear", in_features=3, out_features=2, bais=True)
        == "it has no argument bais; the nearest: bias"
    )
    assert refusal("torch.nn:Identty").startswith("torch.nn has no Identty; the nearest: Identity")
    assert refusal("torch:pi") == "pi is of type float, neither a function nor a class"
    assert refusal("torch:zeros", size=[2]) == "what it made is of type Tensor, not a torch.nn.Module"
    assert refusal("no_such_package.nets:make").startswith("there is no module no_such_package; looked where")


NET = '''
import dataclasses
from torch import nn
from layers_beside import block

@dataclasses.dataclass
class Widths:
    first: int = 4

class Net(nn.Sequential):
    pass

ready = Net(nn.BatchNorm2d(7))
number = 3

def make(width=4):
    """A network."""
    print("made")
    return Net(*block(Widths(width).first))

def lazily():
    from imported_late import late
    return late()

def fails():
    raise ValueError("two\\nlines")

def quits():
    raise SystemExit(1)

def nothing():
    pass
'''


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with networks that imports others beside it, in a folder that is not the current one."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "net.py").write_text(NET)
    (folder / "layers_beside.py").write_text(
        "from torch import nn\ndef block(n):\n    return nn.Conv2d(3, n, 1), nn.BatchNorm2d(n)\n"
    )
    (folder / "imported_late.py").write_text("from torch import nn\ndef late():\n    return nn.ReLU()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "modules", sys.modules.copy())
    return folder / "net.py"


def test_a_file_of_the_users_gives_its_factory(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = sys.path.copy()
    modules = set(sys.modules)
    network = build_network("project/net.py:make", {"width": 5})
    assert [type(module).__name__ for module in network] == ["Conv2d", "BatchNorm2d"]
    assert network[1].num_features == 5
    assert capsys.readouterr() == ("", "made\n")  # stdout carries results alone
    assert sys.path == path
    (private,) = set(sys.modules) - modules - {"layers_beside"}
    assert private.startswith("_bncli_code_")  # a file called torch.py replaces nothing
    assert type(network).__module__ == private
    copy.deepcopy(network)
    assert build_network(f"{net}:ready")[0].num_features == 7
    assert isinstance(build_network(f"{net}:lazily"), nn.ReLU)


def test_what_is_wrong_with_a_file_is_told_on_one_line(net: Path) -> None:
    before = set(sys.modules)
    assert refusal(f"{net}:mak") == f"{net} has no mak; the nearest: make"
    assert refusal("project/nett.py:make") == "there is no file project/nett.py; the nearest: net.py"
    assert refusal(f"{net}:fails") == f"making the network failed: ValueError: two lines ({net}, line 26)"
    assert refusal(f"{net}:quits") == f"making the network failed: SystemExit: 1 ({net}, line 29)"
    assert refusal(f"{net}:nothing") == "what it made is of type NoneType, not a torch.nn.Module"
    assert refusal(f"{net}:number") == "number is of type int, neither a function nor a class"
    assert refusal(f"{net}:make", size=3) == "it has no argument size; it takes width"
    assert refusal(f"{net}:ready", width=3) == "it has no argument width; it takes none"
    net.write_text("import not_installed_here\n")
    expected = (
        f"importing it failed: ModuleNotFoundError: No module named 'not_installed_here' ({net}, line 1)"
    )
    assert refusal(f"{net}:make") == expected
    net.write_text("def make(:\n")
    assert refusal(f"{net}:make").startswith(
        "importing it failed: SyntaxError: invalid syntax (net.py, line 1)"
    )
    text = net.with_suffix(".txt")
    text.write_text("")
    assert refusal(f"{text}:make") == f"{text} is no Python file (its name must end in .py)"
    # what failed to be imported is not there half made
    new = {name for name in sys.modules if name.startswith("_bncli_code_")} - before
    assert all(hasattr(sys.modules[name], "make") for name in new)


def test_a_package_of_the_current_folder_is_found_and_stands_for_no_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "nets.py").write_text("from torch import nn\ndef make():\n    return nn.ReLU()\n")
    (tmp_path / "colorsys.py").write_text("raise RuntimeError('the library was meant')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "modules", sys.modules.copy())
    sys.modules.pop("colorsys", None)
    assert isinstance(build_network("mine.nets:make"), nn.ReLU)
    assert refusal("colorsys:rgb_to_hls").startswith("it needs r and g and b")
