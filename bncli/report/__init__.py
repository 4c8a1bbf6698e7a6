"""A page about a network's BatchNorm layers that one opens in a browser: one file, which asks for nothing."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
