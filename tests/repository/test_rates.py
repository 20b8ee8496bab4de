"""Rates are those of the thing, however many calls share it and however one of them stumbles."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptmgr.config import MIB
from ckptmgr.repository.rates import BLOCK_BYTES, Meter, Ratio

RATE = 100.0 * MIB


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@given(at_once=st.integers(1, 16), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_calls_that_share_a_link_show_the_rate_of_the_link(at_once: int, seed: int) -> None:
    """Any number under way, which end together or one after the other; pauses do not count."""
    clock, rng = Clock(), random.Random(seed)
    meter, size = Meter(clock), 64 * MIB
    for _ in range(40):
        for _ in range(at_once):
            meter.begin()
        together = rng.random() < 0.5
        clock.now += at_once * size / RATE if together else 0.0
        for _ in range(at_once):
            clock.now += 0.0 if together else size / RATE
            meter.end(size)
        clock.now += rng.uniform(0, 100)  # the store is idle
    assert meter.rate == pytest.approx(RATE, rel=0.01)


def test_nothing_is_known_at_first_and_something_after_one_call() -> None:
    clock = Clock()
    meter = Meter(clock)
    assert meter.rate == 0.0
    meter.begin()
    clock.now += 1
    meter.end(1000)
    assert meter.rate == 1000.0


def test_two_hiccups_change_nothing_and_a_new_rate_is_known_after_three_blocks() -> None:
    clock = Clock()
    meter = Meter(clock)

    def move(rate: float) -> None:
        meter.begin()
        clock.now += BLOCK_BYTES / rate
        meter.end(BLOCK_BYTES)

    for _ in range(5):
        move(RATE)
    move(RATE / 1000)
    move(RATE / 1000)
    assert meter.rate == pytest.approx(RATE)
    move(RATE / 1000)
    assert meter.rate == pytest.approx(RATE / 1000)


def test_a_failed_call_says_nothing() -> None:
    clock = Clock()
    meter = Meter(clock)
    for _ in range(3):
        meter.begin()
        clock.now += 50
        meter.drop()
        meter.begin()
        clock.now += 1
        meter.end(int(RATE))
    assert meter.rate == pytest.approx(RATE)


@given(st.lists(st.tuples(st.floats(1, 1e9), st.floats(1, 1e9)), min_size=1, max_size=20))
@settings(max_examples=40, deadline=None)
def test_a_ratio_lies_between_those_that_were_seen(seen: list[tuple[float, float]]) -> None:
    ratio = Ratio()
    for above, below in seen:
        ratio.saw(above, below)
    quotients = [above / below for above, below in seen]
    assert min(quotients) * 0.999 <= ratio.value <= max(quotients) * 1.001


def test_a_ratio_forgets() -> None:
    ratio = Ratio(half=100.0)
    ratio.saw(1000.0, 100.0)
    for _ in range(20):
        ratio.saw(100.0, 100.0)
    assert ratio.value == pytest.approx(1.0, rel=0.01)
