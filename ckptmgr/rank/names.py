"""Names of parameters with and without the prefixes that wrappers put in front."""

from __future__ import annotations

from collections.abc import Iterable

WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Attributes under which torch.compile, DDP, FSDP and activation checkpointing keep a module."""


def unwrapped(name: str) -> str:
    """The name without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def match_names(saved: Iterable[str], live: Iterable[str]) -> dict[str, str]:
    """Which live name each saved name means, in the order of the saved ones.

    Names without a partner are left out.

    Equal names match. The others match when they are equal without wrappers, if that is
    unambiguous on both sides.
    """
    left, right = list(saved), list(live)
    both = set(left) & set(right)
    theirs = _unique(name for name in left if name not in both)
    ours = _unique(name for name in right if name not in both)
    matched = {name: name for name in both}
    matched |= {theirs[bare]: ours[bare] for bare in theirs.keys() & ours.keys()}
    return {name: matched[name] for name in left if name in matched}


def _unique(names: Iterable[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    twice: set[str] = set()
    for name in names:
        bare = unwrapped(name)
        if bare in found:
            twice.add(bare)
        found[bare] = name
    return {bare: name for bare, name in found.items() if bare not in twice}
