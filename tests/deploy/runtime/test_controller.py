"""The choice of a depth, on a made-up machine."""

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teamnet_pl.deploy.runtime.controller import WINDOW, DepthController, OverheadEstimator

PROFILED = {"d7": 10.0, "d5": 8.0, "d2": 5.0, "d0": 3.0}
DEPTHS = list(PROFILED)
PERIOD = 0.05  # seconds from one request to the next


def expected_ms(depth, batch_size):
    return batch_size * PROFILED[depth]


class Machine:
    """A made-up machine that runs one request after another on its own clock.

    Args:
        bias: 0 if load slows all depths down alike; above 0 it slows deep ones down more.
        noise: The largest relative change of a run's latency.
    """

    def __init__(self, budget_ms, bias=0.0, noise=0.0, seed=0, **options):
        self.now = 0.0
        self.budget_ms = budget_ms
        self.bias = bias
        self.noise = noise
        self.random = random.Random(seed)
        self.controller = DepthController(DEPTHS, expected_ms, clock=lambda: self.now, **options)

    def latency_ms(self, depth, load):
        slower = (load - 1) * (PROFILED[depth] / PROFILED["d7"]) ** self.bias
        return PROFILED[depth] * (1 + slower)

    def request(self, load, times=1.0):
        """Runs one request; returns its depth and whether it was in time."""
        depth = self.controller.choose(self.budget_ms)
        jitter = 1 + self.random.uniform(-self.noise, self.noise)
        latency_ms = self.latency_ms(depth, load) * jitter * times
        self.controller.observe(depth, 1, latency_ms)
        self.now += PERIOD
        return depth, latency_ms <= self.budget_ms

    def run(self, load, seconds):
        return [self.request(load) for _ in range(round(seconds / PERIOD))]

    def deepest(self, load, headroom=0.1):
        """The deepest depth within budget for a known load."""
        allowed = self.budget_ms * (1 - headroom)
        return next((d for d in DEPTHS if self.latency_ms(d, load) <= allowed), DEPTHS[-1])


def depths(requests):
    return [depth for depth, _ in requests]


def misses(requests):
    return sum(not in_time for _, in_time in requests)


def rises(requests):
    """How often the depth became deeper."""
    return sum(PROFILED[after] > PROFILED[before] for before, after in pairwise(depths(requests)))


loads = st.floats(1, 4)
budgets = st.floats(13.5, 60)  # between the latencies of d0 and of d7 at a load of 4, with headroom


@pytest.mark.parametrize(("budget", "depth"), [(100, "d7"), (11, "d5"), (7, "d2"), (4, "d0")])
def test_the_deepest_depth_that_fits_runs(budget, depth):
    machine = Machine(budget)
    machine.request(1)
    assert machine.controller.choose(budget) == depth


def test_batches_are_slower():
    machine = Machine(1)
    machine.request(1)
    assert [machine.controller.choose(45, n) for n in (4, 5, 8, 99)] == ["d7", "d5", "d2", "d0"]
    assert machine.controller.estimate_ms("d5", 4) == pytest.approx(32)


def test_a_typical_run_takes_less_than_the_estimate():
    machine = Machine(13)
    assert machine.controller.typical_share == 1
    machine.run(1, 5)
    assert machine.controller.typical_share == pytest.approx(1)
    machine.run(2.5, 0.1)
    assert machine.controller.slowdown == pytest.approx(2.5)
    assert machine.controller.typical_share == pytest.approx(1 / 2.5)
    machine.run(2.5, 1)
    assert machine.controller.typical_share == pytest.approx(1)


def test_the_shallowest_depth_runs_until_a_latency_is_known():
    machine = Machine(1000)
    assert machine.controller.slowdown == math.inf
    assert machine.controller.choose(1e9) == "d0"


def test_the_shallowest_depth_runs_if_none_fits():
    machine = Machine(1)
    assert depths(machine.run(2, 5)) == ["d0"] * 100


