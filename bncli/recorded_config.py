"""What of a recorded configuration is followed: that of a checkpoint, and of a run that is resumed.

Such a file may come from a stranger. What defines the network and the kind of its data is followed: without
it the tensors mean nothing. What names a place outside the file (a folder, an archive, an address) is shown,
never followed: places come from the command line or are the defaults; for `data.root` there is a third way,
see `data/recorded_root.py`. How to compute is followed as far as this machine can, within bounds: no file
uses up its memory or its threads. A key in no set below is not followed; a test asks for each.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass

from bncli.config import Config
from bncli.config_file import config_from_dict, keys_of
from bncli.errors import DeviceError

# whole sections, and single keys
FOLLOWED = {
    "data.name",
    "data.num_train",
    "data.num_test",
    "data.seed",
    "data.image_size",
    "data.resize",
    "data.interpolation",
    "data.stream",
    "data.normalization",
    "augment",
    "model",
    "train",
    "runtime.precision",
    "runtime.memory_format",
}
BOUNDED = {"data.workers", "runtime.device", "runtime.threads", "runtime.eval_batch_size", "train.batch_size"}
PLACES = ("data.root", "data.url", "data.archive", "data.cache", "data.arguments", "data.classes")
# of training alone, which goes on in a run directory, of those who start several processes, and of what is
# installed here
UNUSED = {
    *("runtime.compile", "runtime.engine", "runtime.reuse_memory", "runtime.timeout"),
    "runtime.weight_gradient",
}

MAX_EVAL_BATCH = 1_000  # images
MAX_TRAIN_BATCH = 10_000


@dataclass(frozen=True)
class FollowedConfig:
    """A recorded configuration as far as it is followed, with what the command line says instead."""

    config: Config  # its places are the command line's or the defaults
    recorded: Config
    named: frozenset[str]  # the keys that the command line gives
    notes: dict[str, str]  # by key: what is not followed of how to compute, and why

    @property
    def recorded_root(self) -> str | None:
        """The root to be looked at before it is followed; None: another is given, or it is the default."""
        kind, recorded = self.config.data, self.recorded.data
        if self.is_named("data.root") or self.is_named("data.name") or kind.name != recorded.name:
            return None
        root: str | None = getattr(recorded, "root", None)
        return None if root == getattr(kind, "root", None) else root

    def unfollowed_places(self) -> Iterator[tuple[str, str]]:
        """Dotted key and value of every place that is recorded and not followed, the root aside."""
        if self.config.data.name != self.recorded.data.name:
            return
        for key in PLACES[1:]:
            value = getattr(self.recorded.data, key.removeprefix("data."), None)
            if value and not self.is_named(key):
                yield key, str(value)

    def is_named(self, key: str) -> bool:
        """Whether the command line gives a key, a part of it, or the section that it is in."""
        if key in self.named or key.partition(".")[0] in self.named:
            return True
        return any(one.startswith(f"{key}.") for one in self.named)


def follow_config(recorded: Config, overrides: list[str] | None, *, source: str) -> FollowedConfig:
    """Follow what a checkpoint records; `source` names the file in errors and notes.

    Raises:
        ConfigError: an override cannot be used.
    """
    named = keys_of(overrides or [])
    values = recorded.model_dump(mode="json")
    followed = {
        section: {key: value for key, value in keys.items() if _is_followed(section, key)}
        for section, keys in values.items()
    }
    notes = {}
    for key, reason in _out_of_bounds(recorded):
        section, _, name = key.partition(".")
        value = followed[section].pop(name)
        if key not in named and section not in named:
            notes[key] = (
                f"{source} records {key}={value}, which is not used: {reason}; --set {key}=VALUE changes it"
            )
    config = config_from_dict(followed, overrides, source=source)
    return FollowedConfig(config, recorded, named, notes)


def follow_run(recorded: Config, overrides: list[str] | None, *, source: str) -> FollowedConfig:
    """Follow the configuration of a run that is resumed: as it was told, but for places and too many threads.

    Raises:
        ConfigError: an override cannot be used.
    """
    values = recorded.model_dump(mode="json")
    values["data"] = {key: value for key, value in values["data"].items() if _is_followed("data", key)}
    named = keys_of(overrides or [])
    notes = {}
    for key, reason in _out_of_bounds(recorded):
        section, _, name = key.partition(".")
        if key in ("runtime.threads", "data.workers") and not named & {key, section}:
            number = values[section].pop(name)
            notes[key] = (
                f"{source} records {key}={number}, which is not used: {reason}; --set {key}=VALUE changes it"
            )
    config = config_from_dict(values, overrides, source=source)
    return FollowedConfig(config, recorded, named, notes)


def _is_followed(section: str, key: str) -> bool:
    return section in FOLLOWED or f"{section}.{key}" in FOLLOWED | BOUNDED


def _out_of_bounds(recorded: Config) -> Iterator[tuple[str, str]]:
    """The keys whose values would be too much for this machine, each with the reason."""
    from bncli.runtime import resolve_device

    runtime, num_cpus = recorded.runtime, os.cpu_count() or 1
    if runtime.threads is not None and runtime.threads > num_cpus:
        yield "runtime.threads", f"this machine has {num_cpus} CPUs"
    workers = getattr(recorded.data, "workers", None)
    if workers is not None and workers > num_cpus:
        yield "data.workers", f"this machine has {num_cpus} CPUs"
    if runtime.eval_batch_size > MAX_EVAL_BATCH:
        yield "runtime.eval_batch_size", f"a file may ask for at most {MAX_EVAL_BATCH:,} images at a time"
    if recorded.train.batch_size > MAX_TRAIN_BATCH:
        yield "train.batch_size", f"a file may ask for at most {MAX_TRAIN_BATCH:,} images at a time"
    try:
        resolve_device(runtime.device)
    except DeviceError:
        yield "runtime.device", "this machine has none"
