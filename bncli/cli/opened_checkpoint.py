"""What commands begin with: a checkpoint's network and its data set, or the configuration of a timed run.

Of the places that a checkpoint records only some are followed; what is said about the rest is here too.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bncli.cli.messages import print_note
from bncli.distributed.launch import launched
from bncli.errors import CheckpointError, ConfigError, DataError, ForeignNetworkError

if TYPE_CHECKING:
    from torch.nn import Module

    from bncli.checkpoints import Checkpoint, LoadedWeights
    from bncli.cli.named_network import NamedNetwork
    from bncli.config import Config, DataConfig, RuntimeConfig
    from bncli.data import Dataset, Progress
    from bncli.data.recorded_root import DataRecord
    from bncli.distributed import Processes
    from bncli.export import EngineNetwork, ExportRecord
    from bncli.models.preset import Preset
    from bncli.recorded_config import FollowedConfig
    from bncli.runtime import Runtime

_SHOWN = 200  # characters of a path or an address


@dataclass(frozen=True)
class Unfollowed:
    """The places that a file names and that are not followed; false where there are none."""

    root: str | None  # with the reason
    others: tuple[str, ...]
    cache: str | None
    arguments: str | None

    def __bool__(self) -> bool:
        """Whether there is anything to say."""
        return bool(self.root or self.others or self.cache or self.arguments)

    @property
    def matters(self) -> bool:
        """Whether there is where data were found all the same."""
        return bool(self.root or self.cache or self.arguments)

    def of(self, path: Path) -> str:
        """One sentence, which names the file."""
        named = ", ".join(filter(None, [self.root, *self.others, self.arguments, self.cache]))
        return (
            f"{path} names {named}: not used, because a file may come from anybody; --set KEY=VALUE uses it"
        )


def followed_data(
    followed: "FollowedConfig", record: "Callable[[], DataRecord]", progress: "Progress | None"
) -> "tuple[DataConfig, Unfollowed]":
    """The data section to load, and what is not followed of the recorded one.

    `record` gives the digest and the classes that the checkpoint records; it is asked where they are needed.
    """
    from bncli.config import NamedDataConfig
    from bncli.data.recorded_root import check_recorded_root
    from bncli.network_name import runs_foreign_code

    kind = followed.config.data
    if (
        isinstance(kind, NamedDataConfig)
        and not followed.is_named("data.name")
        and runs_foreign_code(kind.name)
    ):
        raise DataError(
            f"the file names its data set data.name={_shown(kind.name)}, which is code; it is run where --set"
            " data.name=NAME repeats it"
        )
    data, root, reason = followed.config.data, followed.recorded_root, None
    if root is not None:
        there = data.model_copy(update={"root": root})  # with the cache that is the user's own
        try:
            check_recorded_root(there, record, progress)
            data = there
        except DataError as error:
            reason = f"data.root={_shown(root)} ({error})"
    others = dict(followed.unfollowed_places())
    said = {key: f"{key}={_shown(value)}" for key, value in others.items()}
    cache, arguments = said.pop("data.cache", None), said.pop("data.arguments", None)
    return data, Unfollowed(reason, tuple(said.values()), cache, arguments)


def _shown(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


@dataclass(frozen=True)
class Subject:
    """A checkpoint, and its network as the configuration and the overrides want it computed."""

    path: Path
    followed: "FollowedConfig"
    runtime: "Runtime"
    model: "Module"
    own: "Checkpoint | None"  # of bncli; None for a network that the command line names
    named: "tuple[NamedNetwork, LoadedWeights] | None" = None  # such a network, and what was loaded into it
    exported: "ExportRecord | None" = None  # of a file of `bncli export`, which an engine computes

    @property
    def checkpoint(self) -> "Checkpoint":
        """bncli's own, for what is done with no other."""
        if self.own is None:
            raise CheckpointError(f"{self.path}: no bncli checkpoint (made by `bncli train`)")
        return self.own

    @property
    def epoch(self) -> int | None:
        """Of training, where the file tells."""
        if self.exported is not None:
            epoch: int | None = self.exported.source.get("epoch")
            return epoch
        return None if self.own is None else self.own.epoch

    def describe_network(self) -> dict[str, object]:
        """What JSON documents say of a network that the command line names; nothing of bncli's own."""
        return {} if self.named is None else {"model": self.named[0].describe(self.named[1])}

    def describe_runtime(self) -> dict[str, object]:
        """How it is computed, for JSON documents and headers."""
        described, network = self.runtime.describe(), self.engine_network
        if network is None:
            return described
        return described | {"precision": network.precision_name, "engine": network.extra_repr()}

    @property
    def engine_network(self) -> "EngineNetwork | None":
        """The network, where another engine than PyTorch's own computes it, in eval mode alone."""
        from bncli.determinism.fixed_shape import without_fixed_shape
        from bncli.export.engine_network import EngineNetwork

        network = without_fixed_shape(self.model)
        return network if isinstance(network, EngineNetwork) else None

    def with_streamed_data(self) -> "Subject":
        """The same, whose data set is not kept where it need not be."""
        from bncli.config import StreamableConfig

        data = self.config.data
        if not isinstance(data, StreamableConfig) or data.stream is False:
            return self
        streamed = data.model_copy(update={"stream": True})
        config = self.config.model_copy(update={"data": streamed})
        return replace(self, followed=replace(self.followed, config=config))

    @property
    def config(self) -> "Config":
        """What is followed of the checkpoint's configuration, and the overrides."""
        return self.followed.config


