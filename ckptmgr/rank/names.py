"""Names of parameters with and without the prefixes that wrappers put in front."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Attributes under which torch.compile, DDP, FSDP and activation checkpointing keep a module."""


def unwrapped(name: str) -> str:
    """The name without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def bare_names(names: Iterable[str]) -> dict[str, str]:
    """Each name without wrappers; with them where two would be the same, or nothing is left."""
    bare = {name: unwrapped(name) for name in names}
    count = Counter(bare.values())
    return {name: short if short and count[short] == 1 else name for name, short in bare.items()}


def parameter_names(places: Sequence[tuple[int, tuple[str, str] | None]]) -> list[str]:
    """What the parameters of one optimizer are called in its state; no two alike.

    Args:
        places: for each parameter its position in the optimizer, the path of its module and its
            name there; None for a parameter of no module.

    A parameter is called by its name. Where two have the same, both are called by their paths
    (`generator/0.weight`), and `#3` is the parameter at position 3 that has neither.
    """
    count = Counter(home[1] for _, home in places if home is not None)
    found = []
    for at, home in places:
        if home is None:
            found.append(f"#{at}")
        else:
            module, name = home
            found.append(name if count[name] == 1 else f"{module}/{name}")
    twice = {name for name, number in Counter(found).items() if number > 1}
    pairs = zip(places, found, strict=True)
    return [f"#{at}" if name in twice else name for (at, _), name in pairs]


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
