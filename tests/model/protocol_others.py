"""The rest of the protocol: collectors, readers, and what happens to stores and hosts."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from itertools import chain, combinations
from typing import Any

from ckptmgr.repository.catalog import Listing
from ckptmgr.types import StepId
from model.explore import Local, Move, ViolatedError, World
from model.protocol import deleted, standing
from model.protocol_puts import PUTTING, STOPPED, Records, dropped
from model.protocol_rules import ABORT, RANKS, Rules, Setup, committed


def _subsets(items: list[StepId]) -> Iterator[frozenset[StepId]]:
    some = (combinations(items, n) for n in range(len(items) + 1))
    return map(frozenset, chain.from_iterable(some))


def objects(w: World, setup: Setup, step: StepId) -> list[Any]:
    """Packs and manifests of a step in the order in which they are deleted."""
    packs = [("data", step, r, i) for i in setup.attempts for r in range(RANKS)]
    manifests = [("man", step, r) for r in range(RANKS)]
    return [key for key in (*packs, *manifests) if w[key] is not None]


def whole(w: World, step: StepId) -> bool:
    """Whether everything that a step's COMMIT names is there, unharmed."""
    register = w["commit", step]
    if not committed(register):
        return False
    _, names = register
    nonces = [int(name.rsplit("/", 1)[1]) for name in names]
    return len(nonces) == RANKS and all(
        w["man", step, r] == nonce and w["data", step, r, nonce] is True
        for r, nonce in enumerate(nonces)
    )


class Collector:
    """Retention and the garbage of what nobody finishes; its listings may be stale."""

    def __init__(self, setup: Setup, decide: Rules) -> None:
        self._setup = setup
        self._rules = decide
        self._records = Records(setup, decide)

    def step(self, local: Any, w: World) -> list[Move]:
        if local is STOPPED:
            return []
        if local[0] in PUTTING:
            return self._records.step(local, w)
        act: Any = getattr(self, f"_{local[0]}")
        return list(act(w, *local[1:]))

    def _views(self, w: World) -> Iterable[tuple[frozenset[StepId], frozenset[StepId]]]:
        """What listings may show of the registers and of the marks of retirement."""
        ids = self._setup.ids()
        decided = [c for c in ids if w["commit", c] is not None]
        marks = [c for c in ids if w["retired", c]]
        if not self._setup.stale:
            return [(frozenset(decided), frozenset(marks))]
        return [(d, m) for d in _subsets(decided) for m in _subsets(marks)]

    def _scan(self, w: World) -> Iterable[Move]:
        moves: dict[Local, Move] = {}
        for decided, marks in self._views(w):
            for label, local in self._findings(w, decided, marks):
                moves[local] = (label, local, {})
        return moves.values()

    def _findings(
        self, w: World, decided: frozenset[StepId], marks: frozenset[StepId]
    ) -> Iterator[tuple[str, Local]]:
        ids = self._setup.ids()
        stored = frozenset(c for c in ids if objects(w, self._setup, c))
        listing = Listing(
            decided=decided,
            retired=marks,
            verified=frozenset(c for c in ids if w["verified", c]),
            holds={c: ("reader",) for c in ids if self._is_held(w, c)},
            manifests={c: frozenset({0}) for c in ids if any(w["man", c, r] for r in range(RANKS))},
        )
        commits = [c for c in listing.standing() if committed(w["commit", c])]
        victims = self._rules.victims(commits, frozenset(listing.holds), self._setup.keep)
        if victims:
            yield f"victims {[*map(str, victims)]}", ("verify", (*victims,), (*commits,))
        for step in self._rules.garbage(listing, stored, commits):
            yield f"garbage {step}", ("abort", step)
        for step in sorted(stored & decided):
            if step in marks and step not in listing.holds:
                yield f"rest of {step}", self._settled(("retired", step), ("holds", step, (), ()))
            elif w["commit", step] == ABORT:
                yield f"rest of {step}", self._settled(("commit", step), ("delete", step, (), ()))

    def _is_held(self, w: World, step: StepId) -> bool:
        return any(w["hold", step, x] for x in range(self._setup.readers))

    def _settled(self, key: Hashable, then: Local) -> Local:
        return then if "marks durable" in self._rules.without else self._records.settled(key, then)

    # -- retention ----------------------------------------------------------------------------

    def _verify(self, w: World, victims: Any, commits: Any) -> Iterable[Move]:
        if not victims:
            return [("all is done", ("scan",), {})]
        newer = [c for c in commits if c > victims[0]]
        then: Local = ("retire", victims, commits)
        if "newer durable" not in self._rules.without:
            for step in newer[: max(self._setup.keep, self._rules.newer_min)]:
                then = self._records.settled(("commit", step), then)
        if "verify" in self._rules.without or any(w["verified", c] for c in newer):
            return [("a newer one is verified", then, {})]
        for step in newer:
            if whole(w, step):
                again = ("verify", victims, commits)
                mark = ("verified", step)
                return [self._records.put_new(w, f"verified {step}", mark, True, again, again)]
        return [("nothing newer can be verified", ("scan",), {})]

    def _retire(self, w: World, victims: Any, commits: Any) -> Iterable[Move]:
        step = victims[0]
        then: Local = ("holds", step, victims[1:], commits)
        if "retired mark" in self._rules.without:
            return [("no mark", then, {})]
        key = ("retired", step)
        lost = self._settled(key, then)
        return [self._records.put_new(w, f"retire {step}", key, True, then, lost)]

    def _holds(self, w: World, step: StepId, victims: Any, commits: Any) -> Iterable[Move]:
        if self._is_held(w, step) and "holds" not in self._rules.without:
            return [(f"{step} is held", self._onward(victims, commits), {})]
        return [(f"{step} is not held", ("delete", step, victims, commits), {})]

    def _onward(self, victims: Any, commits: Any) -> Local:
        return ("verify", victims, commits) if victims else ("scan",)

    def _delete(self, w: World, step: StepId, victims: Any, commits: Any) -> Iterable[Move]:
        there = objects(w, self._setup, step)
        if not there:
            then = self._onward(victims, commits)
            if "keep register" in self._rules.without:
                return [(f"drop the register of {step}", then, {("commit", step): None})]
            return [(f"{step} is deleted", then, {})]
        again = ("delete", step, victims, commits)
        return [(f"delete {there[0]}", again, deleted(w, step, there[:1]))]

    # -- garbage ------------------------------------------------------------------------------

    def _abort(self, w: World, step: StepId) -> Iterable[Move]:
        if not any(committed(w["commit", c]) for c in self._setup.ids() if c > step):
            raise ViolatedError(f"I8 {step} is given up as garbage, and nothing newer is committed")
        if "abort" in self._rules.without:
            return [("no ABORT", ("delete", step, (), ()), {})]

        def then(found: Any) -> Local:
            gone = found == ABORT or "abort wins" in self._rules.without
            return ("delete", step, (), ()) if gone else ("scan",)

        key, again = ("commit", step), ("abort", step)
        return [self._records.decide_once(w, f"abort {step}", key, ABORT, again, then)]


