"""What an expression over tags holds for, and that nothing else is read as one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.errors import UsageError
from ckptmgr.repository.breakout import CHARS_MAX, Breakout
from ckptmgr.types import Tags

TAGS: Tags = {"loss": 4.5, "grad-norm": 7, "phase": "warm up", "good": True, "bad": "nan"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("loss > 4", True),
        ("loss>4.5", False),
        ("loss >= 4.5", True),
        ("loss < -1e3", False),
        ("loss == 4.5 and grad-norm != 8", True),
        ("loss > 9 or grad-norm > 6", True),
        ("loss > 9 or grad-norm > 6 and loss < 0", False),
        ("(loss > 9 or grad-norm > 6) and loss > 0", True),
        ("not loss > 9", True),
        ("not (not loss > 9)", False),
        ("phase == 'warm up'", True),
        ('phase != "warm up"', False),
        ("phase > 3", False),
        ("loss == 'x'", False),
        ("good == true", True),
        ("good == false", False),
        ("missing > 0 or missing <= 0 or missing != 1", False),
        ("bad > 4", True),
        ("bad < 4", True),
        (" loss   >+.5 ", True),
    ],
)
def test_what_holds(text: str, expected: bool) -> None:
    assert Breakout.parse(text).holds(TAGS) is expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "loss",
        "loss >",
        "> 4",
        "loss > 4 5",
        "loss > 4 and",
        "loss > 4 or or x < 1",
        "(loss > 4",
        "loss > 4)",
        "loss > grad",
        "loss = 4",
        "4 < loss",
        "loss.__class__ > ()",
        "f(x) > 1",
        "loss > 4; x",
        "and > 4",
        "not",
        "loss > 'x",
        "loss > 4 # x",
        "(" * 300,
        "a > 1 or " * 40,
    ],
)
def test_what_is_no_expression_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="before"):
        Breakout.parse(text)


@given(st.text(max_size=CHARS_MAX + 20) | st.text("()>=<! notadrl4'.", max_size=CHARS_MAX))
def test_no_text_does_anything_else_than_be_read_or_refused(text: str) -> None:
    try:
        parsed = Breakout.parse(text)
    except UsageError:
        return
    assert parsed.holds(TAGS) in (True, False)
