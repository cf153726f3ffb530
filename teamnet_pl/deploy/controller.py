"""Which depth a budget allows, as the machine's load changes. Plain arithmetic on times.

What a depth takes is what it took when it was profiled, times the *load*: how many times as slow
the machine is now. So one number, learned from any depth, tells of all of them, and the depth
follows from the load, the budget and the batch size alone.

The load is the 95th percentile of the last requests' ratios, held: it rises at once, since a budget
is missed until it does, and is lowered late and by steps. Each lowering tries out what may be too
deep. One that does not last makes the next wait twice as long, so that a machine whose load is the
same for long sees few of them, also where load slows down deep runs more than shallow ones.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from teamnet_pl.errors import TeamNetError

WINDOW = 20
"""Requests that the load is told from: the 95th percentile of 20 is the second slowest."""
DEAD_BAND = 0.1
"""A load that much lower than the held one is no reason to change it."""
STEP = 0.8
"""What the load is lowered to at most, as a share."""
LONGEST_WAIT = 16
"""How many times as long the wait for a lowering becomes at most."""


class DepthController:
    """Chooses the deepest depth that fits a budget of time.

    Args:
        depths: Names of the depths, the deepest first.
        expected_ms: Latency of a depth for a batch size as profiled, in milliseconds.
        headroom: Share of each budget that is left free, but where the last depth chosen fits: so
            what is left of budgets may vary by so much, and the depth stays.
        wait_s: Seconds that the load has to be lower before it is taken to be.
        clock: The time in seconds.

    Raises:
        ValueError: If there is no depth, or headroom or wait are out of range.

    Example:
        >>> controller = DepthController(["d7", "d0"], lambda depth, n: n * int(depth[1:]) + 2)
        >>> controller.choose(budget_ms=15)  # nothing is known of this machine yet
        'd0'
        >>> controller.observe("d0", 1, taken_ms=2.1)
        >>> controller.choose(budget_ms=15)
        'd7'
        >>> controller.observe("d7", 1, taken_ms=18)  # twice as slow as profiled
        >>> controller.choose(budget_ms=15)
        'd0'
    """

    def __init__(
        self,
        depths: Sequence[str],
        expected_ms: Callable[[str, int], float],
        *,
        headroom: float = 0.1,
        wait_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not depths:
            raise TeamNetError("There must be at least one depth to choose from, found none.")
        if not 0 <= headroom < 1:
            raise TeamNetError(f"headroom must be in [0, 1), found {headroom}.")
        if not 0 < wait_s < math.inf:
            raise TeamNetError(f"wait_s must be a positive number of seconds, found {wait_s}.")
        self.depths = tuple(depths)
        self._expected_ms = expected_ms
        self._headroom = headroom
        self._first_wait = self._wait = wait_s
        self._clock = clock
        self._lock = threading.Lock()
        self._ratios: deque[float] = deque(maxlen=WINDOW)
        self._load = math.inf  # nothing is known: the shallowest depth is the safe one
        self._last = self.depths[-1]
        self._near = -math.inf  # when the load was last seen to be about the held one
        self._lowered = -math.inf  # when it was last lowered; forgotten when it rises
        self._failed = 0.0  # the load that did not last

    @property
    def load(self) -> float:
        """How many times as slow as profiled the machine is taken to be; infinite at first."""
        return self._load

    @property
    def typical(self) -> float:
        """What a typical run takes, as a share of what `estimate_ms` says of it: at most 1."""
        with self._lock:
            ratios = list(self._ratios)
        return min(1.0, statistics.median(ratios) / self._load) if ratios else 1.0

    def estimate_ms(self, depth: str, batch_size: int = 1) -> float:
        """Latency to expect of a depth now, in milliseconds (its 95th percentile)."""
        return self._expected_ms(depth, batch_size) * self._load

    def choose(self, budget_ms: float, batch_size: int = 1) -> str:
        """The deepest depth whose latency fits, or the shallowest if none does.

        Args:
            budget_ms: Time that there is, in milliseconds.
            batch_size: Number of images to run at once.
        """
        for depth in self.depths:
            share = 1.0 if depth == self._last else 1 - self._headroom
            if self.estimate_ms(depth, batch_size) <= budget_ms * share:
                break
        self._last = depth
        return depth

    def observe(self, depth: str, batch_size: int, taken_ms: float) -> None:
        """Learns from a run.

        Args:
            depth: The depth that ran.
            batch_size: Number of images.
            taken_ms: What it took, in milliseconds.
        """
        ratio = taken_ms / self._expected_ms(depth, batch_size)
        with self._lock:
            self._ratios.append(ratio)
            rank = math.ceil(0.95 * len(self._ratios))
            self._follow(sorted(self._ratios)[rank - 1], self._clock())

    def _follow(self, measured: float, now: float) -> None:
        if self._load == math.inf:
            self._load, self._near = measured, now
            return
        lasted = now - self._lowered >= self._wait
        if lasted and self._load <= self._failed:
            self._wait, self._failed = self._first_wait, 0.0
        if measured > self._load:
            if measured > self._load * (1 + DEAD_BAND):
                if not lasted:
                    self._wait = min(2 * self._wait, LONGEST_WAIT * self._first_wait)
                    self._failed = self._load
                self._lowered = -math.inf
            self._load, self._near = measured, now
        elif measured > self._load * (1 - DEAD_BAND):
            self._near = now
        elif now - self._near >= self._wait:
            self._load = max(measured, self._load * STEP)
            self._near = self._lowered = now
