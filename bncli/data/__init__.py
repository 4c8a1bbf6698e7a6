"""Data sets: uint8 images (N, 3, H, W) with labels (N,), their augmentation and their batches."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
