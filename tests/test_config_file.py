import math
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from bncli.config import (
    Cifar10Config,
    Config,
    ConvNetConfig,
    ImageFolderConfig,
    NamedModelConfig,
    SyntheticConfig,
    TrainConfig,
)
from bncli.config_file import config_from_dict, dump_config, load_config
from bncli.errors import ConfigError

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def problems(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text), list(overrides))
    assert "\n" not in str(caught.value)
    return caught.value.problems


def test_no_file_gives_the_defaults() -> None:
    assert load_config(None) == Config()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_is_valid_and_tells_how_to_launch_it(path: Path) -> None:
    load_config(path)
    (launch,) = re.findall(r"^# Launch: (.*)$", path.read_text(), re.MULTILINE)
    command = "bncli train" if path.stem == "quickstart" else f"bncli train {path.stem}"
    assert launch.split(" --")[0] == command


def test_the_quickstart_and_no_file_are_the_same(tmp_path: Path) -> None:
    overrides = ["data.num_train=300", "train.epochs=2", "model.batch_norm.momentum=0.3"]
    assert load_config("quickstart", overrides) == load_config(None, overrides)
    assert load_config("quickstart") == Config()


def test_without_a_file_the_keys_of_the_quickstart_can_be_changed() -> None:
    config = load_config(None, ["data.num_train=300", "train.epochs=2"])
    assert config.data == SyntheticConfig(num_train=300)
    assert config.train == TrainConfig(epochs=2)
    assert config.model == ConvNetConfig()
    assert load_config(None, ["data.root=x", "data.name=imagefolder"]).data == ImageFolderConfig(root="x")


def test_without_a_file_a_wrong_key_is_said_of_the_quickstart() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["data.root=x"])
    assert str(caught.value).startswith(
        "quickstart with --set: data.root: the data set synthetic has no such"
    )
    with pytest.raises(ConfigError, match="did you mean 'num_train'"):
        load_config(None, ["data.num_trains=300"])


def test_there_are_the_three_promised_configurations() -> None:
    assert {path.stem for path in CONFIGS} >= {"quickstart", "cifar10", "imagefolder"}


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.0e-5", "+1e-05", "0.00001", ".1e-4"])
def test_every_way_to_write_a_small_number_is_a_number(tmp_path: Path, text: str) -> None:
    config = load_config(write(tmp_path, f"model: {{batch_norm: {{eps: {text}}}}}"))
    assert config.model.batch_norm.eps == 1e-5


def test_text_that_only_looks_like_a_number_stays_text(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, 'data: {name: cifar10, root: "1e5", archive: e5}'))
    assert (config.data.root, config.data.archive) == ("1e5", "e5")


def test_all_problems_are_reported_at_once_with_their_dotted_keys(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        "train: {epochs: '3', lerning_rate: 0.1, momentum: 2, batch_size: yes}\nmodel: {widths: [8, x]}",
    )
    assert {text.split(":")[0] for text in found} == {
        "train.epochs",
        "train.lerning_rate",
        "train.momentum",
        "train.batch_size",
        "model.widths.1",
    }


def test_an_unknown_key_is_answered_with_the_nearest_known_one(tmp_path: Path) -> None:
    assert problems(tmp_path, "train: {lerning_rate: 1}") == [
        "train.lerning_rate: unknown key; did you mean 'learning_rate'?"
    ]
    assert "'eps'" in problems(tmp_path, "model: {batch_norm: {epss: 1}}")[0]
    assert "'root'" in problems(tmp_path, "data: {name: cifar10, rot: x}")[0]
    assert "known keys: data, augment" in problems(tmp_path, "zzzzz: 1")[0]


