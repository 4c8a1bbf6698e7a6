"""An exported file as an `nn.Module`, for all that evaluates one."""

import torch
from torch import Tensor, nn

from bncli.export.engines import Engine
from bncli.export.exported_file import ExportedFile


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
