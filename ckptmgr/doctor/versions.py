"""Whether what is installed is what ckptmgr needs."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, requires, version

from ckptmgr import __version__
from ckptmgr.store.finding import Finding, Health

_NEEDED = re.compile(r"([A-Za-z0-9._-]+)\s*>=\s*([0-9.]+)")


def installed(
    needed: Iterable[str] | None = None, version_of: Callable[[str], str] = version
) -> Finding:
    """Compare the installed packages with what the distribution of ckptmgr asks for."""
    if needed is None:
        try:
            needed = requires("ckptmgr") or ()
        except PackageNotFoundError:  # from a source tree: whoever set it up chose the packages
            needed = ()
    faults = [fault for one in needed if ";" not in one and (fault := _fault(one, version_of))]
    evidence = f"ckptmgr {__version__}, Python {platform.python_version()}, {platform.release()}"
    if faults:
        return Finding(
            "versions",
            Health.FAILURE,
            "a package is missing or too old",
            "; ".join(faults),
            "Run `pip install --upgrade ckptmgr` in this environment.",
        )
    return Finding("versions", Health.OK, "the packages are those that ckptmgr needs", evidence)


def _fault(needed: str, version_of: Callable[[str], str]) -> str:
    match = _NEEDED.match(needed)
    if match is None:
        return ""
    name, least = match.groups()
    try:
        found = version_of(name)
    except PackageNotFoundError:
        return f"{name} is not installed"
    return f"{name} is {found}, needed is {least}" if _number(found) < _number(least) else ""


def _number(text: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", text)[:3]]
