"""Batches the images that wait for one net, at the depth that all of them allow."""

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

from teamnet_pl.deploy.runtime.predictor import NonFiniteError, Predictor, check_output
from teamnet_pl.errors import TeamNetError

LATER_BATCH_FACTOR = 1.25
"""Planned latency of a batch after the next one, as a multiple of its estimated latency."""


class OverloadedError(Exception):
    """Not even the shallowest depth can answer all waiting requests in time, or none is loaded."""


@dataclass(frozen=True)
class Answer:
    """The answer to an image of a request.

    Attributes:
        probabilities: Class probabilities, shape ``(classes,)``.
        depth: Name of the depth that ran.
        batch_size: Number of images that ran at once.
        waited_ms: Milliseconds from the arrival of the request to the start of the run.
    """

    probabilities: Tensor
    depth: str
    batch_size: int
    waited_ms: float


@dataclass(eq=False)  # compared by identity
class _Request:
    """One image of a request over HTTP."""

    image: Tensor
    arrived: float
    deadline: float
    depth: str | None  # None: the deepest that the deadline allows
    answer: asyncio.Future[Answer] = field(default_factory=asyncio.Future)

    def waited_ms(self, now: float) -> float:
        return 1000 * (now - self.arrived)

    def finish(self, answer: Answer) -> None:
        try:
            check_output(answer.probabilities, answer.depth)
        except NonFiniteError as error:
            self.fail(error)
        else:
            if not self.answer.done():  # it is done if the client has disconnected
                self.answer.set_result(answer)

    def fail(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class Batcher:
    """Runs requests in batches, the earliest deadline first.

    The requests that wait when a batch is done form the next one. Its depth is the deepest with
    which all waiting requests, at that pace, are answered in time. So the more requests wait, the
    shallower they run: depth gives way first. If a request has been refused since the last batch
    began, the next batch runs at the shallowest depth, since the refused request no longer counts
    as waiting. A request that can no longer be answered in time, because an earlier batch took too
    long, is refused in favor of requests that can.

    Args:
        predictor: Runs the net. Batches run on a thread of their own, one at a time.
        max_batch_size: Largest number of images that run at once.
        clock: Returns the time in seconds.

    Attributes:
        predictor: Runs the net.
        clock: Returns the time in seconds.

    Raises:
        TeamNetError: If the batch size is not positive.
    """

    def __init__(
        self,
        predictor: Predictor,
        max_batch_size: int = 8,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if max_batch_size < 1:
            raise TeamNetError(f"max_batch_size must be at least 1, found {max_batch_size}.")
        self.clock = clock
        self.predictor = predictor
        self._max_batch_size = max_batch_size
        self._waiting: list[_Request] = []  # by deadline
        self._arrival = asyncio.Event()
        self._done_at: float | None = None  # when the running batch, if any, should be done
        self._has_refused = False  # since the last batch began, one that alone would be in time
        self._thread = ThreadPoolExecutor(1, "predictor")

    @property
    def waiting(self) -> int:
        """Number of waiting images."""
        return len(self._waiting)

    async def predict(
        self,
        images: Sequence[Tensor],
        arrived: float,
        budget_ms: float,
        depth: str | None = None,
    ) -> list[Answer]:
        """Answers all images of a request, or none.

        Args:
            images: Preprocessed images, each of shape ``(channels, height, width)``.
            arrived: Time at which the request arrived, by the clock.
            budget_ms: Milliseconds from the arrival to the answer.
            depth: Name of the depth to run; by default the deepest that there is time for.

        Raises:
            OverloadedError: If other requests leave too little time for the shallowest depth, now
                or later.
            NonFiniteError: If the output is not finite.
        """
        self.admit(arrived, budget_ms, depth, len(images))
        deadline = arrived + budget_ms / 1000
        requests = [_Request(image, arrived, deadline, depth) for image in images]
        for request in requests:
            insort(self._waiting, request, key=attrgetter("deadline"))
        self._arrival.set()
        try:
            return await asyncio.gather(*(request.answer for request in requests))
        except BaseException:
            self._remove(requests)  # nobody waits for the other images of the request
            raise

    def admit(
        self, arrived: float, budget_ms: float, depth: str | None = None, count: int = 1
    ) -> None:
        """Refuses a request that `predict` would refuse now, for example before it is decoded.

        Args:
            arrived: Time at which the request arrived, by the clock.
            budget_ms: Milliseconds from the arrival to the answer.
            depth: Name of the depth to run; by default the deepest that there is time for.
            count: Number of images.

        Raises:
            OverloadedError: If other requests leave too little time for the shallowest depth.
        """
        if not self._waiting and self._done_at is None:
            return  # there is no other request; and its run corrects an estimate that is too high
        deadlines = [request.deadline for request in self._waiting]
        deadlines = sorted(deadlines + count * [arrived + budget_ms / 1000])
        controller = self.predictor.controller
        depth = depth or controller.depths[-1]
        size = min(len(deadlines), self._max_batch_size)
        batch_ms = controller.estimate_ms(depth, size)
        if self._pace_ms(deadlines, max(self.clock(), self._done_at or 0)) < batch_ms:
            alone_ms = controller.estimate_ms(depth, min(count, self._max_batch_size))
            self._has_refused |= budget_ms >= alone_ms
            raise OverloadedError(
                f"{len(self._waiting)} images are waiting: even at depth {depth}, {batch_ms:.1f} "
                f"ms for {size}, this request or another would be late."
            )

    def _pace_ms(self, deadlines: Sequence[float], now: float) -> float:
        """Milliseconds that each batch may take so that all waiting requests are in time.

        Of several batches one may be slow. That all of them are is so rare that it is not planned
        for. But the longer the queue, the more delays are likely.
        """
        later = LATER_BATCH_FACTOR * self.predictor.controller.typical_share
        pace = (
            (deadline - now) / (1 + index // self._max_batch_size * later)
            for index, deadline in enumerate(deadlines)
        )
        return 1000 * min(pace)

    async def warm_up(self) -> None:
        """Runs all depths and batch sizes, so that none is run for the first time by a request."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self.predictor.warm_up, self._max_batch_size)

    async def run(self) -> None:
        """Answers requests until it is cancelled."""
        while True:
            while not self._waiting:
                self._arrival.clear()
                await self._arrival.wait()
            await self._run_batch()

    def _refuse_late(self, now: float) -> None:
        """Refuses requests that can no longer be in time, unless all of them are late."""
        controller = self.predictor.controller
        late = [
            request
            for request in self._waiting
            if now + controller.estimate_ms(request.depth or controller.depths[-1]) / 1000
            > request.deadline
        ]
        if len(late) == len(self._waiting):
            return
        self._remove(late)
        for request in late:
            request.fail(
                OverloadedError(
                    f"After {request.waited_ms(now):.1f} ms there is no time left, and other "
                    "requests are waiting."
                )
            )

    def _remove(self, requests: list[_Request]) -> None:
        """Removes requests from the queue."""
        removed = set(requests)
        self._waiting = [request for request in self._waiting if request not in removed]

    def _choose_depth(self, batch_size: int, now: float) -> str:
        """Chooses the depth of the next batch, before its requests leave the queue."""
        deadlines = [request.deadline for request in self._waiting]
        pace_ms = 0.0 if self._has_refused else self._pace_ms(deadlines, now)
        return self.predictor.controller.choose(pace_ms, batch_size)

    async def _run_batch(self) -> None:
        now = self.clock()
        self._refuse_late(now)
        requested = self._waiting[0].depth
        batch = [request for request in self._waiting if request.depth == requested]
        batch = batch[: self._max_batch_size]
        depth = requested or self._choose_depth(len(batch), now)
        self._has_refused = False
        self._remove(batch)
        images = torch.stack([request.image for request in batch])
        self._done_at = now + self.predictor.controller.estimate_ms(depth, len(batch)) / 1000
        loop = asyncio.get_running_loop()
        try:
            outputs = await loop.run_in_executor(self._thread, self.predictor.run, images, depth)
        except Exception as error:
            for request in batch:
                request.fail(error)
            return
        finally:
            self._done_at = None
        for request, output in zip(batch, outputs, strict=True):
            request.finish(Answer(output, depth, len(batch), request.waited_ms(now)))
