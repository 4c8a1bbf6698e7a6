"""Any checkpoint of anyone's, opened to look at its BatchNorm layers.

Formats are recognised by their first bytes, whatever the file is called. Nothing in the file is executed
and nothing is written to it; only the tensors of BatchNorm are read.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bncli.batchnorm import Hyperparameters, LayerStats, read_running_stats
from bncli.batchnorm.conventions import PYTORCH
from bncli.batchnorm.layers import AVERAGED_KEY
from bncli.batchnorm.state_dict import batch_norm_keys
from bncli.checkpoints.any_content import named, read_source, without_collector
from bncli.checkpoints.byte_source import ForeignFileError, UnreadableFileError
from bncli.checkpoints.formats import distributed_folder
from bncli.checkpoints.formats.foreign import recognise_shard
from bncli.checkpoints.formats.window import Window
from bncli.checkpoints.locate import (
    Candidate,
    NothingToReadError,
    StateDict,
    choose,
    describe_without_names,
    find_state_dicts,
    strip_prefixes,
)
from bncli.checkpoints.own_config import own_hyperparameters
from bncli.checkpoints.stored_tensor import StoredTensor
from bncli.wording import list_names, plural

# Of all BatchNorm layers together: 8 million channels, where a network has thousands. Read, copied and
# judged they take several times that.
MAX_BYTES_OF_LAYERS = 128 * 2**20


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint whose tensors can be read as long as it is open."""

    source: str  # path or URL as given
    # 'torch zip', 'torch legacy', 'torchscript', 'safetensors', 'safetensors index', 'torch index', 'keras'
    kind: str  # and those of other frameworks
    key: str  # where the chosen state dict lies, dotted; '' for the top
    candidates: tuple[Candidate, ...]  # with BatchNorm layers, outermost first
    tensors: Mapping[str, StoredTensor]  # of the chosen state dict, in file order, common prefixes stripped
    hyperparameters: Mapping[str, Hyperparameters]  # by layer name, as far as the file tells
    layer_names: tuple[str, ...] = field(repr=False)
    prefix: str = ""  # the common prefixes: with it before them, names are those of the file
    is_whole_module: bool = False  # a pickled module, not a state dict
    notes: tuple[str, ...] = ()  # what its format leaves open, a sentence each
    windows: Mapping[str, Window] = field(default_factory=dict)  # of convolutions, where the file tells

    def __repr__(self) -> str:
        """Which file, of what kind, and what it holds: one line."""
        where = f" under {self.key!r}" if self.key else ""
        return (
            f"OpenCheckpoint({self.source!r}, {self.kind}: {plural(len(self.tensors), 'tensor')}{where},"
            f" {plural(len(self.layer_names), 'BatchNorm layer')})"
        )

    @property
    def foreign_framework(self) -> str | None:
        """Which framework its layers are of, where they are not PyTorch's."""
        conventions = (known.convention for known in self.hyperparameters.values())
        return next((one.framework for one in conventions if one is not PYTORCH), None)

    def layers(self) -> tuple[LayerStats, ...]:
        """All BatchNorm layers; only their tensors are read.

        Raises:
            CheckpointError: when those are damaged, or far larger than any network's.
        """
        known = {
            name: self.hyperparameters[name] for name in self.layer_names if name in self.hyperparameters
        }
        num_features = {name: hyperparameters.num_features for name, hyperparameters in known.items()}
        wanted = {
            key: self.tensors[key]
            for layer in self.layer_names
            for key in batch_norm_keys(self.tensors, layer, num_features.get(layer)).values()
        }
        features = sum(num_features.values())
        size = sum(tensor.num_elements * tensor.dtype.itemsize for tensor in wanted.values())
        with named(self.source), without_collector():
            if max(size, 4 * features) > MAX_BYTES_OF_LAYERS:
                raise UnreadableFileError("its BatchNorm layers are far larger than those of any network")
            state: dict[str, object] = {name: tensor.read() for name, tensor in wanted.items()}
            if AVERAGED_KEY in self.tensors:
                state[AVERAGED_KEY] = None  # that it is there is all that counts
            layers = {layer.name: layer for layer in read_running_stats(state, known)}
        return tuple(layers[name] for name in self.layer_names)


@contextmanager
def open_checkpoint(source: str | Path, key: str | None = None) -> Iterator[OpenCheckpoint]:
    """Open a file of any kind, local or at a URL that fsspec opens, without executing anything in it.

    `key` says where the state dict lies, such as `ema` or `checkpoint.model`, where the rule of
    `bncli.checkpoints.locate` would choose another.

    Raises:
        CheckpointError: naming the file and what is wrong with it, or what it holds instead of BatchNorm.
    """
    source = str(source)
    with ExitStack() as stack:
        with named(source), without_collector():
            kind, content = read_source(source, stack)
            found = state_dicts_of(kind, content, source)
            chosen = strip_prefixes(choose(found, key))
            notes = chosen.notes
            if chosen.uninitialised:
                listed = list_names(chosen.uninitialised, 4)
                notes += (f"not yet initialised, as they are lazy and have seen no batch: {listed}",)
            if kind == distributed_folder.KIND:
                notes += distributed_folder.describe_ranks(chosen.tensors, chosen.layer_names)
            candidates = tuple(state_dict.candidate for state_dict in found if state_dict.layer_names)
            del content, found  # all but the chosen tensors
        yield OpenCheckpoint(
            source=source,
            kind=kind,
            key=chosen.key,
            candidates=candidates,
            tensors=chosen.tensors,
            hyperparameters=chosen.hyperparameters,
            layer_names=tuple(chosen.layer_names),
            prefix=chosen.prefix,
            is_whole_module=chosen.is_whole_module,
            notes=notes,
            windows=chosen.windows,
        )


def state_dicts_of(kind: str, content: object, source: str) -> list[StateDict]:
    """All places of a file that hold tensors, outermost first, with what bncli's own files tell of them.

    Raises:
        UnreadableFileError: when there is none; says what there is.
    """
    found = find_state_dicts(content)
    if not found:
        raise _without_tensors(kind, content, source)
    return _with_own_hyperparameters(found, content)


def _without_tensors(kind: str, content: object, source: str) -> UnreadableFileError:
    """What a file of PyTorch holds that has no tensor with a name."""
    if kind == "torchscript":
        return NothingToReadError(
            "a TorchScript without parameters and buffers, as torch.jit.freeze leaves it: it folds BatchNorm"
            " into other layers, or makes its numbers constants without names; save it before it is frozen"
        )
    shard = recognise_shard(content, source)
    return ForeignFileError(shard.sentence) if shard else NothingToReadError(describe_without_names(content))


def _with_own_hyperparameters(found: list[StateDict], content: object) -> list[StateDict]:
    """A checkpoint of bncli's tells momentum, eps and more of the layers in `state_dict`."""
    for state_dict in found:
        if state_dict.key == "state_dict":
            means = {
                name: state_dict.tensors[f"{name}.running_mean"] for name in state_dict.layer_names if name
            }
            known = own_hyperparameters(content, {name: mean.shape[0] for name, mean in means.items()})
            state_dict.hyperparameters |= known
            state_dict.layer_names += [name for name in known if name not in means]
    return found
