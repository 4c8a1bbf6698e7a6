"""`--logits`: what each form means, for the kinds of outputs that networks have."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bncli.errors import BncliError
from bncli.models import build_network
from bncli.models.picked_output import find_output, pick_output
from bncli.torchvision_compat import import_torchvision
from tests.conftest import Bncli

NETS = """
from collections import namedtuple
from dataclasses import dataclass
import torch
from torch import nn

Pair = namedtuple("Pair", "features logits")


@dataclass
class Answer:
    features: torch.Tensor
    logits: torch.Tensor


KINDS = {
    "dict": lambda a, b: {"features": a, "logits": b},
    "tuple": lambda a, b: (a, b),
    "named": Pair,
    "data": Answer,
}


class Net(nn.Module):
    def __init__(self, kind="plain"):
        super().__init__()
        self.kind, self.body = kind, nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 10)

    def forward(self, images):
        features = self.body(images).mean((2, 3))
        logits = self.head(features)
        return logits if self.kind == "plain" else KINDS[self.kind](features, logits)
"""
A, B, C = (torch.full((2, 3), float(value)) for value in range(3))


@dataclass
class Answer:
    loss: Tensor
    logits: Tensor


class ModelOutput(OrderedDict):  # type: ignore[type-arg]
    """As in transformers: a dict whose keys are attributes, and a dataclass in the classes made of it."""


class Plain:
    def __init__(self) -> None:
        self.loss, self.logits, self._hidden = A, B, C


GoogLeNetOutputs = import_torchvision().models.GoogLeNetOutputs
Pair = namedtuple("Pair", "loss logits")


@pytest.mark.parametrize(
    ("outputs", "name", "expected"),
    [
        ({"loss": A, "logits": B}, "logits", B),
        ({"loss": A, "logits": B}, "1", B),
        ({"loss": A, "logits": B}, "-2", A),
        ({1: A, 0: B}, "0", B),  # a key comes before a place
        (ModelOutput(loss=A, logits=B), "logits", B),
        (ModelOutput(loss=A, logits=B), "-1", B),
        (OrderedDict(out=A, aux=B), "out", A),
        ((A, B), "0", A),
        ([A, B], "-1", B),
        (Answer(A, B), "logits", B),
        (Answer(A, B), "0", A),
        (Pair(A, B), "logits", B),
        (Pair(A, B), "-1", B),
        (GoogLeNetOutputs(A, B, C), "logits", A),
        (GoogLeNetOutputs(A, B, C), "aux_logits1", C),
        (Plain(), "logits", B),
        ({"out": (A, B)}, "out.1", B),
        (({"a": {"b": C}},), "0.a.b", C),
        ({"a.b": A, "a": {"b": B}}, "a.b", A),  # a key with a dot comes before what lies inside
    ],
)
def test_an_output_is_found_by_name_and_by_number(outputs: object, name: str, expected: Tensor) -> None:
    assert find_output(outputs, name) is expected


@pytest.mark.parametrize(
    ("outputs", "name", "message"),
    [
        ({"loss": A, "logits": B}, "logit", "'logit'; the network returns a dict with loss, logits"),
        ({"loss": A}, "1", "'1'; the network returns a dict with loss"),
        ((A, B), "2", "'2'; the network returns a tuple of 2 outputs: 0 to 1"),
        ((A, B), "-3", "'-3'"),
        ((A, B), "logits", "'logits'; the network returns a tuple of 2 outputs"),
        (Pair(A, B), "out", "'out'; the network returns a Pair with loss, logits"),
        (A, "0", "'0'; the network returns a single tensor of shape (2, 3)"),
        (A, "shape", "'shape'; the network returns a single tensor"),
        (Plain(), "_hidden", "'_hidden'; the network returns a Plain with loss, logits"),
        ({"out": A}, "out.1", "'1'; the network returns a single tensor"),
        ({"out": A}, ".", "'.'"),
        ((), "0", "a tuple"),
        (None, "0", "a NoneType"),
    ],
)
def test_what_is_not_there_is_told_with_what_is(outputs: object, name: str, message: str) -> None:
    with pytest.raises(BncliError) as error:
        find_output(outputs, name)
    assert message in str(error.value)


def test_in_train_mode_the_logits_are_found_among_those_of_auxiliary_heads() -> None:
    network = import_torchvision().models.googlenet(weights=None, init_weights=False, num_classes=3)
    images = torch.rand(2, 3, 64, 64)
    torch.manual_seed(0)
    expected = network.train()(images).logits
    pick_output(network)
    torch.manual_seed(0)
    assert torch.equal(network(images), expected)
    assert network.eval()(images).shape == (2, 3)


def test_the_network_returns_it_and_keeps_its_names() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, self.layer(x)

    network = Two()
    pick_output(network, "1")
    assert torch.equal(network(A), network.layer(A))
    assert list(network.state_dict()) == ["layer.weight", "layer.bias"]


def test_commands_take_the_output_that_they_are_told(
    bncli: Bncli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is around the logits, all answers are those of the network that returns them alone."""
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NETS)
    torch.save(build_network("nets.py:Net").state_dict(), "a.pt")
    data = ("--set", "data.name=synthetic", "--set", "data.num_train=40", "--set", "data.num_test=40")
    common = (*data, "--device", "cpu", "--json", "--model", "nets.py:Net")
    expected = {}
    for kind, name in (
        ("plain", None),
        ("data", None),
        ("dict", "logits"),
        ("tuple", "-1"),
        ("named", "logits"),
        ("data", "1"),
    ):
        picked = () if name is None else ("--logits", name)
        more = (*common, "--model-arg", f"kind={kind}", *picked)
        evaluated = bncli("eval", "a.pt", *more, "--num-images", 4, "--batch-sizes", "2")
        made = bncli("recalibrate", "a.pt", "-o", f"{kind}{name}.pt", *more)
        assert (evaluated.code, made.code) == (0, 0), evaluated.err + made.err
        found = evaluated.json["accuracy"], evaluated.json["loss"], made.json["after"], made.json["layers"]
        assert expected.setdefault("found", found) == found
    outcome = bncli("eval", "a.pt", *common, "--model-arg", "kind=dict", "--logits", "logit")
    assert outcome.code == 2
    line = outcome.err.splitlines()[-1]
    assert "model nets.py:Net: --logits: there is no output 'logit'; the network returns a dict with" in line
