"""bncli's own checkpoint: what is in it, and saving and loading it.

A checkpoint is a dict of tensors and plain values, so that `torch.load(path, weights_only=True)` reads
it without bncli. Its `state_dict` holds the weights and, for every BatchNorm layer, `running_mean`,
`running_var` and `num_batches_tracked`.

Version 2 adds `digests` (see `part_digests.py`), `data_digest` and `running_epoch`; a file of version
1 is read as one without them.
"""

import io
import shlex
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bncli.atomic_file import atomic_file
from bncli.checkpoints.own_checks import check_content, check_tensors
from bncli.checkpoints.own_config import FORMAT
from bncli.checkpoints.own_reader import load_values, open_whole
from bncli.checkpoints.part_digests import digest_parts, find_damage
from bncli.config import Config, ConvNetConfig, NamedModelConfig
from bncli.config_file import config_from_dict
from bncli.errors import BncliError, CheckpointError, ConfigError, ForeignNetworkError
from bncli.models import build_configured
from bncli.models.bounded import Bounded
from bncli.network_name import CONVNET, is_file, is_same_name, runs_foreign_code

FORMAT_VERSION = 2  # written; older ones are read
_EXPORTED = (".onnx", ".xml", ".pt2")  # endings of files that are no checkpoints


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Everything that evaluating, inspecting or continuing a run needs."""

    config: Config
    state_dict: dict[str, Tensor]
    mean: tuple[float, ...]  # normalisation per channel, in units of the full range (0..1)
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    image_size: int  # height and width in pixels
    epoch: int  # epochs finished
    step: int  # training steps finished
    # of these weights in eval mode, as a fraction; None in the midst of an epoch: they were not evaluated
    test_accuracy: float | None
    test_loss: float | None  # nats
    best_accuracy: float  # of all epochs so far
    seconds: float  # of training so far, over all sessions
    runtime: dict[str, Any]  # device, precision, memory format, threads
    machine: dict[str, Any]  # versions and hardware
    optimizer: dict[str, Any] | None = None  # its state dict; None where it is not meant to continue
    running_epoch: dict[str, Any] | None = None  # the sums of an unfinished epoch; None at its end
    data_digest: str | None = None  # SHA-256 of the images and labels; None in files of version 1
    recalibration: dict[str, Any] | None = None  # how the running statistics were replaced; None: never
    # with train.ema_epochs, to continue from: `last`, the state dict after the last step, and `average`, that
    # of the weights. `state_dict` is that of the averaged network where it was evaluated, else `last`
    averaging: dict[str, dict[str, Tensor]] | None = None
    averaged: dict[str, Any] | None = None  # of which checkpoints it is the average; None: of none
    # eps and momentum of each BatchNorm layer by name, where the configuration does not tell them
    batch_norm_layers: dict[str, dict[str, float | None]] | None = None
    # whether the user has named the code that makes the network; never saved, so no file says it of itself
    may_import: bool = False

    def __repr__(self) -> str:
        """What network after how much training, and how good: one line."""
        accuracy = (
            "not evaluated" if self.test_accuracy is None else f"test accuracy {self.test_accuracy:.2%}"
        )
        recalibrated = ", recalibrated" if self.recalibration else ""
        return (
            f"Checkpoint({len(self.state_dict)} tensors, {len(self.class_names)} classes of"
            f" {self.config.data.name}, after epoch {self.epoch}, {accuracy}{recalibrated})"
        )

    def finished(self) -> "Checkpoint":
        """The same to be used only: without what training would continue from."""
        return replace(self, optimizer=None, running_epoch=None, averaging=None)


_SAVED = [field.name for field in fields(Checkpoint) if field.name != "may_import"]


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write the file atomically: after a crash it is the old one or the new one.

    Raises:
        OSError: when it cannot be written; a former file of that name is intact.
    """
    content = {name: getattr(checkpoint, name) for name in _SAVED}
    content["config"] = checkpoint.config.model_dump(mode="json")
    content["normalization"] = {"mean": content.pop("mean"), "std": content.pop("std")}
    content = {"format": FORMAT, "format_version": FORMAT_VERSION, **content}
    content["digests"] = digest_parts(content)
    # into memory first: on a full disk torch.save raises a RuntimeError that does not tell the reason
    memory = io.BytesIO()
    torch.save(content, memory)
    with atomic_file(path) as file:
        file.write(memory.getbuffer())


