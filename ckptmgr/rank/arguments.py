"""Checking and reading what a user passes in: URLs, steps, tags, options."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, TypeVar

from ckptmgr.errors import UsageError
from ckptmgr.staging.hostbuffer import TAGS_BYTES_MAX
from ckptmgr.types import StepId, Tags

T = TypeVar("T")


def absolute_url(url: str | os.PathLike[str]) -> str:
    """`url`, with a path made absolute here: the daemon has another working directory."""
    given: Any = url
    text = os.fspath(given) if isinstance(given, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text:
        raise UsageError(f"{url!r} is neither a URL nor a path", subject="url")
    return text if "://" in text else os.path.abspath(os.path.expanduser(text))


def checked_state(state: Any) -> MutableMapping[str, Any]:
    """`state` if it is a mapping from names; else a UsageError."""
    if not isinstance(state, MutableMapping) or not all(isinstance(name, str) for name in state):
        raise UsageError(
            "is not a dict from names to modules, optimizers, tensors, ...", subject="state"
        )
    return state


def parse_step(step: int | str | None) -> tuple[int | None, int | None]:
    """Attempt and number of a step that a user names; None for what is left open."""
    if step is None:
        return None, None
    given: Any = step
    if isinstance(given, bool) or not isinstance(given, (int, str)):
        raise UsageError(f"{step!r} is not a step", subject="step")
    try:
        return StepId.parse(str(step))
    except ValueError as error:
        raise UsageError(str(error), subject="step") from None


def checked(value: T, name: str, ok: bool) -> T:
    """`value` if it is allowed; else a UsageError that names the argument."""
    if not ok:
        raise UsageError(f"{value!r} is not allowed", subject=name)
    return value


def checked_patterns(patterns: Any) -> tuple[str, ...]:
    """`patterns` if they are globs of paths; a single text is taken for a mistake."""
    known = isinstance(patterns, Sequence) and not isinstance(patterns, str)
    if not known or not all(isinstance(pattern, str) for pattern in patterns):
        raise UsageError(f"{patterns!r} is not a list of globs", subject="replicated")
    return tuple(patterns)


def _exact(scalar: Any) -> Any:
    """The same value of the very type that can be encoded, not of a subclass of it; what is no
    character, as in the name of a file that is not UTF-8, is spelled.
    """
    if isinstance(scalar, str):
        return str.__str__(scalar).encode(errors="backslashreplace").decode()
    return next(kind(scalar) for kind in (bool, int, float) if isinstance(scalar, kind))


def plain_tags(tags: Any) -> Tags:
    """Tags as JSON scalars: zero-dimensional tensors and NumPy scalars by `.item()`."""
    plain: Tags = {}
    if not isinstance(tags or {}, Mapping):
        raise UsageError("are not a dict of names and scalars", subject="tags")
    for name, value in (tags or {}).items():
        scalar = _scalar(value)
        if not isinstance(name, str) or not isinstance(scalar, (bool, int, float, str)):
            raise UsageError(f"{value!r} is not a scalar", subject=f"tag {name!r}")
        if isinstance(scalar, int) and not -(2**63) <= scalar < 2**63:
            raise UsageError(f"{value!r} has more than 64 bits", subject=f"tag {name!r}")
        # JSON has no inf and nan, and a loss of nan is exactly what somebody will look for.
        is_odd = isinstance(scalar, float) and not math.isfinite(scalar)
        plain[_exact(name)] = str(scalar) if is_odd else _exact(scalar)
    if sum(len(f"{name}{value}".encode()) + 16 for name, value in plain.items()) > TAGS_BYTES_MAX:
        raise UsageError(f"are longer than {TAGS_BYTES_MAX} bytes", subject="tags")
    return plain


def _scalar(value: Any) -> Any:
    try:
        return value.item() if hasattr(value, "item") else value
    except (ValueError, RuntimeError):  # more than one element
        return value
