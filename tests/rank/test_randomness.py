"""Generators of NumPy come back with the bit generator that they were given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from ckptmgr.errors import StateMismatchError, UnsupportedLeafError
from ckptmgr.rank.place import place
from rank.slot import snapshot

KINDS = ["MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64"]
RANDOM: Any = np.random


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    before, state = RANDOM.get_bit_generator(), RANDOM.get_state(legacy=False)
    yield
    RANDOM.set_bit_generator(before)
    RANDOM.set_state(state)


@pytest.mark.parametrize("live", ["MT19937", "SFC64"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_generator_of_the_process_may_be_any_of_numpy(kind: str, live: str) -> None:
    RANDOM.set_bit_generator(getattr(RANDOM, kind)(3))
    RANDOM.standard_normal()  # one of the Gaussian numbers of a pair is kept
    with snapshot({"x": 1}, rng=True) as saved:
        expected = RANDOM.standard_normal(3).tolist()
        RANDOM.set_bit_generator(getattr(RANDOM, live)(4))
        place({"x": 1}, saved)
    assert type(RANDOM.get_bit_generator()).__name__ == kind
    assert RANDOM.standard_normal(3).tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_random_state_may_have_any_bit_generator_of_numpy(kind: str) -> None:
    state = {"same": np.random.RandomState(getattr(RANDOM, kind)(3)), "other": None}
    state["other"] = np.random.RandomState(getattr(RANDOM, kind)(5))
    same, other = np.random.RandomState(getattr(RANDOM, kind)(7)), np.random.RandomState(7)
    state["same"].standard_normal()
    live = {"same": same, "other": None}
    with snapshot(state) as saved:
        place(live, saved)
    assert live["same"] is same
    for name, item in state.items():
        assert live[name].standard_normal(3).tolist() == item.standard_normal(3).tolist()
    live = {"same": same, "other": other}
    if kind != "MT19937":
        with snapshot(state) as saved, pytest.raises(StateMismatchError, match="other: is in the"):
            place(live, saved)


class PCG65(np.random.PCG64):
    """Of another library."""


def test_a_bit_generator_of_another_library_is_refused_when_saved() -> None:
    RANDOM.set_bit_generator(PCG65(3))
    with (
        pytest.raises(UnsupportedLeafError, match=r"rng/numpy: has the bit generator PCG65"),
        snapshot({"x": 1}, rng=True),
    ):
        pass
