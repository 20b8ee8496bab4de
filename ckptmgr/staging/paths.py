"""Readable, unambiguous names of the places in a nested state: `optimizer/state/0/exp_avg`."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import TypeAlias

Trail: TypeAlias = "tuple[Trail, Hashable] | None"
"""The way to a place, innermost key last; None is the state itself."""

_INTEGER = re.compile(r"-?[0-9]+")
_ESCAPED = re.compile(r"[%/\x00-\x1f\x7f\ud800-\udfff]")


def segment(key: Hashable) -> str:
    """One part of a path; two different keys of a container never have the same one.

    Strings stand for themselves, with `%`, `/`, control characters and lone surrogates
    percent-encoded. Integers are decimal, so a string of digits is quoted: `'0'`. Every other key
    is its repr in parentheses: `(None)`, `(True)`, `(1, 'a')`.

    Raises:
        ValueError: Python can not show the key (an integer of more than 4,300 digits in a tuple).
    """
    if type(key) is str:
        return _string_segment(key)
    if type(key) is int and -(1 << 63) <= key < 1 << 64:
        return str(key)
    return f"({_escape(hex(key) if type(key) is int else repr(key))})"


def _string_segment(key: str) -> str:
    if key.replace(".", "").isidentifier():
        return key  # nearly every one; nothing in it is escaped
    if not key or _INTEGER.fullmatch(key):
        return f"'{key}'"
    text = _escape(key)
    return f"%{ord(text[0]):02X}{text[1:]}" if text[0] in "'(" else text


def _escape(text: str) -> str:
    return _ESCAPED.sub(_percent, text)


def _percent(match: re.Match[str]) -> str:
    encoded = match[0].encode("utf-8", "surrogatepass")
    return "".join(f"%{byte:02X}" for byte in encoded)


def render(trail: Trail) -> str:
    """The path of a place; never fails, so that errors can always be told."""
    parts: list[str] = []
    while trail is not None:
        trail, key = trail
        try:
            parts.append(segment(key))
        except ValueError:
            parts.append(f"({type(key).__name__})")
    return "/".join(reversed(parts))
