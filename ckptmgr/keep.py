"""Keep: which committed steps a job keeps, as an object, and as the text that travels."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from ckptmgr.errors import UsageError

TEXT_CHARS_MAX = 512
"""Longest policy: it is in the header of a host buffer, in one page with the job's URL."""

TAG = r"[A-Za-z_][A-Za-z0-9_./-]*"
"""What a tag must be called to be named in a policy, or in `--before`."""

_FORMS = "5, or last=3,every=1000,hourly=24,daily=7,best=loss:min:3"


@dataclass(frozen=True, slots=True)
class Best:
    """The `count` steps with the lowest ("min") or highest ("max") value of a tag."""

    tag: str
    order: str
    count: int

    def __str__(self) -> str:
        return f"{self.tag}:{self.order}:{self.count}"


@dataclass(frozen=True, slots=True)
class Keep:
    """Which commits stay. A step stays if one of these rules wants it; the others are given up.

    Args:
        last: the newest so many; two stay whatever this says.
        every: the first step at or after each multiple of so many steps, for ever; 0 is off.
        hourly: the newest of each of the last so many hours that have a step.
        daily: the newest of each of the last so many days (UTC) that have a step.
        best: ("loss", "min", 3) keeps the three steps with the lowest tag `loss`; or several such.

    Held steps, and what a running attempt resumed from, stay besides.

    Raises:
        UsageError: a count that is none, or a tag that can not be named.
    """

    last: int = 3
    every: int = 0
    hourly: int = 0
    daily: int = 0
    best: Any = ()

    def __post_init__(self) -> None:
        for name, least in (("last", 1), ("every", 0), ("hourly", 0), ("daily", 0)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value < 1 << 53:
                raise UsageError(f"{value!r} is not allowed", subject=f"keep: {name}")
        object.__setattr__(self, "best", tuple(map(_best, _each(self.best))))
        if len(str(self)) > TEXT_CHARS_MAX:
            raise UsageError(f"has more than {TEXT_CHARS_MAX} characters", subject="keep")

    def __str__(self) -> str:
        """The one spelling of this policy; `Keep.of` reads it back."""
        rules = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if f.name != "best"]
        named = [rule for rule in rules if rule == rules[0] or not rule.endswith("=0")]
        return ",".join([*named, *(f"best={one}" for one in self.best)])

    @property
    def wire(self) -> int | str:
        """What travels and is stored: a number where that says it all."""
        return self.last if self == Keep(self.last) else str(self)

    @classmethod
    def of(cls, given: int | str | Keep) -> Keep:
        """Read a policy: itself, the number of newest steps, or text as in `str`.

        Raises:
            UsageError: it is none of these.
        """
        if isinstance(given, Keep):
            return given
        if type(given) is int:
            return cls(last=given)
        if not isinstance(given, str) or len(given) > TEXT_CHARS_MAX:
            raise _no_policy(given)
        if re.fullmatch(r"[0-9]{1,15}", given):
            return cls(last=int(given))
        counts: dict[str, int] = {}
        best: list[str] = []
        for rule in given.split(","):
            match = re.fullmatch(r"(last|every|hourly|daily)=([0-9]{1,15})", rule)
            if match and match[1] not in counts:
                counts[match[1]] = int(match[2])
            elif rule.startswith("best="):
                best.append(rule.removeprefix("best="))
            else:
                raise _no_policy(given)
        return cls(**counts, best=best)


def _no_policy(given: Any) -> UsageError:
    shown = repr(given)[:80]
    return UsageError(f"{shown} is not allowed", subject="keep", hint=f"Write {_FORMS}.")


def _each(best: Any) -> Iterable[Any]:
    """One rule, or several."""
    one = isinstance(best, (str, Best)) or (
        isinstance(best, tuple)
        and len(best) == 3
        and isinstance(best[0], str)
        and ":" not in best[0]
    )
    if not one and not isinstance(best, (tuple, list)):
        raise _no_best(best)
    return [best] if one else best


def _best(given: Any) -> Best:
    parts = (given.tag, given.order, given.count) if isinstance(given, Best) else given
    if isinstance(parts, str):
        match = re.fullmatch(rf"({TAG}):(min|max):([0-9]{{1,9}})", parts)
        parts = (match[1], match[2], int(match[3])) if match else ()
    if not isinstance(parts, (tuple, list)) or len(parts) != 3:
        raise _no_best(given)
    tag, order, count = parts
    known = isinstance(tag, str) and re.fullmatch(TAG, tag) and order in ("min", "max")
    if not known or type(count) is not int or not 1 <= count < 10**9:
        raise _no_best(given)
    return Best(tag, order, count)


def _no_best(given: Any) -> UsageError:
    return UsageError(
        f"{given!r} is not allowed",
        subject="keep: best",
        hint='Write ("loss", "min", 3), or loss:min:3 as text.',
    )
