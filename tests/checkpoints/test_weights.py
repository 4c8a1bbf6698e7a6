"""Anybody's tensors in a named network: the bits of `load_state_dict(strict=True)`, or a refusal."""

import random
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from bncli.checkpoints import MismatchError, load_weights, open_checkpoint
from bncli.errors import CheckpointError
from bncli.models import build_network
from bncli.torchvision_compat import import_torchvision
from tests.hostile.mutations import mutated

torchvision = import_torchvision()


def used(model: nn.Module) -> nn.Module:
    """With other numbers in every tensor."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.normal_() if tensor.is_floating_point() else tensor.random_(1, 1000)
    return model


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    )


def same_bits(first: nn.Module, second: nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def saved(state: object, path: Path) -> Path:
    torch.save(state, path)
    return path


def refusal(model: nn.Module, path: Path, *partial: str, key: str | None = None) -> str:
    """The line that a user reads, after the file's name; the network is as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(MismatchError) as caught:
        load_weights(model, path, partial=partial, key=key)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{path}: ")
    return text.removeprefix(f"{path}: ")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "module", "compressed", "channels_last"])
def test_a_file_of_any_kind_gives_the_bits_that_pytorch_loads(kind: str, tmp_path: Path) -> None:
    source = used(torchvision.models.get_model("shufflenet_v2_x0_5", weights=None, num_classes=10))
    state, path = source.state_dict(), tmp_path / "file"
    if kind == "safetensors":
        safetensors.torch.save_file(state, path)
    elif kind == "module":
        torch.save(source, path)
    else:
        if kind == "channels_last":
            state = source.to(memory_format=torch.channels_last).state_dict()
            assert not state["conv1.0.weight"].is_contiguous()
        torch.save(state, path, _use_new_zipfile_serialization=kind != "legacy")
    if kind == "compressed":  # as an archiver packs it again
        with (
            zipfile.ZipFile(path) as old,
            zipfile.ZipFile(tmp_path / "new", "w", zipfile.ZIP_DEFLATED) as new,
        ):
            for name in old.namelist():
                new.writestr(name, old.read(name))
        shutil.move(tmp_path / "new", path)
    network = build_network("torchvision:shufflenet_v2_x0_5", {"num_classes": 10})
    loaded = load_weights(network, path)
    expected = build_network("torchvision:shufflenet_v2_x0_5", {"num_classes": 10})
    expected.load_state_dict(source.state_dict(), strict=True)
    assert same_bits(network, expected)
    assert loaded.sentence == "loaded 338 of 338 tensors"
    assert (loaded.num_loaded, loaded.num_tensors, loaded.kept, loaded.left_over) == (338, 338, (), ())


@pytest.mark.parametrize(
    "name", ["mobilenet_v3_small", "shufflenet_v2_x0_5", "densenet121", "efficientnet_b0"]
)
def test_other_families_are_loaded_whole(name: str, tmp_path: Path) -> None:
    source = used(build_network(f"torchvision:{name}"))
    network = build_network(f"torchvision:{name}")
    assert not same_bits(network, source)
    loaded = load_weights(network, saved({"model": source.state_dict(), "epoch": 3}, tmp_path / "a.pt"))
    assert same_bits(network, source)
    assert loaded.key == "model"
    assert loaded.num_loaded == len(source.state_dict())


