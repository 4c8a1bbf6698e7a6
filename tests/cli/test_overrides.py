"""What `--set`, `--device` and `--data-root` do on each command, and that no key is taken in vain."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from bncli.cli.overrides import EFFECTIVE, effective_overrides, has_effect
from bncli.config import (
    BatchNormConfig,
    Cifar10Config,
    Config,
    ConvNetConfig,
    ImageFolderConfig,
    Section,
    SyntheticConfig,
)
from bncli.config_file import load_config
from bncli.errors import ConfigError
from tests.conftest import Bncli

FEW = ("--num-images", 10, "--batch-sizes", 2)
COMMANDS: dict[str, tuple[object, ...]] = {
    "eval": ("eval", "CHECKPOINT", *FEW, "--gap", "--num-calibration-images", 20),
    "report": ("report", "CHECKPOINT", "-o", "report.html", "--measure", "--num-images", 20),
    "predict": ("predict", "CHECKPOINT", "IMAGE"),
    "recalibrate": ("recalibrate", "CHECKPOINT", "-o", "new.pt", "--method", "precise"),
    "demo CHECKPOINT": ("demo", "CHECKPOINT", "--num-images", 20),
    "bench eval": ("bench", "eval", "CHECKPOINT", "--rounds", 1, "--calls", 1, "--batches", 1, "--starts", 0),
    "bench train": ("bench", "train", "CONFIG", "--rounds", 1, "--steps", 1),
}
FULL_SIZE = {f"augment.{kind}_{what}" for kind in ("small", "crop") for what in ("epochs", "size")}
# read, and of no influence: smaller images are switched off, and bench train looks for speed alone
READ_IN_VAIN = {
    "eval": {"runtime.compile"},
    "report": {"runtime.compile"},
    "predict": {"runtime.compile"},
    "recalibrate": {"runtime.compile"},
    "demo CHECKPOINT": {"runtime.compile", *FULL_SIZE},
    "bench eval": {"runtime.compile", "data.num_train"},
    "bench train": {
        *FULL_SIZE,
        *("train.seed", "train.epochs", "train.warmup"),
        *("train.decay", "train.learning_rate", "train.bias_learning_rate", "train.head_learning_rate"),
        *("runtime.eval_batch_size", "data.num_test"),
    },
}
# of the model's kinds that of the runs here, bncli's own network
SECTIONS = {name: field.annotation for name, field in Config.model_fields.items() if name != "data"} | {
    "model": ConvNetConfig
}
KINDS = {"data.name", "model.name"}  # which pydantic reads
DATA = (SyntheticConfig, Cifar10Config, ImageFolderConfig)


def leaves(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}"


ALL_KEYS = {key for data in DATA for key in leaves(data, "data")} | {
    key for name, section in SECTIONS.items() for key in leaves(section, name)
}


@pytest.fixture
def typed(finished_run: Path, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The words of a command, with files that are there."""
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")
    files = {"CHECKPOINT": finished_run / "last.pt", "IMAGE": tmp_path / "image.png", "CONFIG": tiny_config}
    return lambda command: [files.get(str(word), word) for word in COMMANDS[command]]