def test_steps_down_at_the_second_slow_request_and_back_late():
    machine = Machine(13)
    assert set(depths(machine.run(1, 5))[1:]) == {"d7"}
    slow = depths(machine.run(2, 20))
    assert slow[:4] == ["d7", "d7", "d2", "d2"]
    assert set(slow[2:]) == {"d2"}
    back = depths(machine.run(1, 20))
    # After 19 requests all but one in the window are fast; a second of waiting precedes each step.
    assert set(back[:20]) == {"d2"}
    assert back[-1] == "d7"
    assert rises([(d, True) for d in back]) <= 2


def test_one_slow_request_changes_nothing():
    machine = Machine(13)
    machine.run(1, 5)
    for _ in range(10):
        machine.request(1, times=30)
        assert set(depths(machine.run(1, 1))) == {"d7"}


def test_the_depth_rises_one_step_at_a_time():
    machine = Machine(12)
    machine.run(3.5, 5)
    back = depths(machine.run(1, 20))
    assert list(dict.fromkeys(back)) == ["d0", "d2", "d5", "d7"]
    assert all(back.count(depth) >= 20 for depth in set(back))  # a second each


def test_the_slowdown_falls_to_the_measured_one_and_no_further():
    machine = Machine(12)
    machine.run(3.5, 5)
    loads = []
    for _ in range(400):
        machine.request(1.5)
        loads.append(machine.controller.slowdown)
    assert min(loads) == pytest.approx(1.5)
    assert loads[-1] == pytest.approx(1.5)


def test_a_slightly_lower_load_changes_nothing():
    machine = Machine(60)
    machine.run(1, 5)
    machine.run(0.92, 20)
    assert machine.controller.slowdown == pytest.approx(1)
    machine.run(0.88, 20)
    assert machine.controller.slowdown == pytest.approx(0.88)


def test_a_lull_shorter_than_the_wait_changes_nothing():
    machine = Machine(60)
    for _ in range(20):
        machine.run(2, 0.1)
        machine.run(1, 1.2)  # the window has forgotten after 19 of 24 requests: a lull of 1/4 s
        assert machine.controller.slowdown == pytest.approx(2)


def probes(machine, load, seconds):
    """The times at which the depth became deeper."""
    begin, requests = machine.now, machine.run(load, seconds)
    pairs = enumerate(pairwise(depths(requests)), 1)
    return [begin + i * PERIOD for i, (a, b) in pairs if PROFILED[b] > PROFILED[a]]


def test_failing_attempts_become_rare():
    """Load slows d5 down so much more than d2 that d5 seems to fit after runs at d2."""
    machine = Machine(14, bias=2)
    times = probes(machine, 3, 200)
    gaps = [b - a for a, b in pairwise(times)]
    assert all(b > a for a, b in pairwise(gaps[:4]))
    assert min(gaps[4:]) >= 16
    assert len(times) > 8  # but they never end


def test_a_lasting_return_makes_the_next_one_fast_again():
    machine = Machine(14, bias=2)
    machine.run(3, 200)
    machine.run(1, 120)
    machine.run(3, 0.5)
    times = probes(machine, 1, 20)
    assert machine.controller.choose(14) == "d7"
    assert times[-1] - times[0] < 10


def test_a_faster_machine_than_the_profiled_one():
    machine = Machine(6)
    machine.run(0.5, 1)
    assert machine.controller.choose(6) == "d7"


@given(st.lists(loads, min_size=1, max_size=8), budgets)
def test_only_a_rise_of_the_load_costs_requests_and_only_two(pattern, budget):
    machine = Machine(budget)
    for before, load in zip([0, *pattern], pattern, strict=False):
        requests = machine.run(load, 10)
        assert misses(requests) <= (2 if load > before else 0)


@given(st.lists(loads, min_size=1, max_size=6), budgets, st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=50)
def test_95_of_100_are_in_time(pattern, budget, bias, seed):
    machine = Machine(budget, bias, noise=0.05, seed=seed)
    for load in pattern:
        assert misses(machine.run(load, 10)) <= 10  # of 200