def open_subject(
    path: Path,
    overrides: list[str] | None,
    *,
    command: str,
    batch_invariant: bool = False,
    named: "NamedNetwork | None" = None,
    trusted: str | None = None,
    needs_images: bool = True,
) -> Subject:
    """Read a checkpoint and place its network; `command` is a key of `overrides.EFFECTIVE`.

    `named` is the network that the command line names: where the file is not bncli's own, or is and records
    the name of code, which is only run if it is repeated. `trusted` is such a name that bncli itself knows.
    Without `needs_images` no data set is looked for.

    Raises CheckpointError, ConfigError or DeviceError.
    """
    from bncli.cli.messages import note_emulation, note_idle_cpus
    from bncli.cli.named_network import as_typed, is_address, tell_images
    from bncli.determinism import FixedShape
    from bncli.models.preset import preset_of
    from bncli.runtime import resolve_runtime

    if named is None and is_address(path):
        reason = "a checkpoint of `bncli train` is read from this machine; download it first"
        raise CheckpointError(f"{as_typed(path)}: {reason}, or name another network with --model")
    loaded = checkpoint = None
    repeated = None if named is None or not records_network(path) else named
    if named is None or repeated is not None:
        named = None
        network, checkpoint, followed = _open_own(path, overrides, command, repeated, trusted)
    else:
        network, loaded = named.load(path)
        print_note(f"{path}: {loaded.sentence} into {named.name}")
        preset = preset_of(named.name, network)
        followed = _config_of_options(
            overrides or [], command, preset, named.normalization, needs_images=needs_images
        )
        named = named.with_preset(preset, followed.config.data)
        if needs_images:
            tell_images(followed.config, named, has_preset=preset is not None)
    runtime = _with_processes(resolve_runtime(_with_rank_device(followed.config.runtime)))
    note_emulation(runtime)
    note_idle_cpus(runtime, followed.config.runtime, launched())
    network = runtime.place_model(network)
    model = FixedShape(network) if batch_invariant else network
    return Subject(
        path,
        followed,
        runtime,
        model,
        checkpoint,
        None if named is None or loaded is None else (named, loaded),
    )


def _with_processes(runtime: "Runtime") -> "Runtime":
    """Under torchrun, how many work together."""
    from bncli.cli.one_voice import last_words

    words = last_words()
    return runtime if words is None else replace(runtime, processes=words.launch.num_ranks)


def _with_rank_device(config: "RuntimeConfig") -> "RuntimeConfig":
    """Under torchrun, the GPU of this process where any would do."""
    from bncli.cli.one_voice import last_words
    from bncli.distributed import rank_device

    words = last_words()
    if words is None:
        return config
    return config.model_copy(update={"device": rank_device(config.device, words.launch)})


