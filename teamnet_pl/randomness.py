"""Random numbers that depend on what they are for, not on what was drawn before."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from numpy.random import MT19937
from numpy.random.mtrand import get_bit_generator, set_bit_generator


@contextmanager
def seeded(seed: int | None, device: torch.device | None = None) -> Iterator[None]:
    """Draws with a seed of its own and leaves this process's random states as they were.

    That goes for torch (on the CPU and on the device), for NumPy and for Python's ``random``.

    Args:
        seed: The seed, from 0 to 2**64 - 1; ``None`` to draw from this process's random states.
        device: Where else to seed torch, if it is a CUDA device.

    Example:
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
    # Not `fork_rng` and `manual_seed`: they visit every kind of device, 15 times as slow.
    generators = [torch.default_generator]
    if device is not None and device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    before = [generator.get_state() for generator in generators]
    python = random.getstate()
    # NumPy's generator is exchanged, as its state takes long to set.
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
