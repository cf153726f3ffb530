"""Running a trained net in Python: a budget at run time decides its depth."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
