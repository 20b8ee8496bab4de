"""Breakout: an expression over the tags of a step, as `loss > 4 or grad_norm > 100`.

    either = both ("or" both)*      both = one ("and" one)*
    one    = "not" one | "(" either ")" | tag operator value
    tag    = a letter or _, then letters, digits and _ . / -
    operator = > >= < <= == !=      value = a number, or text in quotes, or true, or false

A comparison with a tag that a step does not have is false, and so is one of a number with text. A
tag of nan is beyond every bound: `loss > 4` and `loss < 4` both hold for it.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from ckptmgr.errors import UsageError
from ckptmgr.keep import TAG
from ckptmgr.types import Tags

CHARS_MAX = 200
"""Longest expression: its depth, and with that of every call below, is bounded by it."""

_TOKEN = re.compile(
    rf"\s*(?:(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<word>{TAG})"
    r"|(?P<text>'[^']*'|\"[^\"]*\")|(?P<sign>>=|<=|==|!=|>|<|\(|\)))"
)
_COMPARE: dict[str, Callable[[float | str, float | str], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
}
_ODD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
"""How numbers that JSON does not have are kept as tags."""

Holds = Callable[[Tags], bool]


@dataclass(frozen=True, slots=True)
class Breakout:
    """A parsed expression: `holds` tells whether a step with these tags breaks out."""

    text: str
    holds: Holds

    @classmethod
    def parse(cls, text: str) -> Breakout:
        """Read an expression.

        Raises:
            UsageError: it is none.
        """
        if len(text) > CHARS_MAX:
            raise UsageError(f"has more than {CHARS_MAX} characters", subject="before")
        reader = _Reader(text)
        holds = reader.either()
        if reader.kind:
            raise reader.refuse()
        return cls(text, holds)


class _Reader:
    """Reads one expression from left to right; `kind` and `sees` are what comes next."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self.kind = self.sees = ""
        self._next()

    def _next(self) -> str:
        """Go on to the next token; returns the one that was read."""
        read = self.sees
        rest = self._text[self._at :]
        match = _TOKEN.match(rest)
        if match is None:
            if rest.strip():
                self.kind, self.sees = "?", rest.strip()
                return read
            self.kind = self.sees = ""
            return read
        self._at += match.end()
        self.kind = match.lastgroup or ""
        self.sees = match[self.kind]
        return read

    def refuse(self) -> UsageError:
        """What to raise over the next token."""
        where = f"at {self.sees[:40]!r}" if self.kind else "at its end"
        return UsageError(
            f"{self._text!r} can not be read {where}",
            subject="before",
            hint='Write tags, numbers and comparisons, as "loss > 4 or grad_norm >= 100".',
        )

    def either(self) -> Holds:
        """Comparisons joined by `or`."""
        found = [self._both()]
        while self.sees == "or":
            self._next()
            found.append(self._both())
        return lambda tags: any(one(tags) for one in found)

    def _both(self) -> Holds:
        found = [self._one()]
        while self.sees == "and":
            self._next()
            found.append(self._one())
        return lambda tags: all(one(tags) for one in found)

    def _one(self) -> Holds:
        if self.sees == "not":
            self._next()
            inverted = self._one()
            return lambda tags: not inverted(tags)
        if self.kind == "sign" and self.sees == "(":
            self._next()
            inner = self.either()
            if self.sees != ")":
                raise self.refuse()
            self._next()
            return inner
        return self._comparison()

    def _comparison(self) -> Holds:
        if self.kind != "word" or self.sees in ("and", "or", "true", "false"):
            raise self.refuse()
        tag = self._next()
        compare = _COMPARE.get(self.sees)
        if compare is None:
            raise self.refuse()
        self._next()
        bound = self._value()
        return lambda tags: _compared(tags.get(tag), compare, bound)

    def _value(self) -> float | str:
        kind, seen = self.kind, self.sees
        if kind == "number":
            self._next()
            return float(seen)
        if kind == "text":
            self._next()
            return seen[1:-1]
        if seen in ("true", "false"):
            self._next()
            return float(seen == "true")
        raise self.refuse()


def _compared(
    value: float | str | bool | None,
    compare: Callable[[float | str, float | str], bool],
    bound: float | str,
) -> bool:
    if value is None:
        return False
    if isinstance(bound, str):
        return isinstance(value, str) and compare(value, bound)
    number = _ODD.get(value) if isinstance(value, str) else float(value)
    if number is None:
        return False
    return math.isnan(number) or compare(number, bound)
