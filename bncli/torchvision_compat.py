"""Importing torchvision, also beside a CPU-only torch.

Registries serve torchvision wheels whose C extension was built for CUDA. Beside a CPU-only torch that
extension does not load, the operators it defines are missing, and `import torchvision` fails with
`operator torchvision::nms does not exist` (pytorch#122494, vision#9077, pytorch#157648). bncli uses no
such operator, so declaring their names is enough; calling one still fails.

Everything in bncli that needs torchvision calls `import_torchvision()` first.
"""

import importlib
import re
import sys
import warnings
from types import ModuleType

import torch

_MISSING_OPERATOR = re.compile(r"operator torchvision::q?nms does not exist")
_OPERATORS = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

# A declaration lives as long as its Library object, so the object must outlive the import.
_declarations: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """Import torchvision with its submodules `datasets`, `models` and `transforms.v2`.

    Calling it again is cheap and changes nothing.

    Raises:
        ImportError: torchvision is missing, or broken in another way than the known one.
    """
    with warnings.catch_warnings():
        # The image extension of the same wheel cannot load either; PIL decodes our images.
        warnings.filterwarnings("ignore", message="Failed to load image Python extension")
        try:
            return _import()
        except RuntimeError as error:
            if not _MISSING_OPERATOR.search(str(error)):
                raise ImportError(f"torchvision cannot be imported: {_first_line(error)}") from error
        _purge_half_imported()
        _declare_operators()
        return _import()


def _import() -> ModuleType:
    importlib.import_module("torchvision.transforms.v2")
    return importlib.import_module("torchvision")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _purge_half_imported() -> None:
    """Forget the submodules that the failed import left behind, so that they run again."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]


def _declare_operators() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in _OPERATORS:
        if not hasattr(torch.ops.torchvision, operator):
            library.define(operator + _SCHEMA)
    _declarations.append(library)
