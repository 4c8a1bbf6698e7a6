"""The fixed-shape forward: every image is computed in a batch of one fixed number of rows.

Kernels choose their order of summation by the shape of the batch (another instruction for one row,
another blocking for many, pytorch#116501), so in eval mode the last bits of a prediction depend on the
number of images beside it. Where every batch has the same shape there is nothing to choose. What then
remains is that a kernel treats all rows of one batch alike: an observation about a machine and a network,
no theorem. `bncli.certify` checks it.
"""

import torch
from torch import Tensor, nn

from bncli.errors import BncliError

# Large enough for full throughput: measured on CPU, chunks of 64 are as fast as batches of 256.
# Small enough for single images, each of which costs as much as a whole chunk.
DEFAULT_ROWS = 64

ALIGNMENT = 64  # bytes; kernels may add the numbers at other addresses in another order


class FixedShape(nn.Module):
    """Any module in eval mode, computed in chunks of exactly `rows` rows.

    A batch (N, ...) is cut into chunks; the last is filled up with copies of its last row, which, unlike
    zeros, are as valid an input as that row itself. Only the rows of the N inputs are returned. Full
    chunks are views of the batch, so nothing is copied where `rows` divides N.

    The wrapped module is `model`; it must map (rows, ...) to a tensor of `rows` rows. The wrapper starts
    in its mode and refuses to compute in train mode, where the copies would enter the batch statistics.

    Example, where an image alone gets the very bits that it gets in a batch:

    >>> import torch
    >>> from torchvision.models import resnet18
    >>> from bncli import FixedShape
    >>> images = torch.rand(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    >>> model = FixedShape(resnet18(weights=None).eval(), rows=16)
    >>> with torch.no_grad():
    ...     together = model(images)
    ...     alone = torch.cat([model(image[None]) for image in images])
    >>> together.shape
    torch.Size([10, 1000])
    >>> torch.equal(together, alone)
    True

    Raises ValueError for fewer than one row.
    """

    def __init__(self, model: nn.Module, rows: int = DEFAULT_ROWS) -> None:
        super().__init__()
        if rows < 1:
            raise ValueError(f"rows must be 1 or more, got {rows}")
        self.model = model
        self.rows = rows
        self.training = model.training  # not self.train(): that would set every module inside

    def extra_repr(self) -> str:
        """What `print` shows beside the wrapped module."""
        return f"rows={self.rows}"

    def forward(self, batch: Tensor) -> Tensor:
        """(N, ...) to what the wrapped module makes of N rows.

        Raises BncliError in train mode, also of a single module inside, and for a module that returns
        anything but a tensor of `rows` rows.
        """
        if any(module.training for module in self.modules()):
            raise BncliError(
                "FixedShape is for eval mode: in train mode its padding would enter the batch statistics;"
                " call eval() first"
            )
        if len(batch) == 0:
            return self._rows_of(batch)
        outputs = [self._rows_of(self._filled(chunk))[: len(chunk)] for chunk in batch.split(self.rows)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def chunk_of(self, batch: Tensor, row: int) -> tuple[Tensor, int]:
        """The chunk (rows, ...) in which row `row` of the batch is computed, and its place in there."""
        index, place = divmod(row, self.rows)
        return self._filled(batch.split(self.rows)[index]), place

    def _filled(self, chunk: Tensor) -> Tensor:
        """The chunk itself where a kernel sees nothing else in it than in every other; otherwise a copy.

        Shape is not all that a kernel looks at: also whether memory is aligned, and the memory format,
        which PyTorch reads off the strides. A single image as `batch[i][None]` has another first stride.
        """
        usual = chunk.data_ptr() % ALIGNMENT == 0 and chunk.stride(0) == chunk[0].numel()
        if len(chunk) == self.rows and usual:
            return chunk
        # indexing keeps the order of the other strides, so the memory format too
        return chunk[torch.arange(self.rows, device=chunk.device).clamp(max=len(chunk) - 1)]

    def _rows_of(self, chunk: Tensor) -> Tensor:
        output = self.model(chunk)
        if not isinstance(output, Tensor) or output.dim() == 0 or len(output) != len(chunk):
            found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise BncliError(
                f"FixedShape: expected a tensor of {len(chunk)} rows from the model, got {found}"
            )
        return output


def without_fixed_shape(model: nn.Module) -> nn.Module:
    """The module inside a FixedShape; any other module itself."""
    return model.model if isinstance(model, FixedShape) else model
