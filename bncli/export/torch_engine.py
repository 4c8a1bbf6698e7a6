"""A file of torch.export as a function from images to outputs, numpy arrays both."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bncli.errors import BncliError, CheckpointError
from bncli.export.engines import Array, in_one_line
from bncli.export.pt2_program import check_pt2


class TorchExport:
    """PyTorch itself, with the threads that it has.

    Raises CheckpointError for a file that cannot be opened, or that may run code.
    """

    def __init__(self, path: Path) -> None:
        check_pt2(path)
        self.path = path
        self.description = f"torch.export {torch.__version__}"
        try:
            self._compute: Callable[[Tensor], Tensor] = torch.export.load(path).module()
        except Exception as error:  # whatever a file may make it raise
            raise CheckpointError(f"{path}: PyTorch cannot open it: {in_one_line(error)}") from None

    @torch.no_grad()
    def __call__(self, images: Array) -> Array:
        """See `bncli.export.engines.Engine`."""
        try:
            outputs: Any = self._compute(torch.from_numpy(images)).numpy()
        except Exception as error:
            raise BncliError(f"{self.path}: PyTorch cannot compute it: {in_one_line(error)}") from None
        return outputs  # type: ignore[no-any-return]
