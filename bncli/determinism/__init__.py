"""On what an answer depends beside its image: the certificate, and the forward that makes it hold."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
