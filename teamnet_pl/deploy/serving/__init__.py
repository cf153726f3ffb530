"""Serving a trained net over HTTP: requests are batched, and depth gives way under load."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
