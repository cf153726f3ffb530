"""Batches, depths and refusals on a made-up machine."""

import asyncio
import threading
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teamnet_pl.deploy.runtime.controller import DepthController
from teamnet_pl.deploy.serving.batcher import Batcher, OverloadedError

MILLISECONDS = {"d7": 10.0, "d2": 4.0, "d0": 2.0}


class Machine:
    """Replaces a Predictor; batches take time on the machine's own clock.

    An image is the number of its request, and so is the answer.
    """

    def __init__(self):
        self.now = 0.0
        self.slowdown = 1.0
        self.batches = []
        self.gate = threading.Event()
        self.gate.set()
        self.controller = DepthController(
            list(MILLISECONDS), self.expected_ms, headroom=0, clock=lambda: self.now
        )
        self.controller.observe("d0", 1, 2.0)

    @staticmethod
    def expected_ms(depth, batch_size):
        return MILLISECONDS[depth] * batch_size

    def run(self, images, depth):
        assert self.gate.wait(30)
        numbers = [int(image) for image in images.flatten()]
        if 666 in numbers:
            raise RuntimeError("out of memory")
        self.batches.append((depth, numbers))
        latency_ms = self.slowdown * self.expected_ms(depth, len(images))
        self.now += latency_ms / 1000
        self.controller.observe(depth, len(images), latency_ms)
        return images.view(-1, 1)


def serve(machine, requests, max_batch_size=4):
    """Sends requests (number, budget in ms, depth) while a first one runs; returns the answers.

    The first request has the number 0 and runs at depth d0.
    """

    async def main():
        batcher = Batcher(machine, max_batch_size, clock=lambda: machine.now)
        running = asyncio.create_task(batcher.run())
        machine.gate.clear()

        async def send(number, budget_ms, depth=None):
            image = torch.full((1,), number)
            return (await batcher.predict([image], machine.now, budget_ms, depth))[0]

        tasks = [asyncio.create_task(send(0, 1e6, "d0"))]
        while batcher._done_at is None:
            await asyncio.sleep(0)
        tasks += [asyncio.create_task(send(*request)) for request in requests]
        await asyncio.sleep(0)
        refused = sum(task.done() for task in tasks)
        assert batcher.waiting == len(requests) - refused
        machine.gate.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        running.cancel()
        return answers[1:]

    return asyncio.run(main())


def test_waiting_requests_run_together():
    machine = Machine()
    answers = serve(machine, [(i, 1000) for i in range(1, 7)])
    assert [numbers for _, numbers in machine.batches] == [[0], [1, 2, 3, 4], [5, 6]]
    assert [int(answer.probabilities) for answer in answers] == [1, 2, 3, 4, 5, 6]
    assert [answer.batch_size for answer in answers] == [4] * 4 + [2] * 2
    assert [answer.waited_ms for answer in answers] == pytest.approx([2] * 4 + [42] * 2)


def test_the_earliest_deadline_first():
    machine = Machine()
    serve(machine, [(1, 900), (2, 800), (3, 700)], max_batch_size=1)
    assert [numbers for _, numbers in machine.batches] == [[0], [3], [2], [1]]


@pytest.mark.parametrize(
    ("budget", "depth"), [(200, "d7"), (93, "d7"), (91, "d2"), (39, "d2"), (37, "d0"), (21, "d0")]
)
def test_batches_are_as_deep_as_all_waiting_requests_allow(budget, depth):
    """8 requests are 2 batches, of which the second is planned with a quarter more time.

    2 ms for the running request, then 40 + 50, 16 + 20 or 8 + 10.
    """
    machine = Machine()
    answers = serve(machine, [(i, budget) for i in range(1, 9)])
    assert machine.batches[1][0] == depth
    assert {len(numbers) for _, numbers in machine.batches[1:]} == {4}
    assert not any(isinstance(answer, Exception) for answer in answers)
    assert machine.now * 1000 <= budget


@pytest.mark.parametrize(("budget", "depth"), [(55, "d2"), (53, "d0")])
def test_only_one_batch_of_several_is_planned_to_be_slow(budget, depth):
    """Two of 20 runs took twice as long: d2's 16 ms are 32 at worst, 20 in the other batch."""
    machine = Machine()
    for slow in [False] * 18 + [True] * 2:
        machine.controller.observe("d0", 1, 2.0 + 2.0 * slow)
    assert machine.controller.slowdown == pytest.approx(2)
    serve(machine, [(i, budget) for i in range(1, 9)])
    assert machine.batches[1][0] == depth


