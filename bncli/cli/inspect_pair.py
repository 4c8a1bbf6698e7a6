"""`bncli inspect-stats FIRST SECOND`: how far the running statistics moved, and whether weights did."""

import fnmatch
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bncli.cli.csv_file import STDOUT, write_csv
from bncli.cli.messages import print_note
from bncli.errors import CheckpointError, ConfigError, IncomparableError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bncli.stats import Comparison, Contents, LayerStats


def inspect_pair(
    first: Path,
    second: Path,
    *,
    layer: str | None,
    channels: bool,
    plot: Path | None,
    csv: Path | None,
    as_json: bool,
) -> int:
    """Compare two checkpoints; 1 when they differ. `layer` only restricts what is shown."""
    from bncli.cli.csv_layers import comparison_rows
    from bncli.cli.render import print_json
    from bncli.cli.render_compare import describe_comparison, show_channels_compared, show_comparison

    comparison = _compare(first, second)
    if layer is not None:
        comparison = _restrict(comparison, layer)
    if plot is not None:
        from bncli.cli.plot_compare import plot_comparison

        plot_comparison(comparison, plot, first=str(first), second=str(second))
        print_note(f"wrote {plot}")
    if csv is not None:
        write_csv(comparison_rows(comparison, channels=channels), csv)
    if as_json:
        print_json(describe_comparison(str(first), str(second), comparison, channels=channels))
    elif csv == STDOUT:
        pass
    elif channels:
        show_channels_compared(comparison)
    else:
        show_comparison(str(first), str(second), comparison)
    return 0 if comparison.identical else 1


def _compare(first: Path, second: Path) -> "Comparison":
    from bncli.stats import compare

    with _open_contents(first) as one, _open_contents(second) as two:
        try:
            return compare(one, two)
        except IncomparableError as error:
            raise IncomparableError(f"{first}, {second}: {error}") from None


def _restrict(comparison: "Comparison", pattern: str) -> "Comparison":
    """The same comparison, of which fewer layers are shown; `identical` is still of the whole."""
    from dataclasses import replace

    layers = tuple(x for x in comparison.layers if fnmatch.fnmatchcase(x.name, pattern))
    if not layers:
        names = ", ".join(x.name for x in comparison.layers)
        raise ConfigError("--layer", [f"no BatchNorm layer matches {pattern!r}; both have {names}"])
    return replace(comparison, layers=layers)


@dataclass(frozen=True, eq=False)
class _LoadedTensor:
    """A tensor that is in memory already."""

    tensor: "Tensor"

    @property
    def shape(self) -> "torch.Size":
        return self.tensor.shape

    @property
    def dtype(self) -> "torch.dtype":
        return self.tensor.dtype

    def read(self) -> "Tensor":
        return self.tensor


@dataclass(frozen=True, eq=False)
class _LoadedContents:
    """A whole checkpoint in memory."""

    found: "tuple[LayerStats, ...]"
    tensors: Mapping[str, _LoadedTensor]

    def layers(self) -> "tuple[LayerStats, ...]":
        return self.found


@contextmanager
def _open_contents(path: Path) -> "Iterator[Contents]":
    """Stands in for the reader of any file, which reads one tensor at a time."""
    from torch import Tensor

    from bncli.checkpoint import load_model, read_torch_file
    from bncli.checkpoint.format import FORMAT
    from bncli.stats import read_running_stats

    content = read_torch_file(path)
    if isinstance(content, Mapping):
        is_ours = content.get("format") == FORMAT
        for state in (content, *(content.get(key) for key in ("state_dict", "model"))):
            if isinstance(state, Mapping) and (layers := read_running_stats(state)):
                tensors = {k: _LoadedTensor(v) for k, v in state.items() if isinstance(v, Tensor)}
                yield _LoadedContents(read_running_stats(load_model(path)) if is_ours else layers, tensors)
                return
    raise CheckpointError(f"{path}: a torch file, but no BatchNorm layer with running statistics in it")