def load_checkpoint(
    path: str | Path, *, model: str | None = None, arguments: Mapping[str, Any] | None = None
) -> Checkpoint:
    """Read a checkpoint that bncli wrote; no code in it is executed, nor any that it names.

    With `model`, which repeats the name of its network, `load_model` may import the code of that name;
    `arguments` are added to those that are recorded.

    Raises:
        CheckpointError: naming the file and what is wrong with it, a damaged tensor by its name.
    """
    content = load_content(path)
    _check_digests(content, path)
    try:
        check_content(content, str(path))
        config = config_from_dict(content["config"], source=f"{path} (its configuration)")
        if model is not None:
            config = _repeated(config, model, arguments or {}, str(path))
        values = {name: content[name] for name in _SAVED if name in content}
        values["may_import"] = model is not None
        normalization = {key: tuple(content["normalization"][key]) for key in ("mean", "std")}
        class_names = tuple(content["class_names"])
        return Checkpoint(**{**values, **normalization, "config": config, "class_names": class_names})
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: an incomplete bncli checkpoint ({error})") from None


def _repeated(config: Config, name: str, arguments: Mapping[str, Any], source: str) -> Config:
    """The configuration with the network's name as the user gives it, where it means the recorded one."""
    recorded = config.model
    if not is_same_name(name, recorded.name):
        moved = (
            "; a file may have moved, but not changed its name" if is_file(name.rpartition(":")[0]) else ""
        )
        raise CheckpointError(f"{source}: it records the network {_shown(recorded.name)}, not {name}{moved}")
    if isinstance(recorded, ConvNetConfig):
        return config
    values = {"name": name, "arguments": {**recorded.arguments, **arguments}, "logits": recorded.logits}
    return config.model_copy(update={"model": NamedModelConfig.model_validate(values)})


def _shown(name: str) -> str:
    return name if len(name) <= 200 and name.isprintable() else repr(name[:200])


def recorded_network(path: str | Path) -> str | None:
    """The name of another network than convnet in a checkpoint of bncli's; None for all other files.

    Nothing is loaded, imported or checked.

    Raises:
        CheckpointError: when the file cannot be read.
    """
    with open_whole(path) as (_, content):
        is_own = isinstance(content, dict) and content.get("format") == FORMAT
        config = content.get("config") if is_own and isinstance(content, dict) else None
        model = config.get("model") if isinstance(config, dict) else None
        name = model.get("name") if isinstance(model, dict) else None
    return name if isinstance(name, str) and name != CONVNET else None


def load_content(path: str | Path) -> dict[str, Any]:
    """The dict in a checkpoint of bncli, as it stands there.

    Raises:
        ForeignNetworkError: when it is a file of PyTorch or safetensors and not bncli's.
        OtherFormatError: when it is a file of another kind.
        CheckpointError: when the file cannot be read, is damaged, or has a newer format.
    """
    with open_whole(path) as (kind, found):  # nothing of a stranger's large file is loaded
        content = _own_content(kind, found, path)
        version = content.get("format_version")
        is_newer = type(version) is int and version > FORMAT_VERSION
        loaded: dict[str, Any] = {} if is_newer else load_values(content)
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: checkpoint format {version!r}; this bncli reads up to {FORMAT_VERSION}; upgrade bncli"
        )
    return loaded


def check_own(path: str | Path) -> None:
    """Raise ForeignNetworkError unless bncli wrote a checkpoint; its tensors are neither read nor checked."""
    with open_whole(path) as (kind, content):
        _own_content(kind, content, path)


