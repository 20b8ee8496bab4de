"""Seeded bugs of the protocol: small changes to a decision or an order; each must be found.

The first word of what is expected is the invariant that the shortest way to it breaks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ckptmgr.repository import rules
from ckptmgr.repository.commit import Decision
from ckptmgr.types import StepId
from model.protocol_rules import Rules, Setup
from model.protocol_setups import NORMAL, RULES


@dataclass(frozen=True)
class Bug:
    """A changed set of rules, and the setup in which that must be found."""

    decide: Rules
    setup: Setup


def _without(*names: str) -> Rules:
    return replace(RULES, without=frozenset(names))


def _in(name: str, decide: Rules) -> Bug:
    return Bug(decide, NORMAL[name][0])


def _unchecked(manifests: Any, _parent: StepId) -> Decision:
    first = manifests[0].manifest
    digests = tuple(m.digest.hex() for m in manifests)
    return Decision("COMMIT", first.attempt, first.step, manifests=digests)


def _any_nonce(world: int, _nonce: str, manifests: Any) -> tuple[int, ...]:
    return tuple(r for r in range(world) if r not in manifests)


def _by_step(step: StepId) -> tuple[int, int]:
    return step.step, -step.attempt


def _order(change: Callable[..., list[StepId]]) -> Rules:
    return replace(RULES, resume_order=change)


_COUNTED = replace(
    RULES, missing_ranks=lambda _world, _nonce, found: () if found else (0,), commit_of=_unchecked
)
_MIXED = replace(
    RULES,
    missing_ranks=_any_nonce,
    commit_of=_unchecked,
    without=frozenset({"claim exclusive"}),
)
_ANY_RANK = replace(
    RULES,
    complete_steps=lambda held, worlds: frozenset(
        c for c, ranks in held.items() if c.attempt in worlds and ranks
    ),
)
_SMALL = Setup(incarnations=1, steps=2, daemons=1, collectors=1, keep=1)
_REJECTING = Setup(incarnations=2, steps=1, daemons=1, damages=1)
_GIVEN_UP = Setup(memory=True, daemons=1, aborts=True)
_ZOMBIE = Setup(incarnations=3, daemons=1, lone=1)
_MEMORY, _CUT = "host memory, and one host is lost", "a power cut while committing"
_READ, _STALE = "retention and a reader", "incarnations and a stale collector"

BUGS: dict[str, Bug] = {
    # Which steps are committed.
    "a step is committed when one rank is there": _in("two incarnations", _COUNTED),
    "manifests of two incarnations are committed together": _in("two incarnations", _MIXED),
    "the manifest is put before its packs": _in("two incarnations", _without("packs first")),
    "a manifest can be overwritten": _in(
        "two incarnations", _without("manifest exclusive", "claim exclusive")
    ),
    "a COMMIT overwrites an ABORT": _in(
        "a power cut while giving up", _without("register exclusive")
    ),
    "nobody's turn comes": _in(
        "nobody is late",
        replace(RULES, goes_first=lambda step, world, here: step % (world + 1) in here),
    ),
    # From where an attempt goes on.
    "each rank chooses for itself": _in("two incarnations", _without("resume register")),
    "the greatest step number is resumed from": Bug(
        _order(lambda c, x, g, r: sorted((set(c) | set(x)) - {*g, *r}, key=_by_step)[::-1]),
        _ZOMBIE,
    ),
    "the oldest step is resumed from": Bug(
        _order(lambda c, x, g, r: rules.resume_order(c, x, g, r)[::-1]), Setup(steps=2, daemons=1)
    ),
    "a step that was given up is resumed from": Bug(
        _order(lambda c, x, _g, r: rules.resume_order(c, x, (), r)), _GIVEN_UP
    ),
    "a step that was rejected is resumed from": Bug(
        _order(lambda c, x, g, _r: rules.resume_order(c, x, g, ())), _REJECTING
    ),
    "a step of one rank is taken for whole": _in(_MEMORY, _ANY_RANK),
    "a rank starts before the others agree": Bug(_without("agreement"), _REJECTING),
    # Retention.
    "one newer commit is enough": Bug(
        replace(RULES, victims=lambda c, h, _keep: [s for s in sorted(c)[:-1] if s not in h]),
        _SMALL,
    ),
    "no newer commit is needed": Bug(replace(RULES, victims=lambda c, _h, _k: sorted(c)), _SMALL),
    "the oldest are kept": _in(
        _READ, replace(RULES, victims=lambda c, _h, keep: sorted(c)[max(keep, 2) :])
    ),
    "nothing newer is read back": _in("rot", _without("verify")),
    "data goes without a mark": _in(_READ, _without("retired mark")),
    "holds are not looked at": _in(_READ, _without("holds")),
    "a reader does not look again": _in(_READ, _without("look again")),
    "the register goes with the step": _in(_READ, _without("keep register")),
    # Garbage.
    "garbage goes without ABORT": _in(_STALE, _without("abort")),
    "garbage goes though COMMIT won": _in(_STALE, _without("abort wins")),
    "steps under way are garbage": _in(
        _STALE,
        replace(RULES, garbage=lambda listing, stored, _live: sorted(stored - listing.decided)),
    ),
    # Visible is not durable.
    "a register of others is believed": _in(_CUT, _without("settle")),
    "a register is read, then made durable": _in(
        "a power cut while giving up", _without("read after settling")
    ),
    "manifests of others are believed": _in(_CUT, _without("manifests durable")),
    "a COMMIT of others is resumed from": Bug(_without("resume durable"), Setup(daemons=1, cuts=1)),
    "a mark of others is believed": _in("a power cut while collecting", _without("marks durable")),
    "newer commits of others are believed": _in(
        "a power cut while collecting", _without("newer durable")
    ),
}
