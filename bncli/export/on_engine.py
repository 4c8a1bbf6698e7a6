"""A network in memory, handed to another engine: exported to a file that is gone again at once."""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bncli.errors import BncliError, CheckpointError
from bncli.export.engine_network import EngineNetwork
from bncli.export.engines import EngineName, OnnxRuntime, OpenVino, require_engine
from bncli.export.prepared import prepare
from bncli.export.record import Precision, folding_in_words
from bncli.export.write import engine_files

_NOBODYS_FILE = "the network"  # in messages, in place of a file that is gone


def on_engine(
    model: nn.Module,
    example: Tensor,
    name: EngineName,
    *,
    precision: Precision = "float32",
    threads: int | None = None,
) -> EngineNetwork:
    """What `model` computes in eval mode, BatchNorm folded where that is exact, by an engine on the CPU.

    `model` computes in float32 on the CPU, and is left alone. `example` are inputs (N, ...). ONNX Runtime has
    float32 alone.

    Raises MissingEngineError, and BncliError for a network that cannot be exported.
    """
    require_engine(name)
    folding = prepare(model, fold=True, precision=torch.float32, casts=False)
    # engines choose the layout by themselves; of PyTorch's they would copy the conversions
    network = folding.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    # Windows cannot remove a file that an engine has mapped
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        file = Path(folder) / ("network.onnx" if name == "onnxruntime" else "network.xml")
        engine_files(network, _two(example), file)
        try:
            if name == "onnxruntime":
                engine: OnnxRuntime | OpenVino = OnnxRuntime.open(file, threads)
            else:
                engine = OpenVino.open(file, threads, precision)
        except CheckpointError as error:
            raise BncliError(str(error).replace(str(file), _NOBODYS_FILE)) from None
        engine = replace(engine, path=Path(_NOBODYS_FILE))  # for later errors
    return EngineNetwork(
        engine,
        pixels="float32" if example.is_floating_point() else "uint8",
        precision=precision,
        sentence=folding_in_words(len(folding.folded), len(folding.kept)),
    )


def _two(example: Tensor) -> Tensor:
    """Two inputs: of one alone exporters would take the number for a constant."""
    return example[:1].expand(2, *example.shape[1:]).contiguous()