@given(loads, budgets, st.floats(0, 2), st.floats(0, 0.3), st.integers(0, 99))
@settings(max_examples=40)
def test_no_thrash_under_the_same_load(load, budget, bias, noise, seed):
    """Even if one slowdown does not fit all depths, and on a noisy machine."""
    machine = Machine(budget, bias, noise, seed)
    requests = machine.run(load, 200)
    # Waits of 1, 2, 4 and 8 seconds, then of 16 seconds; a new minimum may restart the sequence.
    assert rises(requests) <= 2 * (4 + 200 / 16)
    assert rises(requests[len(requests) // 2 :]) <= 4 + 100 / 16


@given(loads, budgets, st.integers(0, 99))
@settings(max_examples=50)
def test_no_thrash_if_the_remaining_budget_varies(load, budget, seed):
    """By less than the headroom, because the time to read the images varies."""
    machine = Machine(budget)
    machine.run(load, 5)
    left = random.Random(seed)
    chosen = [machine.controller.choose(budget * left.uniform(0.92, 1)) for _ in range(300)]
    assert sum(a != b for a, b in pairwise(chosen)) <= 1


@given(loads, budgets, st.floats(0, 2))
@settings(max_examples=50)
def test_the_depth_returns_when_the_load_ends(load, budget, bias):
    machine = Machine(budget, bias)
    machine.run(load, 30)
    machine.run(1, 120)
    assert machine.controller.choose(budget) == machine.deepest(1)


@given(st.lists(loads, min_size=1, max_size=6), budgets)
@settings(max_examples=50)
def test_steady_state_is_the_best_choice_for_the_known_load(pattern, budget):
    """Except for the headroom, which the current depth does not need, and the dead band."""
    machine = Machine(budget)
    for load in pattern:
        machine.run(load, 60)
        chosen = machine.controller.choose(budget)
        assert PROFILED[chosen] <= PROFILED[machine.deepest(load, headroom=0)]
        assert PROFILED[chosen] >= PROFILED[machine.deepest(load, headroom=0.2)]


def test_each_budget_gets_its_own_depth():
    machine = Machine(1)
    machine.request(1)
    assert [machine.controller.choose(b) for b in (12, 4, 9, 6)] == ["d7", "d0", "d5", "d2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"headroom": 1}, "headroom must be in"),
        ({"headroom": -0.1}, "headroom must be in"),
        ({"wait_s": 0}, "wait_s must be a positive"),
        ({"wait_s": math.inf}, "wait_s must be a positive"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        DepthController(DEPTHS, expected_ms, **options)


def test_no_depths():
    with pytest.raises(ValueError, match="at least one depth"):
        DepthController([], expected_ms)


def test_the_wait_of_every_call_is_overhead_and_more_is_delay():
    """Reading takes 2 ms of work and 30 ms of waiting for a disk."""
    overhead = OverheadEstimator()
    assert overhead.split(elapsed_ms=32, cpu_ms=2) == (32, 0)
    assert overhead.split(elapsed_ms=40, cpu_ms=2) == (32, 8)  # another process had the core
    assert overhead.split(elapsed_ms=33, cpu_ms=3) == (33, 0)  # more work
    assert overhead.split(elapsed_ms=12, cpu_ms=2) == (12, 0)  # a faster disk
    assert overhead.split(elapsed_ms=32, cpu_ms=2) == (12, 20)


def test_a_wait_that_stays_becomes_overhead():
    overhead = OverheadEstimator()
    overhead.split(elapsed_ms=1, cpu_ms=1)
    calls = [overhead.split(elapsed_ms=11, cpu_ms=1) for _ in range(WINDOW)]
    assert calls == [(1, 10)] * (WINDOW - 1) + [(11, 0)]


times_ms = st.floats(0, 1e4)


@given(st.lists(st.tuples(times_ms, times_ms), min_size=1, max_size=60))
def test_overhead_and_delay_are_the_whole_time(calls):
    overhead = OverheadEstimator()
    for cpu_ms, wait_ms in calls:
        overhead_ms, delay_ms = overhead.split(cpu_ms + wait_ms, cpu_ms)
        assert overhead_ms + delay_ms == pytest.approx(cpu_ms + wait_ms)
        assert delay_ms >= 0
