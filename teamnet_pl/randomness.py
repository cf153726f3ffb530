"""Random numbers that depend on a seed alone, not on earlier draws."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from numpy.random import MT19937
from numpy.random.mtrand import get_bit_generator, set_bit_generator


@contextmanager
def seeded(seed: int | None, device: torch.device | None = None) -> Iterator[None]:
    """Seeds the random generators of this process, and restores their states at the end.

    This applies to torch (on the CPU and on the device), NumPy and Python's ``random``.

    Args:
        seed: The seed, from 0 to 2**64 - 1; ``None`` to leave the generators alone.
        device: A device on which to seed torch besides the CPU, if it is a CUDA device.

    Examples:
        >>> import numpy as np
        >>> def draw():
        ...     return torch.rand(()).item(), np.random.rand(), random.random()
        >>> with seeded(3):
        ...     first = draw()
        >>> between = draw()
        >>> with seeded(3):
        ...     again = draw()
        >>> first == again != between
        True
    """
    if seed is None:
        yield
        return
    # `fork_rng` and `manual_seed` visit every kind of device and take 15 times as long.
    generators = [torch.default_generator]
    if device is not None and device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    before = [generator.get_state() for generator in generators]
    python = random.getstate()
    # NumPy's generator is exchanged, since setting its state is slow.
    numpy = get_bit_generator()
    for generator in generators:
        generator.manual_seed(seed)
    random.seed(seed)
    set_bit_generator(MT19937(seed))
    try:
        yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)
        random.setstate(python)
        set_bit_generator(numpy)