def test_requests_are_refused_if_even_the_shallowest_depth_is_late():
    machine = Machine()
    answers = serve(machine, [(i, 21) for i in range(1, 20)])
    done = [answer for answer in answers if not isinstance(answer, Exception)]
    assert len(done) == 8
    assert {answer.depth for answer in done} == {"d0"}
    refused = [answer for answer in answers if isinstance(answer, OverloadedError)]
    assert len(refused) == 11
    assert "8 images are waiting: even at depth d0, 8.0 ms for 4" in str(refused[0])


@pytest.mark.parametrize(("budget", "depth"), [(2.5, "d0"), (1.5, "d7")])
def test_a_refusal_makes_the_next_batch_shallow(budget, depth):
    """The refused request no longer waits; one that could never be in time does not count."""
    machine = Machine()
    refused = serve(machine, [*((i, 1000) for i in range(1, 7)), (9, budget)])[-1]
    assert isinstance(refused, OverloadedError)
    assert [ran for ran, _ in machine.batches[1:]] == [depth, "d7"]


def test_a_request_that_would_delay_others_too_much_is_refused():
    machine = Machine()
    # 21 ms are enough for two batches of 8 ms at the shallowest depth, but not for a third.
    relaxed = [(i, 21) for i in range(1, 9)]
    answers = serve(machine, [*relaxed, (9, 11)])
    assert isinstance(answers[-1], OverloadedError)
    assert not any(isinstance(answer, Exception) for answer in answers[:-1])


def test_a_request_that_is_alone_is_never_refused():
    machine = Machine()

    async def main():
        batcher = Batcher(machine, clock=lambda: machine.now)
        running = asyncio.create_task(batcher.run())
        answers = [await batcher.predict([torch.ones(1)], 0, budget_ms=0.001) for _ in range(2)]
        running.cancel()
        return answers

    assert [answer.depth for (answer,) in asyncio.run(main())] == ["d0", "d0"]


@pytest.mark.fault(
    "queued requests that can no longer be answered in time",
    "They are refused if other requests can be.",
)
def test_late_requests_give_way_to_those_in_time():
    """The previous batch took a second instead of 2 ms."""
    machine = Machine()
    machine.slowdown = 500
    answers = serve(machine, [(1, 500), (2, 600), (3, 5000)])
    assert all(isinstance(answer, OverloadedError) for answer in answers[:2])
    assert "After 1000.0 ms there is no time left" in str(answers[0])
    assert int(answers[2].probabilities) == 3


def test_late_requests_are_answered_if_all_are_late():
    machine = Machine()
    machine.slowdown = 500
    answers = serve(machine, [(1, 500), (2, 600)])
    assert [answer.depth for answer in answers] == ["d0", "d0"]


def test_requested_depths_run_apart_from_others():
    machine = Machine()
    requests = [(1, 500, "d7"), (2, 600), (3, 700, "d7"), (4, 15)]
    serve(machine, requests)
    # First those without a depth, as deep as the tightest budget allows, then those at d7.
    assert machine.batches[1:] == [("d2", [4, 2]), ("d7", [1, 3])]


def test_a_requested_depth_that_is_too_slow_is_refused():
    machine = Machine()
    (answer,) = serve(machine, [(1, 11, "d7")])
    assert isinstance(answer, OverloadedError)


@pytest.mark.fault("a failing batch", "Its requests fail; the next batch runs.")
def test_a_failing_batch_fails_alone():
    machine = Machine()
    answers = serve(machine, [(666, 100), (2, 900)], max_batch_size=1)
    assert isinstance(answers[0], RuntimeError)
    assert int(answers[1].probabilities) == 2


@pytest.mark.fault("a client that disconnects while it waits", "The other clients are answered.")
def test_a_client_that_disconnects_does_not_affect_the_others():
    machine = Machine()

    async def main():
        batcher = Batcher(machine, 4, clock=lambda: machine.now)
        running = asyncio.create_task(batcher.run())
        machine.gate.clear()
        sent = [
            asyncio.create_task(batcher.predict([torch.full((1,), i)], 0, 1000)) for i in range(3)
        ]
        await asyncio.sleep(0)
        sent[1].cancel()
        machine.gate.set()
        answers = await asyncio.gather(*sent, return_exceptions=True)
        running.cancel()
        return answers

    (first,), gone, (last,) = asyncio.run(main())
    assert (int(first.probabilities), int(last.probabilities)) == (0, 2)
    assert isinstance(gone, asyncio.CancelledError)


