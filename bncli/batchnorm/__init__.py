"""BatchNorm's running statistics, for any `nn.Module` or state dict: read, judge, follow, protect."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
