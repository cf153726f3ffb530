"""Requests that wait for one net: batched, and run as deep as all that wait allow."""

from __future__ import annotations

import asyncio
import time
from bisect import insort
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from operator import attrgetter

import torch
from torch import Tensor

from teamnet_pl.deploy.predictor import NonFiniteError, Predictor, check_output
from teamnet_pl.errors import TeamNetError

HOLD_UPS = 1.25
"""How many times their time batches are planned to take, but for the next one."""


class OverloadedError(Exception):
    """Not even the shallowest depth can answer all that wait in time."""


@dataclass(frozen=True)
class Answer:
    """What became of a request.

    Attributes:
        probabilities: Of each class, shape ``(classes,)``.
        depth: Name of the depth that ran.
        batch_size: Number of images that ran at once.
        waited_ms: Milliseconds until they began to run.
    """

    probabilities: Tensor
    depth: str
    batch_size: int
    waited_ms: float


@dataclass(eq=False)  # each is only equal to itself
class _Request:
    image: Tensor
    arrived: float
    deadline: float
    depth: str | None  # None: whatever the deadline allows
    answer: asyncio.Future[Answer] = field(default_factory=asyncio.Future)

    def fail(self, error: Exception) -> None:
        if not self.answer.done():  # nor has its client gone
            self.answer.set_exception(error)


class Batcher:
    """Runs requests in batches, the earliest deadline first.

    A batch is what waits when the last one is done. Its depth is the deepest with which all that
    wait, at that pace, are answered in time; the shallowest where any was refused meanwhile, since
    those no longer wait. So the more there are, the shallower they run: depth gives way first. Who
    can no longer be in time, since something held up the batches before, gives way to who can.

    Args:
        predictor: The net. Batches run on a thread of their own, one at a time.
        max_batch_size: Images at once.
        clock: The time in seconds.

    Raises:
        ValueError: If the batch size is not positive.
    """

    def __init__(
        self,
        predictor: Predictor,
        max_batch_size: int = 8,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if max_batch_size < 1:
            raise TeamNetError(f"max_batch_size must be at least 1, found {max_batch_size}.")
        self._predictor = predictor
        self._max_batch_size = max_batch_size
        self._clock = clock
        self._waiting: list[_Request] = []  # by deadline
        self._wakes = asyncio.Event()
        self._done_at: float | None = None  # when the batch that runs, if any, should be done
        self._refused = False  # since the last batch began, a request that alone would be in time
        self._thread = ThreadPoolExecutor(1, "predictor")

    @property
    def waiting(self) -> int:
        """Number of requests that wait."""
        return len(self._waiting)

    async def predict(
        self, image: Tensor, arrived: float, budget_ms: float, depth: str | None = None
    ) -> Answer:
        """Answers a request.

        Args:
            image: Preprocessed, shape ``(channels, height, width)``.
            arrived: When the request came, by the clock.
            budget_ms: Milliseconds from then to the answer.
            depth: Name of the depth to run; by default the deepest that there is time for.

        Raises:
            OverloadedError: If other requests leave too little time for the shallowest depth, now
                or by the time it is its turn.
            NonFiniteError: If what the net gives is not finite.
        """
        self.admit(arrived, budget_ms, depth)
        request = _Request(image, arrived, arrived + budget_ms / 1000, depth)
        insort(self._waiting, request, key=attrgetter("deadline"))
        self._wakes.set()
        return await request.answer

    def admit(self, arrived: float, budget_ms: float, depth: str | None = None) -> None:
        """Refuses a request that would be refused now: before its image is decoded, say.

        Args:
            arrived: When the request came, by the clock.
            budget_ms: Milliseconds from then to the answer.
            depth: Name of the depth to run; by default the deepest that there is time for.

        Raises:
            OverloadedError: If other requests leave too little time for the shallowest depth.
        """
        if not self._waiting and self._done_at is None:
            return  # nobody else is to blame; and an estimate that is far too high gets corrected
        deadlines = [request.deadline for request in self._waiting]
        insort(deadlines, arrived + budget_ms / 1000)
        controller = self._predictor.controller
        depth = depth or controller.depths[-1]
        size = min(len(deadlines), self._max_batch_size)
        least_ms = controller.estimate_ms(depth, size)
        if self._pace_ms(deadlines, max(self._clock(), self._done_at or 0)) < least_ms:
            self._refused |= budget_ms >= controller.estimate_ms(depth)
            raise OverloadedError(
                f"{len(self._waiting)} requests wait: even at depth {depth}, {least_ms:.1f} ms for "
                f"{size}, this one or another would come too late."
            )

    def _pace_ms(self, deadlines: Sequence[float], now: float) -> float:
        """Milliseconds that each batch may take so that all that wait are in time.

        Of several batches one may be slow; that all are is so rare that it is not planned for. But
        the longer the queue, the more may hold it up.
        """
        later, size = HOLD_UPS * self._predictor.controller.typical, self._max_batch_size
        left = ((own - now) / (1 + i // size * later) for i, own in enumerate(deadlines))
        return 1000 * min(left)

    async def run(self) -> None:
        """Answers requests until it is cancelled."""
        while True:
            while not self._waiting:
                self._wakes.clear()
                await self._wakes.wait()
            await self._run_batch()

    def _refuse_late(self, now: float) -> None:
        """Refuses who cannot be in time any more, if there are others who can."""
        controller = self._predictor.controller
        late = [
            r
            for r in self._waiting
            if now + controller.estimate_ms(r.depth or controller.depths[-1]) / 1000 > r.deadline
        ]
        if len(late) == len(self._waiting):
            return
        self._take(late)
        for request in late:
            waited_ms = 1000 * (now - request.arrived)
            message = f"After {waited_ms:.1f} ms there is no time left, and others wait."
            request.fail(OverloadedError(message))

    def _take(self, requests: list[_Request]) -> None:
        """Has some wait no longer."""
        taken = set(requests)
        self._waiting = [request for request in self._waiting if request not in taken]

    async def _run_batch(self) -> None:
        now = self._clock()
        self._refuse_late(now)
        controller = self._predictor.controller
        depth = self._waiting[0].depth
        batch = [r for r in self._waiting if r.depth == depth][: self._max_batch_size]
        if depth is None:
            deadlines = [request.deadline for request in self._waiting]
            pace_ms = 0.0 if self._refused else self._pace_ms(deadlines, now)
            depth = controller.choose(pace_ms, len(batch))
        self._refused = False
        self._take(batch)
        images = torch.stack([request.image for request in batch])
        self._done_at = now + controller.estimate_ms(depth, len(batch)) / 1000
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(self._thread, self._predictor.run, images, depth)
        except Exception as error:
            for request in batch:
                request.fail(error)
            return
        finally:
            self._done_at = None
        for request, own in zip(batch, found, strict=True):
            try:
                check_output(own, depth)
            except NonFiniteError as error:
                request.fail(error)
                continue
            if not request.answer.done():
                waited_ms = 1000 * (now - request.arrived)
                request.answer.set_result(Answer(own, depth, len(batch), waited_ms))