def open_again(subject: Subject, path: Path, dataset: "Dataset", *, classifies: bool = True) -> Subject:
    """The network that the command line names, with the tensors of another file of its own kind."""
    from bncli.cli.named_network import fit_to_data

    if subject.named is None:
        raise TypeError("a checkpoint of bncli's own is opened by open_subject")
    named = subject.named[0]
    network, loaded = named.load(path)
    network = subject.runtime.place_model(network)
    fit_to_data(network, named, dataset, subject.runtime, path, classifies=classifies)
    return replace(subject, path=path, model=network, named=(named, loaded))


def records_network(path: Path) -> bool:
    """Whether it is a checkpoint of bncli's that records the name of another network than its own."""
    from bncli.checkpoints import recorded_network

    try:
        return recorded_network(path) is not None
    except CheckpointError:  # whoever loads it says what is wrong
        return False


def _open_own(
    path: Path,
    overrides: list[str] | None,
    command: str,
    repeated: "NamedNetwork | None",
    trusted: str | None,
) -> "tuple[Module, Checkpoint, FollowedConfig]":
    from bncli.checkpoints import load_checkpoint, load_model
    from bncli.cli.overrides import EFFECTIVE, effective_overrides, has_effect
    from bncli.export.exported_file import exported_record
    from bncli.recorded_config import follow_config

    name, arguments = trusted, {}
    if repeated is not None:
        repeated.check_repeats()
        if f"{command} --model" in EFFECTIVE:  # which takes more, for files that say less of themselves
            effective_overrides(command, overrides)
        name, arguments = repeated.name, repeated.arguments
    try:
        checkpoint = load_checkpoint(path, model=name, arguments=arguments)
    except ForeignNetworkError as error:
        exported = exported_record(path)
        if exported is not None:
            raise CheckpointError(
                f"{path}: tensors that `bncli export` wrote, without their network; give"
                f" {exported.source.get('file', 'the checkpoint')}, or export it to .onnx or .pt2"
            ) from None
        if command not in ("eval", "recalibrate", "predict", "report", "export", "bench eval"):
            raise
        raise ForeignNetworkError(f"{error}; name its network with --model, see --help") from None
    followed = follow_config(checkpoint.config, overrides, source=str(path))
    for key, note in followed.notes.items():
        if has_effect(key, command):
            print_note(note)
    return load_model(checkpoint, source=str(path)), checkpoint, followed


def _config_of_options(
    overrides: list[str],
    command: str,
    preset: "Preset | None",
    normalization: str | None,
    *,
    needs_images: bool,
) -> "FollowedConfig":
    """The configuration where a file records none: the defaults, and what the command line says."""
    from bncli.cli.named_network import find_data
    from bncli.config_file import config_from_dict, keys_of
    from bncli.recorded_config import FollowedConfig

    given = find_data(overrides, f"bncli {command}", preset, normalization, needs_images=needs_images)
    config = config_from_dict({}, given, source="defaults")
    return FollowedConfig(config, config, keys_of(overrides), {})