class Reader:
    """Reads a commit without any daemon: hold, look for `retired`, read, release."""

    def __init__(self, setup: Setup, decide: Rules, number: int) -> None:
        self._setup = setup
        self._rules = decide
        self._x = number

    def step(self, local: Any, w: World) -> list[Move]:
        if local is STOPPED:
            return []
        act: Any = getattr(self, f"_{local[0]}")
        moves: list[Move] = act(w, *local[1:])
        return moves

    def _list(self, w: World) -> list[Move]:
        if self._setup.stale:
            found = [c for c in self._setup.ids() if committed(w["commit", c])]
        else:
            found = standing(w, self._setup)[-1:]
        return [(f"choose {step}", ("hold", step), {}) for step in found]

    def _hold(self, _w: World, step: StepId) -> list[Move]:
        then = "read" if "look again" in self._rules.without else "look"
        return [(f"hold {step}", (then, step, 0), {("hold", step, self._x): True})]

    def _look(self, w: World, step: StepId, _n: int) -> list[Move]:
        if w["retired", step]:
            return [(f"{step} is retired", ("list",), {("hold", step, self._x): None})]
        return [(f"{step} stands", ("read", step, 0), {})]

    def _read(self, w: World, step: StepId, r: int) -> list[Move]:
        release = {("hold", step, self._x): None}
        if r == RANKS:
            return [("done", STOPPED, release)]
        register = w["commit", step]
        if not committed(register):
            raise ViolatedError(f"I7 the COMMIT of {step} is gone while it is held")
        nonce = int(register[1][r].rsplit("/", 1)[1])
        found = w["data", step, r, nonce]
        if w["man", step, r] != nonce or found is None:
            raise ViolatedError(f"I7 rank {r} of {step} is missing while it is held")
        if found == "rotten":
            return [("damaged", STOPPED, release)]
        return [(f"read rank {r}", ("read", step, r + 1), {})]


class Fate:
    """Power cuts, rotten chunks and lost hosts: as many as the setup says, at any time."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup

    def records(self) -> Iterator[Hashable]:
        """Every record that may be visible without being durable."""
        for attempt in self._setup.attempts:
            yield from (("claim", attempt), ("active", attempt))
            yield from (("have", attempt, r) for r in range(RANKS))
            yield from (("resume", attempt, k) for k in range(2))
        for step in self._setup.ids():
            yield from ((kind, step) for kind in ("commit", "retired", "verified"))
            for r in range(RANKS):
                yield ("man", step, r)
                yield from (("data", step, r, i) for i in self._setup.attempts)

    def cut(self, local: Any, w: World) -> list[Move]:
        if local == self._setup.cuts:
            return []
        return [("power cut", local + 1, changes) for changes in dropped(w, [*self.records()])]

    def rot(self, local: Any, w: World) -> list[Move]:
        if local == self._setup.damages:
            return []
        places = [
            ("data", c, r, int(w["commit", c][1][r].rsplit("/", 1)[1]))
            for c in standing(w, self._setup)
            if not w["verified", c]
            for r in range(RANKS)
        ]
        return [(f"{key} rots", local + 1, {key: "rotten"}) for key in places if w[key] is True]

    def lose(self, local: Any, w: World) -> list[Move]:
        if local == self._setup.losses:
            return []
        hosts = [r for r in range(RANKS) if w["memory", r]]
        return [(f"host {r} is lost", local + 1, {("memory", r): None}) for r in hosts]
