"""As many calls at once as a store has use for, and no more."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptmgr.repository.width import AT_ONCE_MAX, AT_ONCE_MIN, Width


def rate(width: int, link: float, stream: float) -> float:
    """What a store gives where each call gets at most `stream`, and all together `link`."""
    return min(link, width * stream)


def run(link: float, stream: float, rounds: int, noise: float = 0.0, seed: int = 0) -> list[int]:
    width, rng, seen = Width(), random.Random(seed), []
    for _ in range(rounds):
        seen.append(width.now)
        width.saw(rate(width.now, link, stream) * rng.lognormvariate(0, noise or 1e-9))
    return seen


def test_a_disk_that_one_call_saturates_gets_two_but_for_a_try_now_and_then() -> None:
    seen = run(link=1000, stream=1000, rounds=300)
    assert seen.count(2) >= 290
    assert set(seen) <= {2, 4}


@pytest.mark.parametrize("streams", [1, 2, 4, 8, 16, 100])
def test_a_store_with_latency_gets_as_many_as_fill_the_link(streams: int) -> None:
    seen = run(link=1000, stream=1000 / streams, rounds=300)
    settled = max(set(seen[20:]), key=seen[20:].count)
    assert settled == max(AT_ONCE_MIN, min(streams, AT_ONCE_MAX))
    assert seen.index(settled) < 10


@given(
    link=st.floats(1e6, 1e10), streams=st.floats(0.5, 40), seed=st.integers(0, 99),
    noise=st.floats(0, 0.05),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_it_stays_in_its_bounds_and_most_rounds_bring_what_the_best_width_would(
    link: float, streams: float, seed: int, noise: float
) -> None:
    seen = run(link, link / streams, 400, noise, seed)
    assert all(AT_ONCE_MIN <= width <= AT_ONCE_MAX for width in seen)
    best = rate(AT_ONCE_MAX, link, link / streams)
    got = sum(rate(width, link, link / streams) for width in seen[20:]) / len(seen[20:])
    assert got >= 0.75 * best


def test_it_comes_back_when_the_latency_is_gone() -> None:
    width = Width()
    for _ in range(20):
        width.saw(rate(width.now, 1000, 60))
    assert width.now >= 8
    for _ in range(400):
        width.saw(rate(width.now, 1000, 1000))
    assert width.now <= 4


def test_places_that_are_not_used_are_given_up() -> None:
    width = Width()
    width.saw(100.0)
    assert width.now == 4
    width.unused()
    assert width.now == 2
    width.unused()
    assert width.now == 2
