"""Files for other programs: weights, programs and ONNX files of a net's depths."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
