"""Benchmarks that stay with the project: what a speed claim rests on is measured in one run."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