def test_a_key_that_stands_twice_is_an_error_with_both_lines(tmp_path: Path) -> None:
    assert (
        "'epochs' stands twice (lines 2 and 3)" in problems(tmp_path, "train:\n  epochs: 1\n  epochs: 2\n")[0]
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "empty"),
        ("- 1\n- 2\n", "found a list"),
        ("just text", "found a str"),
        ("a: [1", "no valid YAML"),
        ("data: 3", "data: expected a section with keys, found 3"),
        ("data: {name: imagenet}", "unknown data set 'imagenet'; known: synthetic, cifar10, imagefolder"),
        ("data: {root: x}", "data.name: missing"),
        ("train:", "train: expected a section"),
        ("model: {widths: []}", "model.widths"),
        ("model: {widths: 8}", "model.widths: must be a list, not 8"),
        ("train: {learning_rate: .inf}", "train.learning_rate"),
        ("train: {learning_rate: .nan}", "train.learning_rate"),
        ("model: {batch_norm: {momentum: 1.5}}", "model.batch_norm.momentum"),
        ("x: !!python/object/apply:os.getcwd []", "no valid YAML"),
        ("[" * 3000, "nested deeper than 20 levels"),
    ],
)
def test_a_bad_file_is_answered_with_one_line(tmp_path: Path, text: str, expected: str) -> None:
    found = problems(tmp_path, text)
    assert len(found) == 1
    assert expected in found[0]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path, reason in (
        (tmp_path / "missing.yaml", "no such file"),
        (tmp_path, "a folder, no configuration"),
    ):
        with pytest.raises(ConfigError, match=reason) as caught:
            load_config(path)
        assert caught.value.source == str(path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ConfigError, match="no YAML text"):
        load_config(tmp_path / "binary.yaml")


def test_a_giant_file_is_refused_unread(tmp_path: Path) -> None:
    assert "larger than" in problems(tmp_path, "# " + "x" * (1 << 20))[0]


def test_overrides_reach_every_depth_and_are_checked_as_the_file_is(tmp_path: Path) -> None:
    path = write(tmp_path, "train: {epochs: 3}")
    config = load_config(
        path, ["model.batch_norm.momentum=null", "train.learning_rate=1e-3", "model.widths=[4, 8]"]
    )
    assert config.model.batch_norm.momentum is None
    assert config.train.learning_rate == 1e-3
    assert config.model.widths == (4, 8)
    assert config.train.epochs == 3
    (found,) = problems(tmp_path, "train: {epochs: 3}", "train.epochs=x")
    assert "train.epochs: must be a whole number, not 'x'" in found
    assert "did you mean" in problems(tmp_path, "train: {epochs: 3}", "train.epoch=4")[0]


@pytest.mark.parametrize("override", ["train.epochs", "=3", "train.=3", ".x=3", "train.epochs.deep=3"])
def test_an_override_that_is_none_is_refused(tmp_path: Path, override: str) -> None:
    assert len(problems(tmp_path, "train: {epochs: 3}", override)) == 1


def test_another_data_set_by_override_drops_the_keys_of_the_former(tmp_path: Path) -> None:
    path = write(tmp_path, "data: {name: cifar10, root: here, url: 'http://mirror/x'}")
    assert load_config(path, ["data.name=synthetic", "data.num_train=50"]).data.num_train == 50
    assert load_config(path, ["data.name=imagefolder"]).data.root == "data"
    assert load_config(path, ["data.root=there"]).data.url == "http://mirror/x"


NUMBERS = st.floats(min_value=1e-12, max_value=1.0, exclude_min=True)


@settings(deadline=None)
@given(
    eps=NUMBERS, momentum=st.none() | NUMBERS, widths=st.lists(st.integers(1, 512), min_size=1, max_size=5)
)
def test_a_dumped_configuration_is_read_back_equal_by_any_yaml_reader(
    eps: float, momentum: float | None, widths: list[int]
) -> None:
    values = {"model": {"batch_norm": {"eps": eps, "momentum": momentum}, "widths": widths}}
    config = config_from_dict(values, source="test")
    assert "!!" not in dump_config(config)  # a tag would be correct, but nothing to show a person
    plain = yaml.safe_load(dump_config(config))
    assert math.isclose(plain["model"]["batch_norm"]["eps"], eps, rel_tol=0)
    assert config_from_dict(plain, source="test") == config


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().train.epochs = 3  # type: ignore[misc]


def test_a_name_that_was_not_finished_stays_text() -> None:
    assert load_config(None, ["model.name=torchvision:"]).model.name == "torchvision:"


def test_a_section_keeps_its_keys_where_its_name_stays_or_its_code_has_moved(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "data: {name: cifar10, root: there}\nmodel: {name: net.py:net, arguments: {width: 5}}\n"
    )
    for name in (f"{tmp_path}/net.py:net", "elsewhere/net.py:net"):
        config = load_config(tmp_path / "a.yaml", [f"model.name={name}", "data.name=cifar10"])
        assert isinstance(config.model, NamedModelConfig)
        assert isinstance(config.data, Cifar10Config)
        assert (config.model.arguments, config.data.root) == ({"width": 5}, "there")
    other = load_config(tmp_path / "a.yaml", ["model.name=net.py:other"]).model
    assert isinstance(other, NamedModelConfig)
    assert other.arguments == {}