@pytest.fixture
def keys_read(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The keys that are read from now on of any configuration but the one that a checkpoint records."""
    import bncli.recorded_config as module

    names = {section: name for name, section in SECTIONS.items()} | dict.fromkeys(DATA, "data")
    names[BatchNormConfig] = "model.batch_norm"
    recorded: list[object] = []
    read: set[str] = set()

    def spy(self: Section, name: str) -> Any:
        known = name in type(self).model_fields and type(self) in names
        if known and not any(self is one for one in recorded):
            read.add(f"{names[type(self)]}.{name}")
        return object.__getattribute__(self, name)

    follow: Callable[..., Any] = module.follow_config

    def follow_config(config: Config, *arguments: object, **options: object) -> object:
        recorded.extend([config.model, config.model.batch_norm, config.data, config.augment])
        recorded.extend([config.train, config.runtime])
        return follow(config, *arguments, **options)

    monkeypatch.setattr(module, "follow_config", follow_config)
    monkeypatch.setattr(Section, "__getattribute__", spy, raising=False)
    return read


# a plain loop beside ours needs a process of its own, which imports torch
SLOW = [pytest.param(name, marks=pytest.mark.slow) if name == "bench train" else name for name in COMMANDS]


@pytest.mark.parametrize("command", SLOW)
def test_a_command_takes_just_the_keys_that_its_code_reads(
    bncli: Bncli, typed: Any, keys_read: set[str], command: str
) -> None:
    outcome = bncli(*typed(command))
    assert outcome.code in {0, 1}, outcome.err
    read = {key for key in keys_read - READ_IN_VAIN[command] if key in ALL_KEYS - KINDS}
    # files lie elsewhere, and none are read here
    other_data = {key for key in ALL_KEYS if key.startswith("data.")} - set(leaves(SyntheticConfig, "data"))
    taken = {key for key in ALL_KEYS - other_data - KINDS if has_effect(key, command)}
    # where a checkpoint records it, it is refused with that reason
    assert read - {"data.normalization"} == taken - {"data.normalization"}


@pytest.mark.parametrize("command", ["eval", "bench eval"])
def test_a_normalization_that_the_checkpoint_records_is_refused(bncli, finished_run, command):
    outcome = bncli(*command.split(), finished_run / "last.pt", "--set", "data.normalization=half")
    assert outcome.code == 2
    assert "data.normalization: the checkpoint records it" in outcome.err


@pytest.mark.parametrize(
    ("command", "given", "named"),
    [
        ("eval", "train.epochs=3", "train.epochs"),
        ("eval", "augment.flip=none", "augment.flip"),
        ("eval", "model={widths: [2]}", "model.widths"),
        ("eval", "train={}", "train"),
        ("predict", "train.epochs=3", "train.epochs"),
        ("predict", "data.root=elsewhere", "data.root"),
        ("predict", "runtime.eval_batch_size=2", "runtime.eval_batch_size"),
        ("recalibrate", "model.batch_norm.momentum=0.5", "model.batch_norm.momentum"),
        ("demo CHECKPOINT", "train.epochs=3", "train.epochs"),
        ("bench eval", "data.num_train=50", "data.num_train"),
        ("bench train", "train.epochs=3", "train.epochs"),
    ],
)
def test_a_key_that_can_change_nothing_is_refused_by_name(
    bncli: Bncli, typed: Any, command: str, given: str, named: str
) -> None:
    outcome = bncli(*typed(command), "--set", given)
    assert (outcome.code, outcome.out) == (2, "")
    (line,) = outcome.err.splitlines()
    assert f"--set {named}: changes nothing that this command computes; these keys do: " in line
    for effective in EFFECTIVE[command]:
        assert effective in line


def test_doctor_takes_only_what_says_where_data_lie(bncli: Bncli) -> None:
    outcome = bncli("doctor", "--set", "runtime.device=cpu", "--set", "train.epochs=1")
    assert outcome.code == 2
    assert "--set runtime.device, train.epochs: change nothing" in outcome.err
    assert bncli("doctor", "x.pt", "--data-root", "data").code == 2


@pytest.mark.parametrize("command", ["eval", "predict", "recalibrate"])
def test_device_is_the_key_of_that_name(bncli: Bncli, typed: Any, command: str) -> None:
    option = bncli(*typed(command), "--json", "--device", "cuda:97")
    key = bncli(*typed(command), "--json", "--set", "runtime.device=cuda:97")
    assert option.code == key.code == 2
    assert option.err == key.err
    assert "'cuda:97' asked for" in option.err
    there = bncli(*typed(command), "--json", "--device", "cpu", "--set", "runtime.device=cpu")
    assert there.json["runtime"]["device"] == "cpu"


def test_data_root_is_the_key_of_that_name(bncli: Bncli, typed: Any, tmp_path: Path) -> None:
    sets = ("--set", "data.name=cifar10")
    option = bncli(*typed("eval"), *sets, "--data-root", tmp_path / "there")
    key = bncli(*typed("eval"), *sets, "--set", f"data.root={tmp_path / 'there'}")
    assert option.code == key.code == 2
    assert option.err == key.err
    assert str(tmp_path / "there") in option.err


@pytest.mark.parametrize(
    "words", [("eval", "CHECKPOINT"), ("train", "CONFIG", "--dry-run"), ("bench", "train", "CONFIG")]
)
def test_a_data_set_that_is_drawn_has_no_root(
    bncli: Bncli, finished_run: Path, tiny_config: Path, words: tuple[str, ...]
) -> None:
    files = {"CHECKPOINT": finished_run / "last.pt", "CONFIG": tiny_config}
    outcome = bncli(*(files.get(word, word) for word in words), "--data-root", "data")
    assert outcome.code == 2
    assert "the data set synthetic has no such key" in outcome.err
    assert "cifar10 and imagefolder have it" in outcome.err


@pytest.mark.parametrize("sets", [["runtime.device=cuda"], ["runtime={device: cuda}"]])
def test_two_values_of_one_key_are_refused(sets: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"--device: it says 'cpu', but --set runtime.device says 'cuda'"):
        effective_overrides("eval", sets, device="cpu")


@pytest.mark.parametrize(
    "name",
    [
        "no",
        "1e3",
        "2024",
        "~",
        "",
        'a "b" \\ c',
        "\u00fc \U0001f600",
        "x: y",
        " lead",
        "\x07",
        "#",
        "\udcff",
        "{a}",
    ],
)
def test_a_folder_may_have_any_name(name: str) -> None:
    """What YAML would read as a number, a truth value or nothing is a name here."""
    overrides = effective_overrides("train", ["data.name=cifar10"], data_root=name)
    assert load_config(None, overrides).data == Cifar10Config(root=name)
