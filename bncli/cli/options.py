"""Options that several commands share, and how their values are read; which layers `--layer` asks for."""

import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

import typer

from bncli.builtin_configs import builtin_configs
from bncli.cli.help_page import COMPUTED, DATA, INPUT, OUTPUT, SHOWN
from bncli.errors import BncliError, ConfigError


def complete_config(incomplete: str) -> list[str]:
    """For the shell: built-in names and YAML files. Where there are none, it offers files itself."""
    files = glob.glob(f"{glob.escape(incomplete)}*.yaml")  # noqa: PTH207  (Path drops the ./ that was typed)
    return [*builtin_configs(), *files]


def complete_device() -> list[str]:
    """For the shell, without asking PyTorch what there is, which takes a second."""
    return ["auto", "cpu", "cuda", "mps"]


CheckpointArgument = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A file that `bncli train` saved, such as last.pt; with --model, any checkpoint of PyTorch.",
    ),
]
ComputedArgument = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A file that `bncli train` saved, such as last.pt, or one that `bncli export` wrote.",
    ),
]
ANY_CHECKPOINT = (
    "A checkpoint of bncli, PyTorch or another framework (bncli explain checkpoint-files): a path or a URL."
)
ConfigArgument = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG",
        help="A YAML file, or the name of a built-in configuration: see `bncli config`.",
        autocompletion=complete_config,
    ),
]


def set_option(example: str) -> Any:
    """`--set`, with a key that changes what the command does."""
    return typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help=f"Change a key of the configuration, as in {example}; can be repeated. All keys:"
        " `bncli config quickstart`.",
        rich_help_panel=DATA,
    )


SetOption = Annotated[list[str] | None, set_option("runtime.precision=float32")]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="Compute on auto, cpu, cuda, cuda:1 or mps. Short for --set runtime.device=DEVICE.",
        rich_help_panel=DATA,
        autocompletion=complete_device,
    ),
]
EngineOption = Annotated[
    Literal["torch", "auto", "onnxruntime", "openvino"] | None,
    typer.Option(
        "--engine",
        metavar="NAME",
        help="Compute with torch, onnxruntime, openvino, or auto: the fastest of them, measured at the start."
        " Short for --set runtime.engine=NAME.",
        rich_help_panel=DATA,
    ),
]
DataRootOption = Annotated[
    str | None,
    typer.Option(
        "--data-root",
        metavar="FOLDER",
        help="Read the data set from this folder. Short for --set data.root=FOLDER.",
        rich_help_panel=DATA,
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the result as one JSON document.", rich_help_panel=OUTPUT)
]
PlotOption = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FILE", help="Draw it to a .png or .svg file.", rich_help_panel=OUTPUT),
]
CsvOption = Annotated[
    Path | None,
    typer.Option(
        "--csv",
        metavar="FILE",
        help="Write the table as CSV to this file; - is stdout.",
        rich_help_panel=OUTPUT,
    ),
]
KeyOption = Annotated[
    str | None,
    typer.Option(
        "--key",
        metavar="KEY",
        help="Where in the file the network's tensors lie, as in 'ema', if it holds several networks.",
        rich_help_panel=INPUT,
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME",
        help="The network that the checkpoint is of, if `bncli train` did not save it: torchvision:NAME,"
        " timm:NAME, package.module:FACTORY or path/to/file.py:FACTORY. Its code is run.",
        rich_help_panel=INPUT,
    ),
]
ModelArgOption = Annotated[
    list[str] | None,
    typer.Option(
        "--model-arg",
        metavar="KEY=VALUE",
        help="An argument of that network, as in num_classes=10; can be repeated.",
        rich_help_panel=INPUT,
    ),
]
PartialOption = Annotated[
    list[str] | None,
    typer.Option(
        "--partial",
        metavar="PATTERN",
        help="Load only tensors whose names match, as in 'layer4.*', or all but those, as in '!fc.*'; can"
        " be repeated.",
        rich_help_panel=INPUT,
    ),
]
LogitsOption = Annotated[
    str | None,
    typer.Option(
        "--logits",
        metavar="KEY",
        help="Where the scores of the classes are, if that network returns several outputs: a key, the name"
        " of an attribute, or a number.  [default: logits, if there is one of that name]",
        rich_help_panel=INPUT,
    ),
]
NormalizationOption = Annotated[
    str | None,
    typer.Option(
        "--normalization",
        metavar="NAME",
        help="How pixels are normalised for that network: imagenet, half (from -1 to 1), none (from 0 to 1),"
        " measured (on the training images), or M,M,M/S,S,S (means and deviations of the channels, from 0"
        " to 1)."
        "  [default: that of the network's library, else measured]",
        rich_help_panel=INPUT,
    ),
]
ChannelsOption = Annotated[
    bool,
    typer.Option("--channels", help="Show every channel of every layer.", rich_help_panel=SHOWN),
]
BatchInvariantOption = Annotated[
    bool,
    typer.Option(
        "--batch-invariant",
        help="Compute all images in batches of one fixed size, so that not one bit of a result depends on"
        " the batch. Slower.",
        rich_help_panel=COMPUTED,
    ),
]


