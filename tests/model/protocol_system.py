"""The protocol as a system to explore: the processes of a setup, and the invariants I1 to I12."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any

from ckptmgr.types import StepId
from model.explore import Process, System, ViolatedError, World
from model.protocol import Committer, Rank, standing
from model.protocol_others import Collector, Fate, Reader, whole
from model.protocol_puts import is_soft
from model.protocol_rules import RANKS, Rules, Setup, committed, manifest_name

BITS = {"memory": 7, "have": 7, "data": 2, "soft": 1, "hold": 1, "acked": 1, "active": 1}
_FEW_BITS = {"claim": 2, "learned": 2, "retired": 1, "verified": 1, "man": 2, "verdict": 2}


_HISTORY = {"commit", "retired"}

STANDING_MIN = 2
"""Commits that must stand in for one that is given up: a promise, so not taken from the code."""


def bits_of(key: Any) -> int:
    """Room for every value that a variable of this kind takes."""
    return (BITS | _FEW_BITS).get(key[0], 5)


def system_of(setup: Setup, decide: Rules) -> System:
    """The processes of a setup, deciding by `decide`, and what must hold."""
    processes = []
    for i in setup.attempts:
        alone = i > setup.incarnations - setup.lone
        ranks = [Rank(setup, decide, i, r) for r in range(1 if alone else RANKS)]
        daemons = [Committer(setup, decide, i, r) for r in range(0 if alone else setup.daemons)]
        processes += [Process(f"rank {i}/{r}", ("start",), p.step) for r, p in enumerate(ranks)]
        processes += [Process(f"daemon {i}/{r}", ("start",), p.step) for r, p in enumerate(daemons)]
    first = len(processes)
    collector = Collector(setup, decide)
    for n in range(setup.collectors):
        processes.append(Process(f"collector {n}", ("scan",), collector.step))
    for x in range(setup.readers):
        processes.append(Process(f"reader {x}", ("list",), Reader(setup, decide, x).step))
    fate = Fate(setup)
    fates = (
        (setup.cuts, "power", fate.cut),
        (setup.damages, "rot", fate.rot),
        (setup.losses, "hosts", fate.lose),
    )
    processes += [Process(name, 0, step) for count, name, step in fates if count]
    return System(
        processes=tuple(processes),
        holds=_holds(setup),
        moves=partial(_moves, setup),
        ends=partial(_ends, setup) if setup.timely else None,
        bits_of=bits_of,
        twins=((first, first + 1),) if setup.collectors == 2 else (),
    )


def _holds(setup: Setup) -> tuple[Callable[[World], None], ...]:
    steps = [partial(check, setup, c) for c in setup.ids() for check in (_commit_is_whole, _acked)]
    attempts = [partial(_one_start, i) for i in setup.attempts]
    return (*steps, *attempts, partial(_something_stands, setup))


def _commit_is_whole(setup: Setup, step: StepId, w: World) -> None:
    register = w["commit", step]
    if not committed(register):
        return
    names = register[1]
    nonces = {name.rsplit("/", 1)[1] for name in names}
    if len(names) != RANKS or len(nonces) != 1:
        raise ViolatedError(f"I2 the COMMIT of {step} is of {names}")
    if w["retired", step]:
        return
    for r, name in enumerate(names):
        nonce = int(name.rsplit("/", 1)[1])
        if w["data", step, r, nonce] is None:
            raise ViolatedError(f"I1 {step} is committed, and packs of rank {r} are missing")
        found = w["man", step, r]
        if found is None or manifest_name(step, r, found) != name:
            raise ViolatedError(
                f"I1 {step} is committed, and its manifest of rank {r} is not there"
            )


def _acked(_setup: Setup, step: StepId, w: World) -> None:
    if w["acked", step] and not committed(w["commit", step]):
        raise ViolatedError(f"I12 {step} was acknowledged, and is no commit any more")


def _one_start(incarnation: int, w: World) -> None:
    applied = [w["applied", incarnation, r] for r in range(RANKS)]
    if None not in applied and len(set(applied)) > 1:
        raise ViolatedError(f"I6 the ranks of one attempt start from {[*map(str, applied)]}")


def _something_stands(setup: Setup, w: World) -> None:
    given_up = any(w["retired", c] for c in setup.ids())
    if given_up and not any(whole(w, c) for c in standing(w, setup)):
        raise ViolatedError("I3 steps were given up, and none is left to restore")


def _moves(setup: Setup, old: World, new: World, changes: Mapping[Hashable, Any]) -> None:
    touched = [key for key in changes if isinstance(key, tuple) and key[0] in _HISTORY]
    for kind, step in touched:
        if kind == "commit" and old[kind, step] is not None:
            _register_changes(setup, old, new, step)
        elif kind == "retired" and new[kind, step] and not old[kind, step]:
            newer = [c for c in standing(new, setup) if c > step]
            if len(newer) < STANDING_MIN:
                raise ViolatedError(f"I3 {step} is given up behind {[*map(str, newer)]} only")
    if touched:
        before = [c for c in standing(old, setup) if not is_soft(old, ("commit", c))]
        after = standing(new, setup)
        if before and (not after or after[-1] < before[-1]):
            raise ViolatedError(f"I4 the last consistent step goes back from {before[-1]}")


def _register_changes(setup: Setup, old: World, new: World, step: StepId) -> None:
    key = ("commit", step)
    now, then = old[key], new[key]
    if now == then:
        return
    if then is not None or not is_soft(old, key):
        raise ViolatedError(f"I9 the register of {step} was {now} and is {then}")
    users = [i for i in setup.attempts for r in range(RANKS) if old["applied", i, r] == step]
    if users and not setup.memory:
        raise ViolatedError(f"I12 incarnation {users[0]} resumed from {step}, whose COMMIT is lost")


def _ends(setup: Setup, w: World) -> None:
    for step in setup.ids():
        there = all(w["man", step, r] is not None for r in range(RANKS))
        if there and w["commit", step] is None:
            raise ViolatedError(f"L1 nobody commits {step}, and all its manifests are there")
