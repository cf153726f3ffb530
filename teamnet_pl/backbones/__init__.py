"""Backbones by name: plain nets that map a batch of images to logits."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