def parse_sizes(text: str, option: str, *, example: str = "batch sizes such as 1,2,4,8") -> tuple[int, ...]:
    """Whole numbers of 1 or more between commas, in rising order, each once.

    Raises ConfigError, naming the option, for anything else.
    """
    parts = [part.strip() for part in text.split(",")]
    # more digits than any size has: Python refuses to read some thousands of them
    if not all(part.isascii() and part.isdigit() and len(part) < 19 and int(part) >= 1 for part in parts):
        raise ConfigError(option, [f"expected {example}, found {text!r}"])
    return tuple(sorted({int(part) for part in parts}))


# of files that somebody would miss: no result of a command is called so
_NEVER_REPLACED = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".py", ".yaml", ".yml", ".jsonl")


def check_writable(path: Path, *inputs: Path | str) -> None:
    """Refuse a file for the result before the work begins.

    Raises BncliError where it clearly cannot be written, is one of the `inputs`, or exists and is called as
    a checkpoint, a program or a configuration.
    """
    if path.is_file():
        _refuse_input(path, inputs)
        if path.suffix.lower() in _NEVER_REPLACED:
            raise BncliError(f"{path}: exists, and is no result of this command; give another name")
    if path.is_dir():
        raise BncliError(f"{path}: cannot be written: it is a directory")
    if not path.parent.is_dir():
        raise BncliError(f"{path}: cannot be written: there is no directory {path.parent}")


def check_new(path: Path, *inputs: Path | str) -> None:
    """Refuse a file that is to be made, and never replaced, before the work begins.

    Raises BncliError where it is there already, is one of the `inputs`, or clearly cannot be written.
    """
    _refuse_input(path, inputs)
    if path.exists() or path.is_symlink():
        raise BncliError(f"{path}: exists already; give another name, or remove it first")
    check_writable(path)


# of files that hold a network and are none of torch.save
_OF_OTHER_KINDS = (
    ".safetensors", ".npz", ".npy", ".pt2", ".onnx", ".xml", ".keras", ".h5", ".hdf5", ".pb", ".tflite",
    ".msgpack", ".pdparams", ".params", ".eqx",
)  # fmt: skip


def check_ending_of_copy(path: Path, source: Path | str, kind: str) -> None:
    """Refuse a name by which a copy of `source` would be taken for a file of another kind than it is.

    `kind` is that of the source, as `OpenCheckpoint.kind`; its own ending is always right. Raises BncliError.
    """
    ending = path.suffix.lower()
    if ending == Path(source).suffix.lower():
        return
    if kind == "safetensors" and ending != ".safetensors":
        fix = "safetensors, as the source is; give a name that ends in .safetensors"
    elif kind != "safetensors" and ending in _OF_OTHER_KINDS:
        fix = "PyTorch, as the source is; give a name that ends in .pt"
    else:
        return
    raise BncliError(f"{path}: would be a file of {fix}")


def _refuse_input(path: Path, inputs: Iterable[Path | str]) -> None:
    if path.is_file() and any(
        os.path.exists(one) and os.path.samefile(path, one)  # noqa: PTH110, PTH121
        for one in inputs
    ):
        raise BncliError(f"{path}: is an input, which is never changed; give another name")


def make_empty_dir(path: Path) -> None:
    """Create a directory for results. Raises BncliError where it holds something, or cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise BncliError(f"{path}: the directory is not empty; choose another")
    except OSError as error:
        raise BncliError(f"{path}: cannot be made: {error.strerror or error}") from None


LayerOption = Annotated[
    str | None,
    typer.Option(
        "--layer",
        metavar="PATTERN",
        help="Show only layers whose names match, as in 'stages.1.*'.",
        rich_help_panel=SHOWN,
    ),
]


class Named(Protocol):
    """Anything that stands for a layer."""

    @property
    def name(self) -> str:
        """Of the layer."""


Item = TypeVar("Item", bound=Named)


def matching_layers(layers: Sequence[Item], pattern: str | None) -> tuple[Item, ...]:
    """Those whose names match the glob; all without one.

    Raises ConfigError where none does, with the names that there are.
    """
    from bncli.batchnorm.population.selection import name_matches, no_match

    found = tuple(layer for layer in layers if name_matches(pattern, layer.name))
    if pattern is not None and not found:
        raise ConfigError("--layer", [no_match(repr(pattern), [layer.name for layer in layers])])
    return found