def send_images(machine, *requests, during=lambda batcher: None):
    """Sends requests of several images, while a first one of one image runs at d0.

    Args:
        machine: Runs them, at most three images at once.
        *requests: The numbers of the images and the budget in ms of each request.
        during: Is called with the batcher while they wait.
    """

    async def main():
        batcher = Batcher(machine, 3, clock=lambda: machine.now)
        running = asyncio.create_task(batcher.run())
        machine.gate.clear()
        first = asyncio.create_task(batcher.predict([torch.zeros(1)], 0, 1e6, "d0"))
        while batcher._done_at is None:
            await asyncio.sleep(0)
        tasks = [
            asyncio.create_task(batcher.predict([torch.full((1,), i) for i in images], 0, budget))
            for images, budget in requests
        ]
        await asyncio.sleep(0)
        during(batcher)
        machine.gate.set()
        answers = await asyncio.gather(first, *tasks, return_exceptions=True)
        running.cancel()
        return answers[1:]

    return asyncio.run(main())


def test_a_request_of_several_images():
    """They count as so many waiting images, and may run in several batches."""
    machine, waiting = Machine(), []
    answers, other = send_images(
        machine, ([1, 2, 3, 4, 5], 900), ([6], 950), during=lambda b: waiting.append(b.waiting)
    )
    assert waiting == [6]
    assert [int(answer.probabilities) for answer in answers] == [1, 2, 3, 4, 5]
    assert [int(answer.probabilities) for answer in other] == [6]
    assert machine.batches[1:] == [("d7", [1, 2, 3]), ("d7", [4, 5, 6])]


def test_a_request_is_refused_with_all_its_images():
    # After the first batch of 2 ms, five images at d0 take two batches of 6 and 4 ms.
    machine = Machine()
    (refused,) = send_images(machine, ([1, 2, 3, 4, 5], 8))
    assert isinstance(refused, OverloadedError)
    assert len(machine.batches) == 1
    (answers,) = send_images(Machine(), ([1, 2, 3, 4, 5], 20))
    assert len(answers) == 5


def test_the_images_of_a_failed_request_do_not_run():
    machine = Machine()
    failed, other = send_images(machine, ([1, 2, 666, 3, 4, 5, 7, 8], 900), ([9], 950))
    assert isinstance(failed, RuntimeError)
    assert [int(answer.probabilities) for answer in other] == [9]
    # The next batch has begun when the request fails.
    assert machine.batches[1:] == [("d7", [3, 4, 5]), ("d7", [9])]


request_lists = st.lists(
    st.tuples(st.integers(1, 500), st.floats(1, 300), st.sampled_from([None, "d7", "d0"])),
    max_size=40,
    unique_by=lambda request: request[0],
)


@given(request_lists, st.integers(1, 8))
@settings(max_examples=60)
def test_nothing_is_lost_and_nothing_answered_twice(requests, max_batch_size):
    machine = Machine()
    answers = serve(machine, requests, max_batch_size)
    ran = Counter(number for _, numbers in machine.batches for number in numbers)
    for (number, _, depth), answer in zip(requests, answers, strict=True):
        if isinstance(answer, Exception):
            assert isinstance(answer, OverloadedError)
            assert ran[number] == 0
        else:
            assert int(answer.probabilities) == number
            assert ran[number] == 1
            assert depth in (None, answer.depth)
    assert all(len(numbers) <= max_batch_size for _, numbers in machine.batches)


@given(st.lists(st.floats(1, 300), max_size=60), st.integers(1, 8))
@settings(max_examples=60)
def test_admitted_requests_are_in_time(budgets, max_batch_size):
    """If the machine is as fast as expected."""
    machine = Machine()
    answers = serve(machine, list(enumerate(budgets, 1)), max_batch_size)
    for budget, answer in zip(budgets, answers, strict=True):
        if not isinstance(answer, Exception):
            latency_ms = machine.expected_ms(answer.depth, answer.batch_size)
            assert answer.waited_ms + latency_ms <= budget + 1e-6


def test_batch_size_out_of_range():
    with pytest.raises(ValueError, match="max_batch_size must be at least 1, found 0"):
        Batcher(Machine(), 0)