def _own_content(kind: str, content: object, path: str | Path) -> dict[str, Any]:
    if kind == "torch zip" and isinstance(content, dict) and content.get("format") == FORMAT:
        return content
    what = "a torch file" if kind == "torch zip" else f"a {kind} file"
    ending = Path(path).suffix.lower()
    misnamed = f"; its ending {ending} does not fit {what}" if ending in _EXPORTED else ""
    raise ForeignNetworkError(
        f"{path}: {what}, but no bncli checkpoint (made by `bncli train`){misnamed}"
        f"{_recorded_network(content)}"
    )


def _recorded_network(content: object) -> str:
    """What a file says of its network, as those of PyTorch's examples and timm do: shown, and no more."""
    name = content.get("arch") if isinstance(content, dict) else None
    return f"; it calls its network {name[:60]!r}" if isinstance(name, str) else ""


def find_damaged_parts(content: dict[str, Any]) -> tuple[str, ...] | None:
    """The names of the parts that are not what was saved; None for a file of version 1, without digests."""
    rest = {key: value for key, value in content.items() if key != "digests"}
    digests = content.get("digests")
    if not isinstance(digests, dict):
        return None if digests is None and content["format_version"] == 1 else ("digests",)
    try:
        return find_damage(rest, digests)
    except (ValueError, RuntimeError, TypeError, RecursionError) as error:
        return (" ".join(str(error).split()) or type(error).__name__,)


def _check_digests(content: dict[str, Any], path: str | Path) -> None:
    damaged = find_damaged_parts(content)
    if damaged:
        more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        raise CheckpointError(
            f"{path}: damaged: its SHA-256 is not the one that was saved, in {', '.join(damaged[:3])}{more};"
            " restore the file from a copy, or train again"
        )


def load_model(
    checkpoint: str | Path | Checkpoint, *, source: str | None = None, model: str | None = None
) -> nn.Module:
    """The checkpoint's network in eval mode, on the CPU.

    It takes images (N, 3, H, W), uint8 in 0..255 or floating point in 0..1, and returns logits
    (N, num_classes). Errors name the file `source`, which a Checkpoint does not know itself. For `model` see
    `load_checkpoint`.

    Raises:
        CheckpointError: when the file is no checkpoint, its tensors do not fit its configuration, or it names
            code that makes its network, and `model` does not.
    """
    source = source or ("checkpoint" if isinstance(checkpoint, Checkpoint) else str(checkpoint))
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = load_checkpoint(checkpoint, model=model)
    config, state_dict = checkpoint.config.model, checkpoint.state_dict
    if runs_foreign_code(config.name) and not checkpoint.may_import:
        name = _shown(config.name)
        raise CheckpointError(
            f"{source}: its network is made by {name}, and code that a file names is not run; where you"
            " trust it, average, bench eval, eval, export, predict and recalibrate take --model"
            f" {shlex.quote(name)}"
        )
    build = partial(build_configured, config, len(checkpoint.class_names), image_size=checkpoint.image_size)
    try:
        # first without memory: a checkpoint of a kilobyte may name a network of a terabyte
        if isinstance(config, ConvNetConfig):
            with torch.device("meta"):
                skeleton = build()
            check_tensors(state_dict, skeleton.state_dict(), source)
        with nullcontext() if isinstance(config, ConvNetConfig) else Bounded(state_dict):
            network = build(mean=checkpoint.mean, std=checkpoint.std)
        check_tensors(state_dict, network.state_dict(), source)
        network.load_state_dict(state_dict)
    except CheckpointError:
        raise
    except (BncliError, RuntimeError, TypeError, AttributeError) as error:
        if isinstance(error, ConfigError) and isinstance(config, NamedModelConfig):
            raise CheckpointError(f"{source}: {error}") from None
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{source}: its tensors do not fit its configuration: {reason}") from None
    return network.eval()
