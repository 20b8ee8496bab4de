"""Raw or compressed is decided by when the store has it all, never against that."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptmgr.repository.choice import (
    GAIN_MIN,
    MIXED_GAIN_MIN,
    Seen,
    compression_pays,
    finish_seconds,
    gain,
    gain_wanted,
)

rates = st.floats(1e6, 1e11)
seen = st.builds(Seen, rates, rates, st.floats(0.5, 100))
arrivals = st.lists(st.tuples(st.floats(0, 100), st.floats(0, 1e10)), max_size=6)


@given(seen=seen)
@settings(max_examples=40, deadline=None)
def test_gain_is_that_of_the_best_division_of_the_bytes(seen: Seen) -> None:
    """Compared with a search: a share of the bytes is compressed, beside the store."""
    n = 1e9
    best = min(
        max(share * n / seen.codec, ((1 - share) * n + share * n / seen.ratio) / seen.store)
        for share in (k / 2000 for k in range(2001))
    )
    assert gain(seen) == pytest.approx(n / seen.store / best, rel=2e-3) or best > n / seen.store
    assert 1.0 <= gain(seen) <= max(seen.ratio, 1.0)


@given(store=rates, arrivals=arrivals)
@settings(max_examples=40, deadline=None)
def test_the_store_ends_with_the_last_and_never_sooner_than_its_rate_allows(
    store: float, arrivals: list[tuple[float, float]]
) -> None:
    end = finish_seconds(store, arrivals)
    assert end >= sum(nbytes for _, nbytes in arrivals) / store * (1 - 1e-9)
    assert all(end >= ready + nbytes / store - 1e-9 for ready, nbytes in arrivals)
    latest = max((ready for ready, _ in arrivals), default=0.0)
    assert end <= latest + sum(nbytes for _, nbytes in arrivals) / store + 1e-6


@given(seen=seen, others=arrivals, nbytes=st.floats(1, 1e9), ready=st.floats(0, 100))
@settings(max_examples=40, deadline=None)
def test_a_pack_is_compressed_only_if_all_ends_sooner(
    seen: Seen, others: list[tuple[float, float]], nbytes: float, ready: float
) -> None:
    raw = [*others, (0.0, nbytes)]
    compressed = [*others, (ready, nbytes / seen.ratio)]
    pays = compression_pays(seen, raw, compressed)
    sooner = finish_seconds(seen.store, compressed) < finish_seconds(seen.store, raw)
    assert pays == (sooner and gain(seen) >= gain_wanted(seen))
    if seen.ratio <= 1:
        assert not pays
    assert not compression_pays(seen, raw, [*others, (math.inf, nbytes / seen.ratio)])


def test_a_store_that_is_faster_than_the_codec_is_not_compressed_for_to_gain_little() -> None:
    """Both states gain 9 %: of a slow store by compressing all, of a fast one with every core."""
    slow, fast = Seen(50e6, 350e6, 1.09), Seen(390e6, 350e6, 1.11)
    assert GAIN_MIN < gain(fast) < MIXED_GAIN_MIN

    def pays(seen: Seen) -> bool:
        others = [(0.0, 1e9)]
        raw, compressed = [*others, (0.0, 1e8)], [*others, (0.1, 1e8 / seen.ratio)]
        return compression_pays(seen, raw, compressed)

    assert pays(slow)
    assert not pays(fast)
    assert pays(Seen(fast.store, fast.codec, 1.5))


@pytest.mark.parametrize("missing", ["store", "codec", "ratio"])
def test_what_is_not_known_is_not_bet_on(missing: str) -> None:
    values = {"store": 1e6, "codec": 1e9, "ratio": 2.0}
    assert gain(Seen(**values)) == 2.0
    assert gain(Seen(**{**values, missing: 0.0})) == 1.0
