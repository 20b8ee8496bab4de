"""A policy is what its text says, and what can not be one is refused with a hint."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ckptmgr
from ckptmgr.errors import UsageError
from ckptmgr.keep import Best, Keep

counts = st.integers(0, 10**6)
best = st.builds(
    Best,
    st.sampled_from(["loss", "grad_norm", "eval/acc", "_x.y-z"]),
    st.sampled_from(["min", "max"]),
    st.integers(1, 99),
)
policies = st.builds(
    Keep,
    st.integers(1, 10**6),
    counts,
    counts,
    counts,
    st.lists(best, max_size=3),
)


@given(keep=policies)
def test_the_text_of_a_policy_is_the_policy(keep: Keep) -> None:
    assert Keep.of(str(keep)) == Keep.of(keep.wire) == Keep.of(keep) == keep
    assert str(Keep.of(str(keep))) == str(keep)


def test_how_people_write_it() -> None:
    keep = ckptmgr.Keep(last=3, every=1000, hourly=24, daily=7, best=("loss", "min", 3))
    assert str(keep) == "last=3,every=1000,hourly=24,daily=7,best=loss:min:3"
    assert Keep.of(5) == Keep.of("5") == Keep(5)
    assert Keep(5).wire == 5
    assert Keep(best=["loss:min:3", ("acc", "max", 1)]).best == (
        Best("loss", "min", 3),
        Best("acc", "max", 1),
    )
    assert Keep.of("every=10") == Keep(3, 10)


@pytest.mark.parametrize(
    "given",
    [
        0,
        -1,
        True,
        1.5,
        None,
        "",
        "x",
        "last=0",
        "last=1,last=2",
        "every=-1",
        "best=loss",
        "best=loss:min:0",
        "best=loss:mean:1",
        "best=a b:min:1",
        "last=3;every=2",
        "9" * 600,
        [3],
        ("loss", "min", 3),
    ],
)
def test_what_is_no_policy_is_refused(given: Any) -> None:
    with pytest.raises(UsageError, match="keep"):
        Keep.of(given)


@pytest.mark.parametrize(
    "arguments",
    [
        {"last": 0},
        {"every": True},
        {"hourly": -1},
        {"best": 3},
        {"best": ("loss", "min")},
        {"best": [("loss", "min", 3, 4)]},
        {"best": [("x", "min", 3)] * 60},
    ],
)
def test_a_policy_of_wrong_parts_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="keep"):
        Keep(**arguments)