def test_a_network_of_timm_is_loaded(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    source = used(build_network("timm:resnet10t", {"num_classes": 5}))
    network = build_network("timm:resnet10t", {"num_classes": 5})
    load_weights(network, saved(source.state_dict(), tmp_path / "a.pt"))
    assert same_bits(network, source)


class Inside(nn.Module):
    """A network of the user's that holds the one that the file is of."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Module()
        self.net.body = small()


def test_wrappers_names_are_exchanged_on_either_side(tmp_path: Path) -> None:
    source = used(small())
    state = source.state_dict()
    for prefix in ("module.", "module.model.", "_orig_mod.", "backbone.encoder."):
        network = small()
        path = saved({f"{prefix}{name}": value for name, value in state.items()}, tmp_path / "a.pt")
        assert load_weights(network, path).sentence == "loaded 14 of 14 tensors"
        assert same_bits(network, source)
    around = Inside()
    load_weights(around, saved(state, tmp_path / "b.pt"))
    assert same_bits(around.net.body, source)


def test_an_average_of_weights_brings_its_count_which_is_left_out(tmp_path: Path) -> None:
    average = AveragedModel(used(small()))
    network = small()
    loaded = load_weights(network, saved(average.state_dict(), tmp_path / "a.pt"))
    assert same_bits(network, average.module)
    assert loaded.sentence == "loaded 14 of 14 tensors; left out: n_averaged"
    assert loaded.names["1.running_mean"] == "module.1.running_mean"


def test_the_key_chooses_as_for_inspect_stats(tmp_path: Path) -> None:
    first, second = used(small()), used(small())
    path = saved({"model": first.state_dict(), "ema": second.state_dict()}, tmp_path / "a.pt")
    for key, source in ((None, second), ("model", first), ("ema", second)):
        network = small()
        load_weights(network, path, key=key)
        assert same_bits(network, source)
    with open_checkpoint(path, "model") as checkpoint:
        load_weights(network, checkpoint)
    assert same_bits(network, first)


def test_which_of_several_networks_in_a_file_was_taken_is_said(tmp_path: Path) -> None:
    state = used(small()).state_dict()
    path = saved({"model": state, "model_ema": used(small()).state_dict()}, tmp_path / "a.pt")
    of_one = f"loaded {len(state)} of {len(state)} tensors"
    found = load_weights(small(), path)
    other = {"model": "model_ema", "model_ema": "model"}[found.key]
    assert found.sentence == f"{of_one} of {found.key} (--key KEY takes those of {other})"
    assert load_weights(small(), path, key="model").sentence == of_one
    assert load_weights(small(), saved({"model": state}, tmp_path / "b.pt")).sentence == of_one


def test_what_load_state_dict_accepts_is_accepted(tmp_path: Path) -> None:
    source = used(small())
    state = source.state_dict()
    half = {name: value.half() if value.is_floating_point() else value.int() for name, value in state.items()}
    expected = small()
    expected.load_state_dict(half, strict=True)
    network = small()
    load_weights(network, saved(half, tmp_path / "half.pt"))
    assert same_bits(network, expected)
    old = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    expected, network = small(), small()
    expected.load_state_dict(dict(old), strict=True)  # before PyTorch 0.4.1 there were none
    loaded = load_weights(network, saved(old, tmp_path / "old.pt"))
    assert (
        loaded.sentence
        == "loaded 12 of 14 tensors; as they were: 1.num_batches_tracked, 2.1.num_batches_tracked"
    )
    assert [int(network[1].num_batches_tracked), int(expected[1].num_batches_tracked)] == [0, 0]
    for name in old:
        assert torch.equal(network.state_dict()[name], expected.state_dict()[name])


def test_tensors_that_are_one_in_the_network_may_be_one_in_the_file(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
        network[2].weight = network[0].weight
        return network

    source, network = used(tied()), tied()
    state = {name: value for name, value in source.state_dict().items() if name != "2.weight"}
    assert load_weights(network, saved(state, tmp_path / "a.pt")).sentence == "loaded 9 of 9 tensors"
    assert same_bits(network, source)


def test_what_is_missing_left_over_or_different_is_listed_with_the_nearest_name(tmp_path: Path) -> None:
    state = used(small()).state_dict()
    renamed = {name.replace("2.0.weight", "2.0.kernel"): value for name, value in state.items()}
    assert refusal(small(), saved(renamed, tmp_path / "a.pt")) == (
        "does not fit the network: 13 of the network's 14 tensors fit; missing: 2.0.weight (the file has"
        " 2.0.kernel); left over: 2.0.kernel; --partial '!2.0.weight' --partial '!2.0.kernel' loads the rest"
    )
    narrow = {**state, "0.weight": torch.zeros(4, 1, 3, 3), "2.1.weight": torch.zeros(4, dtype=torch.int8)}
    assert refusal(small(), saved(narrow, tmp_path / "b.pt")) == (
        "does not fit the network: 12 of the network's 14 tensors fit; different: 0.weight is float32"
        " (4, 1, 3, 3) in the file and float32 (4, 3, 3, 3) in the network, 2.1.weight is int8 (4,) in the"
        " file and float32 (4,) in the network; --partial '!0.weight' --partial '!2.1.weight' loads the rest"
    )
    extra = {**{f"model.{name}": value for name, value in state.items()}, "loss.weight": torch.ones(3)}
    path = saved({"state_dict": extra}, tmp_path / "c.pt")
    assert refusal(small(), path).endswith("left over: loss.weight; --partial '!loss.*' loads the rest")
    assert load_weights(small(), path, partial=["!loss.*"]).left_over == ("loss.weight",)
    other = build_network("torchvision:resnet18")
    assert refusal(other, saved(state, tmp_path / "d.pt")).startswith(
        "none of its 14 tensors is one of the network's 122: it has 0.weight, 0.bias, 1.weight,"
    )
    deeper = build_network("torchvision:resnet34")
    text = refusal(deeper, saved(build_network("torchvision:resnet18").state_dict(), tmp_path / "e.pt"))
    assert text.endswith("(80 in all); --partial GLOB loads a part")
    assert len(text) < 300


def test_where_no_part_can_be_loaded_none_is_advised(tmp_path: Path) -> None:

    def classifier(num_classes: int) -> nn.Module:
        return nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, num_classes))

    for source, network, said in (
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), small(), "does not fit"),
        (classifier(5), classifier(3), "has 5 classes in the file"),
    ):
        path = saved(source.state_dict(), tmp_path / "a.pt")
        with pytest.raises(MismatchError, match=said) as error:
            load_weights(network, path, partial=None)
        assert str(error.value).endswith("; name with --model the network that the file is of")
        assert "--partial" not in str(error.value)


def test_a_head_of_another_number_of_classes_is_named(tmp_path: Path) -> None:
    source = used(build_network("torchvision:resnet18", {"num_classes": 10}))
    path = saved(source.state_dict(), tmp_path / "a.pt")
    network = build_network("torchvision:resnet18")
    text = refusal(network, path)
    assert text == (
        "fc has 10 classes in the file and 1,000 in the network; give --model-arg num_classes=10 if it takes"
        " that; --partial '!fc.*' loads the rest"
    )
    (glob,) = re.findall("--partial '(.*?)'", text)
    head = network.fc.weight.clone()
    loaded = load_weights(network, path, partial=[glob])
    assert loaded.kept == loaded.left_over == ("fc.weight", "fc.bias")
    assert torch.equal(network.fc.weight, head)
    assert torch.equal(network.layer4[1].conv2.weight, source.layer4[1].conv2.weight)
    # a wider BatchNorm layer is no head
    wide = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(8))
    file = saved(used(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).state_dict(), tmp_path / "b.pt")
    assert refusal(wide, file).startswith(
        "does not fit the network: 3 of the network's 7 tensors fit; different: 1.we"
    )


def test_a_part_that_is_asked_for_has_to_be_there(tmp_path: Path) -> None:
    source = used(small())
    path = saved(source.state_dict(), tmp_path / "a.pt")
    network = small()
    first = network[0].weight.clone()
    loaded = load_weights(network, path, partial=["2.*"])
    assert sorted(loaded.names) == sorted(name for name in source.state_dict() if name.startswith("2."))
    assert torch.equal(network[0].weight, first)
    assert torch.equal(network[2][0].weight, source[2][0].weight)
    assert loaded.to_dict() == {
        "kind": "torch zip",
        "key": "",
        "num_loaded": 7,
        "num_tensors": 14,
        "kept": list(loaded.kept),
        "left_over": list(loaded.kept),
    }
    assert refusal(network, path, "3.*") == (
        "no tensor of the file or the network matches '3.*'; there are 0.weight, 0.bias, 1.weight, 1.bias,"
        " ... (14 in all)"
    )
    assert refusal(network, path, "!*").startswith("none of its 14 tensors is one of")
    bigger = nn.ModuleDict({"body": small(), "head": nn.Linear(2, 2)})
    assert "--partial '!head.*' loads the rest" in refusal(bigger, path)
    assert refusal(bigger, path, "body.*", "head.*").startswith(
        "does not fit the network: 14 of the network's 16"
    )
    for part in (["!head.*"], ["body.*"]):
        bigger = nn.ModuleDict({"body": small(), "head": nn.Linear(2, 2)})
        assert load_weights(bigger, path, partial=part).kept == ("head.weight", "head.bias")
        assert same_bits(bigger["body"], source)


def test_a_network_that_is_not_built_yet_says_so(tmp_path: Path) -> None:
    path = saved(small().state_dict(), tmp_path / "a.pt")
    lazy = nn.Sequential(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4))
    with pytest.raises(
        MismatchError, match=r"tensors without a shape yet, 0.weight, 0.bias; compute a batch"
    ):
        load_weights(lazy, path)


@pytest.mark.parametrize("size", [8, 600])  # 600 * 600 * 4 bytes are more than a megabyte, read in pieces
def test_one_changed_bit_anywhere_is_found(size: int, tmp_path: Path) -> None:
    source = nn.Sequential(nn.Linear(size, size), nn.BatchNorm1d(size))
    path = saved(source.state_dict(), tmp_path / "a.pt")
    content = bytearray(path.read_bytes())
    at = content.find(source[0].weight.detach().numpy().tobytes()) + 4 * size * size - 1
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"a damaged file: the checksum of its entry a/data/0 does not fit"
    ):
        load_weights(source, path)


def test_views_of_one_storage_are_each_loaded(tmp_path: Path) -> None:
    flat = torch.arange(24.0)
    state = {
        "0.weight": flat[:16].view(4, 4).t(),
        "0.bias": flat[16:20],
        "1.weight": flat[20:21].expand(4),
        "1.bias": flat[::6],
        "1.running_mean": flat[2:6],
        "1.running_var": flat[3:7],
    }
    network, expected = (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(2))
    expected.load_state_dict(dict(state), strict=True)
    load_weights(network, saved(state, tmp_path / "a.pt"))
    assert same_bits(network, expected)


def test_no_name_that_a_file_brings_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brought_along.py").write_text("raise AssertionError('a checkpoint was obeyed')\n")
    monkeypatch.syspath_prepend(tmp_path)
    state = used(small()).state_dict()
    content = {"arch": "brought_along:make", "model": "brought_along:make", "state_dict": state}
    network = small()
    load_weights(network, saved(content, tmp_path / "a.pt"))
    assert "brought_along" not in sys.modules
    assert torch.equal(network[0].weight, state["0.weight"])


def test_no_changed_file_does_more_than_be_refused(tmp_path: Path) -> None:
    """Structure and bytes changed by chance: each is loaded or refused, with names of any length cut."""
    good = {"state_dict": dict(used(small()).state_dict()), "epoch": 3}
    path, outcomes = tmp_path / "a.pt", set()
    for number in range(120):
        rng = random.Random(number)
        if number % 2:
            torch.save(good, path)
            content = bytearray(path.read_bytes())
            for _ in range(rng.randrange(1, 5)):
                content[rng.randrange(len(content))] = rng.randrange(256)
            path.write_bytes(content)
        else:
            try:
                torch.save(mutated(good, rng, tensors=True), path)
            except (TypeError, RuntimeError, UnicodeEncodeError):  # nobody could save such a thing
                continue
        try:
            load_weights(small(), path)
            outcomes.add("loaded")
        except CheckpointError as error:
            outcomes.add(type(error).__name__)
            assert len(str(error)) < 2000
    assert outcomes >= {"loaded", "CheckpointError", "MismatchError"}


@pytest.mark.slow
def test_loading_holds_no_copy_of_the_network(tmp_path: Path) -> None:
    """Peak memory of a process of its own: the network, and little more than one piece of the file."""
    import subprocess

    program = """
import sys, torch
from torch import nn
from bncli.checkpoints import load_weights
with torch.device("meta"):
    net = nn.Sequential(*(nn.Sequential(nn.Linear(2048, 2048), nn.BatchNorm1d(2048)) for _ in range(16)))
net = net.to_empty(device="cpu")
for value in net.state_dict().values():
    value.zero_()
path = sys.argv[1]
peak = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
if sys.argv[2] == "save":
    torch.save(net.state_dict(), path)
else:
    before = peak()
    load_weights(net, path) if sys.argv[2] == "ours" else net.load_state_dict(torch.load(path))
    print(peak() - before)
"""
    path = str(tmp_path / "large.pt")

    def run(what: str) -> str:
        command = [sys.executable, "-c", program, path, what]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    run("save")
    kib = 16 * 2048 * 2048 * 4 // 1024
    assert int(run("pytorch")) > 0.9 * kib
    assert int(run("ours")) < 0.1 * kib


def test_a_file_of_another_framework_is_refused_with_what_makes_one_of_it() -> None:
    files = Path(__file__).parents[1] / "frameworks" / "files"
    network = build_network("torchvision:resnet18", {})
    with pytest.raises(MismatchError, match=r"a file of Flax, .* run bncli convert .*nnx\.msgpack -o NEW"):
        load_weights(network, files / "flax" / "nnx.msgpack")
    with pytest.raises(MismatchError, match=r"a file of ONNX .*; give the checkpoint that it was exported"):
        load_weights(network, files / "onnx" / "dynamo.onnx")
