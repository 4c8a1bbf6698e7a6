"""bncli: train, evaluate and inspect networks with BatchNorm, on the command line and as a library.

The names in `__init__.pyi`, here and in the packages below, are imported when they are first used:
`import bncli` does not import torch, and a command imports no more of bncli than it needs.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
