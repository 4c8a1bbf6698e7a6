"""A trained network made ready to be used: BatchNorm folded away, weights in their fastest form."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
