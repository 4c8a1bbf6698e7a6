"""Names of built-in configurations beside paths of files."""

from pathlib import Path

import pytest

from bncli import builtin_configs
from bncli.builtin_configs import describe_builtin_config, find_config_file
from bncli.config_file import load_config
from bncli.errors import ConfigError

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refusal(name: str | Path) -> str:
    with pytest.raises(ConfigError) as caught:
        find_config_file(name)
    assert caught.value.source == str(name)
    (problem,) = caught.value.problems
    return problem


def test_every_shipped_file_has_a_name_in_any_folder() -> None:
    shipped = sorted(CONFIGS.glob("*.yaml"))
    assert {"cifar10", "imagefolder", "quickstart", "resnet18", "speedrun"} <= {path.stem for path in shipped}
    for path in shipped:
        assert find_config_file(path.stem) == path
        assert load_config(path.stem) == load_config(path)


def test_in_an_installed_wheel_the_names_are_those_of_the_files_inside_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "bncli"
    (package / "builtin_configs").mkdir(parents=True)
    (package.parent / "configs").mkdir()  # somebody else's, beside the packages
    (package.parent / "configs" / "foreign.yaml").write_text("")
    inside = package / "builtin_configs" / "only.yaml"
    inside.write_text("train: {epochs: 7}")
    monkeypatch.setattr(builtin_configs, "_PACKAGE", package)
    assert builtin_configs.builtin_configs() == {"only": inside}
    assert load_config("only").train.epochs == 7


def test_a_file_goes_before_a_name_and_a_folder_does_not() -> None:
    Path("speedrun").mkdir()
    assert load_config("speedrun").train.optimizer == "muon"
    Path("cifar10").write_text("train: {epochs: 7}")
    assert load_config("cifar10").train.epochs == 7
    assert load_config("./cifar10").train.epochs == 7


def test_no_name_at_all_is_the_quickstart_whatever_files_there_are() -> None:
    Path("quickstart").write_text("train: {epochs: 7}")
    assert load_config("quickstart").train.epochs == 7
    assert load_config(None).train.epochs == 5


@pytest.mark.parametrize(
    ("typed", "meant"), [("cifar", "cifar10"), ("QUICKSTART", "quickstart"), ("imagefolders", "imagefolder")]
)
def test_a_misspelt_name_is_answered_with_the_nearest_and_all_others(typed: str, meant: str) -> None:
    assert refusal(typed) == (
        f"no such file or built-in configuration; did you mean {meant!r}? "
        "built-in: cifar10, imagefolder, quickstart, resnet18, speedrun"
    )


def test_a_name_that_resembles_none_is_answered_with_all() -> None:
    assert refusal("transformer").endswith(
        "configuration; built-in: cifar10, imagefolder, quickstart, resnet18, speedrun"
    )


@pytest.mark.parametrize("typed", ["cifar10.yaml", "configs/cifar10.yaml", "cifar10.yml", "x/cifar10"])
def test_a_missing_file_of_a_built_in_name_is_answered_with_that_name(typed: str) -> None:
    assert refusal(typed) == "no such file; the built-in configuration is called cifar10"


@pytest.mark.parametrize("typed", ["my.yaml", "some/where", "/no/where.yml"])
def test_another_missing_file_is_just_missing(typed: str) -> None:
    assert refusal(Path(typed)) == "no such file"


def test_each_says_what_for_how_long_how_to_launch_it_and_what_to_change() -> None:
    for path in CONFIGS.glob("*.yaml"):
        about = describe_builtin_config(path)
        assert list(about) == ["what", "time", "launch", "change"]
        assert all(about.values())
        assert path.read_text().startswith(f"# What: {about['what']}\n# Time: {about['time']}\n")
