"""Chooses the depth that a budget of time allows. Plain arithmetic on times, no torch.

The estimated latency of a depth is its profiled latency times the *slowdown*: how many times as
slow as profiled the machine is now. This one number is learned from runs at any depth and holds for
all depths, so the choice follows from the slowdown, the budget and the batch size alone.

The slowdown is the 95th percentile of the recent ratios of measured to profiled latency, with
hysteresis. It rises at once, since budgets are missed until it does, and it falls late and in
steps. Each fall tries out depths that may be too slow. A fall that does not last doubles the wait
before the next one, so that a machine under constant load sees few of them, even if load slows down
deep runs more than shallow ones.
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
"""Number of recent calls to learn from. The 95th percentile of 20 is the second largest."""
DEAD_BAND = 0.1
"""Relative difference from the current slowdown below which it is not lowered."""
LARGEST_FALL = 0.8
"""Smallest factor by which the slowdown is lowered at once."""
LONGEST_WAIT = 16
"""Largest factor by which the wait before a fall grows."""


class DepthController:
    """Chooses the deepest depth that fits a budget of time.

    Args:
        depths: Names of the depths, the deepest first.
        expected_ms: Maps a depth and a batch size to the profiled latency in milliseconds.
        headroom: Share of each budget that is kept free. The depth that was chosen last needs no
            headroom, so it stays while budgets vary by less than this share.
        wait_s: Seconds for which the measured slowdown has to be lower before the slowdown falls.
        clock: Returns the time in seconds.

    Attributes:
        depths: Names of the depths, the deepest first.

    Raises:
        TeamNetError: If there is no depth, or `headroom` or `wait_s` is out of range.

    Examples:
        >>> controller = DepthController(["d7", "d0"], lambda depth, n: n * int(depth[1:]) + 2)
        >>> controller.choose(budget_ms=15)  # nothing is known about this machine yet
        'd0'
        >>> controller.observe("d0", 1, latency_ms=2.1)
        >>> controller.choose(budget_ms=15)
        'd7'
        >>> controller.observe("d7", 1, latency_ms=18)  # twice as slow as profiled
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
        self._initial_wait = self._wait = wait_s
        self._clock = clock
        self._lock = threading.Lock()
        self._ratios: deque[float] = deque(maxlen=WINDOW)
        self._slowdown = math.inf  # unknown: only the shallowest depth is safe
        self._last_depth = self.depths[-1]
        self._confirmed_at = -math.inf  # when about the current slowdown was last measured
        self._lowered_at = -math.inf  # when it was last lowered; reset when it rises
        self._failed_slowdown = 0.0  # the last lower value that did not last

    @property
    def slowdown(self) -> float:
        """How many times as slow as profiled the machine is; infinite before the first run."""
        return self._slowdown

    @property
    def typical_share(self) -> float:
        """Latency of a typical run as a share of `estimate_ms`, at most 1."""
        with self._lock:
            ratios = list(self._ratios)
        return min(1.0, statistics.median(ratios) / self._slowdown) if ratios else 1.0

    def estimate_ms(self, depth: str, batch_size: int = 1) -> float:
        """Estimates the latency of a depth now, in milliseconds (its 95th percentile)."""
        return self._expected_ms(depth, batch_size) * self._slowdown

    def choose(self, budget_ms: float, batch_size: int = 1) -> str:
        """Returns the deepest depth whose latency fits, or the shallowest if none fits.

        Args:
            budget_ms: Available time in milliseconds.
            batch_size: Number of images that will run at once.
        """
        for depth in self.depths:
            share = 1.0 if depth == self._last_depth else 1 - self._headroom
            if self.estimate_ms(depth, batch_size) <= budget_ms * share:
                break
        self._last_depth = depth
        return depth

    def observe(self, depth: str, batch_size: int, latency_ms: float) -> None:
        """Learns from a run.

        Args:
            depth: The depth that ran.
            batch_size: Number of images that ran at once.
            latency_ms: The measured latency in milliseconds.
        """
        ratio = latency_ms / self._expected_ms(depth, batch_size)
        with self._lock:
            self._ratios.append(ratio)
            rank = math.ceil(0.95 * len(self._ratios))
            self._update(sorted(self._ratios)[rank - 1], self._clock())

    def _update(self, measured: float, now: float) -> None:
        """Moves the slowdown toward a measured one."""
        if self._slowdown == math.inf:
            self._slowdown, self._confirmed_at = measured, now
            return
        lasted = now - self._lowered_at >= self._wait
        if lasted and self._slowdown <= self._failed_slowdown:
            self._wait, self._failed_slowdown = self._initial_wait, 0.0
        if measured > self._slowdown:
            if measured > self._slowdown * (1 + DEAD_BAND):
                if not lasted:
                    self._wait = min(2 * self._wait, LONGEST_WAIT * self._initial_wait)
                    self._failed_slowdown = self._slowdown
                self._lowered_at = -math.inf
            self._slowdown, self._confirmed_at = measured, now
        elif measured > self._slowdown * (1 - DEAD_BAND):
            self._confirmed_at = now
        elif now - self._confirmed_at >= self._wait:
            self._slowdown = max(measured, self._slowdown * LARGEST_FALL)
            self._confirmed_at = self._lowered_at = now


class OverheadEstimator:
    """Splits the time that a call spends before its run into overhead and delay.

    Overhead is inherent to the call: its work on the CPU, and the shortest wait of the recent
    calls, such as for a disk. Any longer wait is delay: another process had the core meanwhile.
    Delay is a sign of load, which the controller tracks. If it counted as overhead, the depth would
    depend on whether the other process happens to interrupt the reading or the run.
    """

    def __init__(self) -> None:
        self._waits_ms: deque[float] = deque(maxlen=WINDOW)

    def split(self, elapsed_ms: float, cpu_ms: float) -> tuple[float, float]:
        """Splits the time of one more call.

        Args:
            elapsed_ms: Milliseconds from the start of the call to its run.
            cpu_ms: Milliseconds of these for which the call used the CPU.

        Returns:
            Overhead and delay in milliseconds; their sum is `elapsed_ms`.
        """
        wait_ms = elapsed_ms - cpu_ms
        self._waits_ms.append(wait_ms)
        shortest_ms = min(list(self._waits_ms))  # a copy, since other threads may append
        return cpu_ms + shortest_ms, wait_ms - shortest_ms
