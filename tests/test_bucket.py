"""A limit holds over every stretch of time, for whoever asks and however often."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ckptmgr.bucket import Bucket, bytes_per_second

asked = st.lists(st.tuples(st.floats(0, 10), st.integers(0, 1 << 30)), min_size=1, max_size=40)


def begins(rate: float, asked: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """When each reservation may begin, and its bytes; each is asked for after a pause."""
    now = 0.0
    bucket = Bucket(rate, lambda: now)
    found = []
    for pause, nbytes in asked:
        now += pause
        found.append((now + bucket.reserve(nbytes), nbytes))
    return found


@given(rate=st.floats(1e3, 1e11), asked=asked)
@settings(max_examples=40, deadline=None)
def test_no_stretch_of_time_has_more_than_the_limit_and_one_reservation(
    rate: float, asked: list[tuple[float, int]]
) -> None:
    found = begins(rate, asked)
    most = max(nbytes for _, nbytes in found)
    for first, (start, _) in enumerate(found):
        for last in range(first, len(found)):
            moved = sum(nbytes for _, nbytes in found[first : last + 1])
            allowed = rate * (found[last][0] - start) + most
            assert moved <= allowed * (1 + 1e-6) + 1


@given(rate=st.floats(1e3, 1e11), asked=asked)
@settings(max_examples=40, deadline=None)
def test_first_come_first_served_and_nobody_waits_for_less_than_the_link_is_taken(
    rate: float, asked: list[tuple[float, int]]
) -> None:
    found = begins(rate, asked)
    assert [start for start, _ in found] == sorted(start for start, _ in found)
    now, free = 0.0, 0.0
    for (pause, nbytes), (start, _) in zip(asked, found, strict=True):
        now += pause
        assert abs(start - max(now, free)) <= 1e-6 * (1 + start)
        free = max(now, free) + nbytes / rate


def test_a_gigabit_is_a_thousand_million_bits() -> None:
    assert bytes_per_second(8) == 1e9