def load_subject_data(
    subject: Subject,
    *,
    classifies: bool = True,
    only_train: bool = False,
    processes: "Processes | None" = None,
) -> "Dataset":
    """The data set that the network was trained on, or that the overrides name; checked to fit the network.

    Without `classifies` the network is not asked for classes. With `only_train` no test image is read, and
    the training split stands for the test split. `processes` that work together have images in
    memory only once. Raises DataError, and NoClassifierError.
    """
    from bncli.cli.progress import ProgressReporter
    from bncli.config import ImageFolderConfig
    from bncli.data import load_dataset
    from bncli.training.shared_data import load_once

    checkpoint = subject.own
    if checkpoint is not None and "data.normalization" in subject.followed.named:
        raise ConfigError("--set", ["data.normalization: the checkpoint records it; leave it out"])
    with ProgressReporter() as progress:
        data, unfollowed = followed_data(
            subject.followed, lambda: _record_of(subject.exported or checkpoint), progress
        )

        def load() -> "Dataset":
            return load_dataset(data, progress=progress, may_download=False, only_train=only_train)

        try:
            if processes is None:
                dataset = load()
            else:  # of folders there is a file that all map
                dataset = load_once(load, processes, in_memory=not isinstance(data, ImageFolderConfig))
            dataset = _checked(subject, dataset)
        except DataError as error:
            if unfollowed:
                raise DataError(f"{error}; {unfollowed.of(subject.path)}") from None
            raise
    if unfollowed.matters:
        print_note(unfollowed.of(subject.path))
    for note in dataset.notes:
        print_note(note)
    if subject.named is not None:
        from bncli.cli.named_network import fit_to_data
        from bncli.determinism.fixed_shape import without_fixed_shape

        network = without_fixed_shape(subject.model)
        dataset = fit_to_data(
            network, subject.named[0], dataset, subject.runtime, subject.path, classifies=classifies
        )
    return dataset


def _checked(subject: Subject, dataset: "Dataset") -> "Dataset":
    """The data set with the names that the file has for its classes. Raises DataError where it is another."""
    checkpoint = subject.own
    if checkpoint is not None:
        if not dataset.class_names:
            dataset = replace(dataset, class_names=checkpoint.class_names)
        _check_dataset(checkpoint, dataset)
    return dataset if subject.exported is None else _check_exported(subject.exported, dataset)


def check_labels(dataset: "Dataset", fix: str) -> None:
    """Raise DataError where test images have no labels, with the `fix`, or others than the classes."""
    from bncli.data.dataset import require_known

    if dataset.test.labels is None:
        raise DataError(f"data {dataset.name}: the images have no labels; {fix}")
    require_known(dataset.test, dataset.class_names, dataset.name)


def _record_of(checkpoint: "Checkpoint | ExportRecord | None") -> "DataRecord":
    return (None, ()) if checkpoint is None else (checkpoint.data_digest, checkpoint.class_names)


def _check_exported(record: "ExportRecord", dataset: "Dataset") -> "Dataset":
    """The data set with the classes of the file. Raises DataError where they are others, or images are."""
    shape, names = record.image_shape, record.class_names
    if tuple(dataset.test.image_shape) != tuple(shape):
        found = "x".join(map(str, dataset.test.image_shape))
        raise DataError(f"{dataset.name}: its inputs are {found}, the file takes {'x'.join(map(str, shape))}")
    numbered = names == tuple(map(str, range(len(names))))
    if not dataset.class_names or (numbered and len(names) == len(dataset.class_names)):
        return replace(dataset, class_names=dataset.class_names or names)
    if dataset.class_names != names:
        raise DataError(
            f"{dataset.name}: its classes are {', '.join(dataset.class_names[:10])}, but the file tells"
            f" {', '.join(names[:10]) or 'none'} apart"
        )
    return dataset


def open_config(path: Path, overrides: list[str] | None) -> "Config":
    """Read the configuration of a run that is to be timed: a file, or a built-in one by its name.

    Raises ConfigError or DeviceError.
    """
    from bncli.cli.messages import note_emulation
    from bncli.config_file import load_config
    from bncli.runtime import resolve_runtime

    config = load_config(path, overrides)
    note_emulation(resolve_runtime(config.runtime))
    return config


def _check_dataset(checkpoint: "Checkpoint", dataset: "Dataset") -> None:
    """Raise DataError unless classes and image size are those that the network was trained on."""
    height, width = dataset.test.image_shape[-2:]
    if height != checkpoint.image_size or width != checkpoint.image_size:
        side = checkpoint.image_size
        raise DataError(
            f"{dataset.name}: its images are {height}x{width} pixels, but the checkpoint was trained on"
            f" {side}x{side}; for image folders set data.image_size={side}"
        )
    if dataset.class_names != checkpoint.class_names:
        raise DataError(
            f"{dataset.name}: its classes are {', '.join(dataset.class_names)}, but the checkpoint was"
            f" trained on {', '.join(checkpoint.class_names)}"
        )
