"""A network that an engine computes, as an `nn.Module`: for all that evaluates one."""

import torch
from torch import Tensor, nn

from bncli.export.engines import Engine
from bncli.export.exported_file import ExportedFile
from bncli.export.record import Pixels, Precision


class EngineNetwork(nn.Module):
    """Images (N, ...) to what an engine makes of them, on the CPU; in eval mode, as it has no other.

    Images may be uint8 in 0..255 or floating point in 0..1, whichever `pixels` it takes itself. `sentence`
    says what became of BatchNorm.
    """

    def __init__(self, engine: Engine, *, pixels: Pixels, precision: Precision, sentence: str) -> None:
        super().__init__()
        self.engine, self.pixels, self.precision_name, self.sentence = engine, pixels, precision, sentence
        self.training = False
        # tells the precision to whoever judges rounding by it
        self.register_buffer("precision", torch.empty(0, dtype=getattr(torch, precision)), persistent=False)

    @classmethod
    def of(cls, exported: ExportedFile, engine: Engine) -> "EngineNetwork":
        """What a file of `bncli export` records of itself. Raises CheckpointError for another file."""
        record = exported.known
        return cls(engine, pixels=record.pixels, precision=record.precision, sentence=record.sentence)

    def train(self, mode: bool = True) -> "EngineNetwork":
        """Nothing: the engine computes what eval mode does."""
        return self

    def extra_repr(self) -> str:
        """The engine."""
        return self.engine.description

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        images = images.cpu()
        if self.pixels == "uint8" and images.is_floating_point():
            images = (images * 255).round().to(torch.uint8)
        elif self.pixels == "float32" and not images.is_floating_point():
            images = images.float() / 255
        return torch.from_numpy(self.engine(images.contiguous().numpy()))
