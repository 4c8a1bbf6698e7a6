"""The configuration with every key's meaning: as YAML, as a JSON schema, and key by key."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bncli.config import Config
from bncli.config_file import comments_in, dump_config, load_config
from bncli.errors import ConfigError
from bncli.explained_config import (
    OTHER_DATA_SETS,
    ExplainedKey,
    config_schema,
    explain_config,
    explained_keys,
)

NAMES = sorted(path.stem for path in (Path(__file__).parent.parent / "configs").glob("*.yaml"))


def keys_in(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys of a configuration as any YAML reader sees it."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from keys_in(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


@pytest.mark.parametrize("name", NAMES)
def test_an_explained_configuration_is_equal_to_the_one_that_it_explains(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    written = tmp_path / "my.yaml"
    written.write_text(explain_config(config, header=["# mine"], comments={}))
    assert load_config(written) == config
    assert yaml.safe_load(written.read_text()) == yaml.safe_load(dump_config(config))  # any reader's


@pytest.mark.parametrize("name", NAMES)
def test_above_every_key_stands_its_meaning_within_80_columns(name: str) -> None:
    lines = explain_config(load_config(name), header=[], comments={}).splitlines()
    assert max(map(len, lines)) <= 80
    keys = [number for number, line in enumerate(lines) if line and not line.lstrip().startswith("#")]
    assert len(keys) > 40
    for number in keys:
        indent = len(lines[number]) - len(lines[number].lstrip())
        assert lines[number - 1].startswith(" " * indent + "# ")
        assert lines[number - 1].endswith(".")


@settings(deadline=None)
@example(root="a\x85b\u2028c", momentum=0.1)  # line breaks of YAML 1.1
@example(root="a\nb: c\n\n # d", momentum=0.1)
@given(root=st.text(st.characters(codec="utf-8"), max_size=60), momentum=st.floats(0, 1))
def test_any_text_and_number_is_read_back(root: str, momentum: float) -> None:
    values = {
        "data": {"name": "imagefolder", "root": root},
        "model": {"batch_norm": {"momentum": momentum}},
    }
    config = Config.model_validate(values)
    text = explain_config(config, header=[], comments={})
    assert Config.model_validate(yaml.safe_load(text)) == config


def test_a_text_of_several_lines_stays_below_its_key() -> None:
    config = Config.model_validate({"data": {"name": "imagefolder", "root": "a\nb"}})
    lines = explain_config(config, header=[], comments={}).splitlines()
    assert {line for line in lines if line and line[0] not in " #"} == {
        "data:", "augment:", "model:", "train:", "runtime:"
    }  # fmt: skip


def test_comments_behind_values_stay_with_their_keys() -> None:
    text = "train:\n  epochs: 3  # few\n  seed: 7\nmodel: {widths: [4]}  # narrow\n"
    found = comments_in(text)
    assert found["train.epochs"] == "# few"
    assert "train.seed" not in found
    explained = explain_config(Config(), header=[], comments={"train.epochs": "# few"})
    assert "  epochs: 5  # few\n" in explained


def test_a_default_is_named_where_the_value_is_another() -> None:
    config = load_config(None, ["train.epochs=3", "model.widths=[4]"])
    text = explain_config(config, header=[], comments={})
    assert text.count("Default:") == 2
    assert "Default: 5.\n  epochs: 3\n" in text
    assert "Default: [16, 32, 64].\n  widths: [4]\n" in text


def test_every_key_of_every_data_set_is_explained() -> None:
    wanted = set()
    for name in ("synthetic", "cifar10", "imagefolder", "torchvision:SVHN"):
        text = dump_config(load_config(None, [f"data.name={name}"]))
        wanted |= set(keys_in(yaml.safe_load(text)))
    named = load_config(None, ["model.name=torchvision:resnet18"])
    wanted |= {f"model.{key}" for key in named.model.model_dump()}
    wanted |= {"data.arguments"}
    found = explained_keys()
    assert {key.key for key in found} == wanted
    assert all(len(key.meaning) > 10 and key.meaning.endswith(".") for key in found)
    assert {key.data_set for key in found if key.key == "data.root"} == {
        *("cifar10", "imagefolder", "other data sets")
    }
    assert {key.network for key in found if key.key == "model.name"} == {"convnet", "other networks"}
    assert {key.network for key in explained_keys("batch_norm")} == {"convnet"}
    assert {key.network for key in explained_keys("train")} == {None}


def test_a_key_is_found_by_its_whole_name_by_its_end_and_by_its_section() -> None:
    assert [key.key for key in explained_keys("train.momentum")] == ["train.momentum"]
    assert [key.key for key in explained_keys("momentum")] == ["model.batch_norm.momentum", "train.momentum"]
    assert {key.key for key in explained_keys("batch_norm")} == {
        f"model.batch_norm.{key}" for key in type(Config().model.batch_norm).model_fields
    }
    assert explained_keys("oment") == []


def accepts(key: ExplainedKey, value: object) -> bool:
    name = "torchvision:SVHN" if key.data_set == OTHER_DATA_SETS else key.data_set
    data = [f"data.name={name}"] if name else []
    try:
        load_config(None, [*data, f"{key.key}={value}"])
    except ConfigError:
        return False
    return True


NUMERIC = [key for key in explained_keys() if key.allowed.startswith(("number", "whole number"))]


@pytest.mark.parametrize("key", NUMERIC, ids=lambda key: f"{key.key}-{key.data_set}")
def test_the_range_that_is_said_is_the_range_that_is_taken(key: ExplainedKey) -> None:
    step = 1.0 if key.allowed.startswith("whole number") else 1e-6
    checked = 0
    for part in key.allowed.split(", "):
        word, _, number = part.rpartition(" ")
        if word not in {"at least", "above", "at most", "below"}:
            continue
        bound, outwards = float(number.replace(",", "")), step if word in {"at most", "below"} else -step
        included = word in {"at least", "at most"}
        as_text = "{:.0f}" if step == 1 else "{!r}"
        assert accepts(key, as_text.format(bound)) == included
        assert not accepts(key, as_text.format(bound + outwards))
        assert accepts(key, as_text.format(bound - outwards))
        checked += 1
    assert checked
    assert accepts(key, "null") == ("or null" in key.allowed)


def test_choices_that_are_said_are_the_choices_that_are_taken() -> None:
    (flip,) = explained_keys("augment.flip")
    assert flip.allowed == "none, random or alternating"
    assert [accepts(flip, word) for word in ("none", "random", "alternating", "all")] == [True] * 3 + [False]


def test_the_schema_tells_an_editor_every_key_with_its_meaning_and_forbids_others() -> None:
    schema = config_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["$defs"].pop("JsonValue") == {}  # anything
    sections = [schema, *schema["$defs"].values()]
    for section in sections:
        assert section["additionalProperties"] is False
        for name, key in section["properties"].items():
            below = schema["$defs"].get(key.get("$ref", "").rpartition("/")[2], {})
            assert key.get("description") or below.get("description"), name
    for kind in ("SyntheticConfig", "Cifar10Config", "ImageFolderConfig"):
        assert schema["$defs"][kind]["required"] == ["name"]  # a file may not leave it out either
