"""Using a trained net: it runs at the depth that a budget allows, or a depth becomes a file."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
