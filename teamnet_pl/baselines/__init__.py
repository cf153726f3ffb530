"""The other ways to get nets of several sizes, each to stand where an `ElasticNet` does."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
