"""Running a net to look at it, without changing it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def evaluation(net: nn.Module) -> Iterator[None]:
    """Sets evaluation mode without gradients within a ``with`` block, then restores all modes."""
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def example_images(net: nn.Module, count: int, input_shape: Sequence[int]) -> Tensor:
    """Makes random images on the device and of the type of a net, the same each time.

    Returns:
        Shape ``(count, *input_shape)``.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, *input_shape, generator=generator)
    parameter = next(net.parameters(), images)
    return images.to(parameter.device, parameter.dtype)
