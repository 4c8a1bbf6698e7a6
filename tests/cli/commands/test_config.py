import json
from pathlib import Path

import pytest
import yaml

from bncli.config import Config
from bncli.config_file import load_config
from tests.conftest import Bncli

CONFIGS = Path(__file__).parent.parent.parent.parent / "configs"


def test_without_a_name_every_built_in_configuration_is_listed_within_80_columns(bncli: Bncli) -> None:
    outcome = bncli("config")
    assert (outcome.code, outcome.err) == (0, "")
    listed = [line.split()[0] for line in outcome.out.split("\n\n")[0].splitlines() if line[0] != " "]
    assert listed == sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    assert max(map(len, outcome.out.splitlines())) <= 80
    found = bncli("config", "--json").json["configurations"]
    assert [each["name"] for each in found] == listed
    assert all(Path(each["path"]).is_file() and each["launch"].startswith("bncli train") for each in found)


def test_a_written_configuration_is_trained_like_the_built_in_one(
    bncli: Bncli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = bncli("config", "quickstart")
    assert outcome.out.startswith("# What: ")
    Path("my.yaml").write_text(outcome.out)
    few = ("--set", "data.num_train=300", "--set", "data.num_test=20", "--dry-run", "--json")
    mine, built_in, none = (bncli("train", *name, *few) for name in (["my.yaml"], ["quickstart"], []))
    assert mine.code == built_in.code == none.code == 0
    assert mine.json == built_in.json == none.json


def test_a_written_configuration_keeps_the_comments_of_the_shipped_one(bncli: Bncli) -> None:
    outcome = bncli("config", "speedrun")
    assert "  activation: gelu  # 8 epochs of one seed ended higher than with ReLU\n" in outcome.out
    assert yaml.safe_load(outcome.out)["train"]["batch_size"] == 2000


def test_a_file_of_ones_own_is_completed(bncli: Bncli, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("# mine\ntrain: {epochs: 3}\n")
    outcome = bncli("config", path)
    assert outcome.out.startswith("# mine\n")
    assert yaml.safe_load(outcome.out)["train"]["epochs"] == 3
    assert bncli("config", path, "--json").json == load_config(path).model_dump(mode="json")


def test_output_goes_to_a_new_file_only(bncli: Bncli, tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    outcome = bncli("config", "quickstart", "-o", path)
    assert (outcome.code, outcome.out, outcome.err) == (0, "", f"bncli: wrote {path}\n")
    assert load_config(path) == Config()
    before = path.read_bytes()
    again = bncli("config", "cifar10", "-o", path)
    assert (again.code, again.out) == (2, "")
    assert f"{path}: exists already; give another name" in again.err
    assert path.read_bytes() == before
    nowhere = bncli("config", "cifar10", "-o", tmp_path / "no" / "my.yaml")
    assert nowhere.code == 2
    assert nowhere.err.count("\n") == 1


def test_a_key_is_explained_with_its_range_and_default(bncli: Bncli) -> None:
    outcome = bncli("config", "momentum")
    assert (
        "model.batch_norm.momentum (convnet): number, at least 0, at most 1, or null;\ndefault 0.1\n"
        in outcome.out
    )
    assert "train.momentum: number, at least 0, below 1; default 0.9\n" in outcome.out
    (paragraph,) = [one for one in bncli("config", "num_train").out.split("\n\n") if "(synthetic)" in one]
    assert " ".join(paragraph.split()).startswith(
        "data.num_train (synthetic): whole number, at least 10, at most 1,000,000; default 10,000 "
    )
    (key,) = bncli("config", "train.epochs", "--json").json["keys"]
    assert (key["key"], key["default"]) == ("train.epochs", 5)


def test_a_name_of_nothing_is_answered_with_the_nearest_key_or_name(bncli: Bncli) -> None:
    for typed, meant in (("trian.epochs", "train.epochs"), ("cifr10", "cifar10")):
        outcome = bncli("config", typed)
        assert (outcome.code, outcome.out) == (2, "")
        assert f"{typed}: no such file, built-in configuration, section or key; did you mean {meant!r}?" in (
            outcome.err
        )
        assert outcome.err.count("\n") == 1


def test_the_schema_is_one_json_document_and_takes_no_name(bncli: Bncli) -> None:
    schema = json.loads(bncli("config", "--schema").out)
    assert set(schema["properties"]) == set(Config.model_fields)
    refused = bncli("config", "cifar10", "--schema")
    assert refused.code == 2
    assert "leave NAME out" in refused.err
