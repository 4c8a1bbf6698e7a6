"""What a machine is good for, and which way of computing is fastest for a network: timed in turns in one run.

Measurements that back claims of ours beside rivals are no part of what is installed: `tests/benchmarks`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
