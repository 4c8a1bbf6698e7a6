"""An exported file as an `nn.Module`, for all that evaluates one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bncli.errors import BncliError, CheckpointError
from bncli.export.engines import Engine, OnnxRuntime, OpenVino, in_one_line
from bncli.export.exported_file import ExportedFile
from bncli.export.pt2_program import check_pt2


class EngineNetwork(nn.Module):
    """Images (N, ...) to what the file makes of them, on the CPU; in eval mode, as it has no other.

    Images may be uint8 in 0..255 or floating point in 0..1, whichever the file takes itself.
    """

    def __init__(self, exported: ExportedFile, engine: Engine) -> None:
        super().__init__()
        self.exported, self.engine = exported, engine
        self.training = False
        # tells the precision to whoever judges rounding by it
        precision: torch.dtype = getattr(torch, exported.known.precision)
        self.register_buffer("precision", torch.empty(0, dtype=precision), persistent=False)

    def train(self, mode: bool = True) -> "EngineNetwork":
        """Nothing: the file computes what eval mode does."""
        return self

    def extra_repr(self) -> str:
        """The engine."""
        return self.engine.description

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        record = self.exported.known
        images = images.cpu()
        if record.pixels == "uint8" and images.is_floating_point():
            images = (images * 255).round().to(torch.uint8)
        elif record.pixels == "float32" and not images.is_floating_point():
            images = images.float() / 255
        return torch.from_numpy(self.engine(images.contiguous().numpy()))


def open_engine(exported: ExportedFile, threads: int | None = None) -> Engine:
    """The engine of a file of this kind, on the CPU.

    Raises MissingEngineError where it is not installed, CheckpointError where it cannot compute the file.
    """
    if exported.kind == "onnx":
        return OnnxRuntime.open(exported.path, threads)
    if exported.kind == "openvino":
        return OpenVino.open(exported.path, threads, exported.known.precision)
    return _TorchExport(exported.path)


class _TorchExport:
    """PyTorch itself, with the threads that it has."""

    def __init__(self, path: Path) -> None:
        check_pt2(path)
        self.path = path
        self.description = f"torch.export {torch.__version__}"
        try:
            self._compute: Callable[[Tensor], Any] = torch.export.load(path).module()
        except Exception as error:  # whatever a file may make it raise
            raise CheckpointError(f"{path}: PyTorch cannot open it: {in_one_line(error)}") from None

    def __call__(self, images: Any) -> Any:
        try:
            return self._compute(torch.from_numpy(images)).numpy()
        except Exception as error:
            raise BncliError(f"{self.path}: PyTorch cannot compute it: {in_one_line(error)}") from None
