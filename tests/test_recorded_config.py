"""What of a recorded configuration is followed: every field has been thought of, and the bounds hold."""

import os

import pytest
from pydantic import BaseModel

from bncli.config import (
    Cifar10Config,
    Config,
    ConvNetConfig,
    ImageFolderConfig,
    NamedDataConfig,
    NamedModelConfig,
    RuntimeConfig,
    SyntheticConfig,
    TrainConfig,
)
from bncli.errors import ConfigError
from bncli.recorded_config import BOUNDED, FOLLOWED, PLACES, UNUSED, follow_config, follow_run

DATA = (SyntheticConfig, Cifar10Config, ImageFolderConfig, NamedDataConfig)
SECTIONS = {
    name: {"data": DATA, "model": (ConvNetConfig, NamedModelConfig)}.get(name, (field.annotation,))
    for name, field in Config.model_fields.items()
}
ALL_KEYS = {
    f"{name}.{key}" for name, kinds in SECTIONS.items() for kind in kinds for key in kind.model_fields
}
STRANGE = Config(
    data=Cifar10Config(root="/a", url="http://a.example/x", archive="/b"),
    runtime=RuntimeConfig(threads=1024, eval_batch_size=1_000_000, device="cuda:97", precision="bfloat16"),
    train=TrainConfig(batch_size=1_000_000, epochs=7),
)


def test_every_key_is_followed_bounded_a_place_or_unused():
    groups = [
        {key for key in ALL_KEYS if key in FOLLOWED or key.split(".")[0] in FOLLOWED} - BOUNDED,
        BOUNDED,
        set(PLACES),
        UNUSED,
    ]
    assert set().union(*groups) == ALL_KEYS
    assert sum(map(len, groups)) == len(ALL_KEYS)
    for name in FOLLOWED - ALL_KEYS:
        assert all(issubclass(kind, BaseModel) for kind in SECTIONS[name])


def test_every_text_of_the_configuration_is_a_name_or_a_place():
    """The oracle for places: a key that can hold any text may name anything outside the file."""
    free = {
        key
        for section, models in SECTIONS.items()
        for model in models
        for key in (f"{section}.{name}" for name in model.model_fields)
        if "str" in str(model.model_fields[key.split(".")[1]].annotation)
    }
    # names may name code, which tests/cli/commands/ has refused; a normalization or an output names no place
    names = {"data.name", "data.normalization", "model.name", "model.arguments", "model.logits"}
    assert free - {"runtime.device", *names} == set(PLACES)


def test_places_are_the_defaults_and_what_defines_the_network_is_kept():
    followed = follow_config(STRANGE, [], source="x.pt").config
    assert followed.data == Cifar10Config()
    assert (followed.model, followed.augment) == (STRANGE.model, STRANGE.augment)
    assert followed.train.epochs == 7
    assert followed.runtime.precision == "bfloat16"


def test_how_to_compute_is_followed_within_bounds_and_each_bound_is_told():
    found = follow_config(STRANGE, [], source="x.pt")
    runtime, defaults = found.config.runtime, RuntimeConfig()
    assert (runtime.threads, runtime.eval_batch_size, runtime.device) == (
        defaults.threads,
        defaults.eval_batch_size,
        defaults.device,
    )
    assert found.config.train.batch_size == TrainConfig().batch_size
    for key in ("threads=1024", "eval_batch_size=1000000", "device=cuda:97"):
        assert any(
            f"x.pt records runtime.{key}, which is not used: " in note for note in found.notes.values()
        )
    assert len(found.notes) == 4


def test_what_this_machine_can_do_is_followed_without_a_word():
    runtime = RuntimeConfig(threads=os.cpu_count(), eval_batch_size=1000, device="cpu")
    found = follow_config(Config(runtime=runtime), [], source="x.pt")
    assert found.config.runtime == runtime
    assert found.notes == {}


def test_the_command_line_is_followed_whatever_it_says():
    sets = ["runtime.threads=1000", "runtime.eval_batch_size=5000", "train.batch_size=20000", "data.root=/c"]
    found = follow_config(STRANGE, [*sets, "runtime.device=cpu"], source="x.pt")
    assert (found.config.runtime.threads, found.config.runtime.eval_batch_size) == (1000, 5000)
    assert (found.config.train.batch_size, found.config.data.root) == (20000, "/c")
    assert found.notes == {}
    assert found.recorded_root is None
    assert dict(found.unfollowed_places()) == {"data.url": "http://a.example/x", "data.archive": "/b"}
    with pytest.raises(ConfigError, match="unknown key"):
        follow_config(STRANGE, ["data.rooot=/c"], source="x.pt")


def test_another_data_set_on_the_command_line_leaves_nothing_of_the_recorded_one():
    found = follow_config(STRANGE, ["data.name=imagefolder"], source="x.pt")
    assert found.config.data == ImageFolderConfig()
    assert found.recorded_root is None
    assert list(found.unfollowed_places()) == []


def test_a_resumed_run_computes_as_it_was_told_but_takes_no_place_from_its_file():
    found = follow_run(STRANGE, [], source="run/config.yaml")
    # but for threads that this machine does not have
    runtime = STRANGE.runtime.model_copy(update={"threads": None})
    assert (found.config.runtime, found.config.train) == (runtime, STRANGE.train)
    assert list(found.notes) == ["runtime.threads"]
    assert found.config.data == Cifar10Config()
    assert found.recorded_root == "/a"
