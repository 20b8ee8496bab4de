"""The slots of a host buffer between a rank and a daemon, store by store, either dying anywhere.

Variables: word/k (state, generation), part/k/n and record/k (the generation that wrote them),
settled/k and outcome/k of the daemon's page; alive; manifest/g and register/g in the store; spool/g
(whole in the spool). A snapshot's step is its generation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ckptmgr.daemon import intake, resume
from ckptmgr.staging import slots
from ckptmgr.types import Outcome, SlotState, Snapshot
from model.explore import Local, Move, Process, System, ViolatedError, World

PARTS = 2
_EMPTY = (SlotState.EMPTY, 0)


@dataclass(frozen=True)
class SlotRules:
    """The decisions, by default the product's; `without` names what a seeded bug leaves out."""

    free_slot: Callable[..., int | None] = slots.free_slot
    superseded_slot: Callable[..., Snapshot | None] = slots.superseded_slot
    pick: Callable[..., Snapshot | None] = intake.pick
    usable: Callable[..., list[Snapshot]] = resume.usable_in_memory
    without: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Bench:
    """How many slots and snapshots, and how often whom something befalls."""

    slots: int = 2
    snapshots: int = 4
    deaths: int = 1
    crashes: int = 1
    aborts: int = 0
    spool: bool = False


def _snapshot(slot: int, generation: int) -> Snapshot:
    return Snapshot(slot, generation, 1, "", 0, 1, generation, 0, 0, 0, 0.0, 0.0)


class Buffer:
    """What everybody can read of the slots."""

    def __init__(self, bench: Bench, decide: SlotRules) -> None:
        self.bench = bench
        self.rules = decide

    def word(self, w: World, slot: int) -> tuple[SlotState, int]:
        found: tuple[SlotState, int] = w["word", slot] or _EMPTY
        return found

    def outcome(self, w: World, slot: int, generation: int) -> Outcome:
        by_slot = "settle by generation" in self.rules.without
        if w["settled", slot] != generation and not (by_slot and w["settled", slot]):
            return Outcome.UNDECIDED
        return Outcome(w["outcome", slot] or 0)

    def sealed(self, w: World) -> list[tuple[Snapshot, Outcome]]:
        """The sealed snapshots with their outcomes, oldest first."""
        found = []
        for slot in range(self.bench.slots):
            state, generation = self.word(w, slot)
            if state is SlotState.SEALED:
                outcome = self.outcome(w, slot, generation)
                self._check_outcome(w, generation, outcome)
                found.append((_snapshot(slot, generation), outcome))
        return sorted(found, key=lambda pair: pair[0].generation)

    def _check_outcome(self, w: World, generation: int, outcome: Outcome) -> None:
        register = w["register", generation]
        told = {Outcome.COMMITTED: "COMMIT", Outcome.ABORTED: "ABORT"}.get(outcome, register)
        lost = outcome is Outcome.SPOOLED and not (register or w["spool", generation])
        if told != register or lost:
            raise ViolatedError(f"S4 {generation} is said to be {outcome.name}, and is {register}")

    def check_whole(self, w: World, snapshot: Snapshot, why: str) -> None:
        places = [("part", snapshot.slot, n) for n in range(PARTS)]
        places.append(("record", snapshot.slot))
        if any(w[place] != snapshot.generation for place in places):
            raise ViolatedError(f"S1 snapshot {snapshot.generation} is torn: {why}")


class Rank:
    """A trainer that seals snapshots; when it has died, the next one resumes from memory."""

    def __init__(self, buffer: Buffer) -> None:
        self._buffer = buffer
        self._rules = buffer.rules
        self._bench = buffer.bench

    def step(self, local: Any, w: World) -> list[Move]:
        kind, deaths, *rest = local
        moves: list[Move] = getattr(self, f"_{kind}")(w, deaths, *rest)
        if kind != "dead" and deaths < self._bench.deaths:
            moves.append(("die", ("dead", deaths + 1), {"dead": True}))
        return moves

    def _dead(self, w: World, deaths: int) -> list[Move]:
        sealed = self._buffer.sealed(w)
        usable = self._rules.usable(sealed)
        for snapshot in usable:
            if w["register", snapshot.generation] == "ABORT":
                outcome = self._buffer.outcome(w, snapshot.slot, snapshot.generation)
                if outcome is Outcome.ABORTED:
                    raise ViolatedError(f"S6 {snapshot.generation} is resumed, and was given up")
        if usable:
            self._buffer.check_whole(w, max(usable, key=lambda s: s.generation), "on resuming")
        if w["newest"] and not sealed:
            raise ViolatedError("S2 a snapshot was sealed, and memory holds none")
        return [("start again", ("idle", deaths), {"dead": None})]

    def _idle(self, w: World, deaths: int) -> list[Move]:
        generation = 1 + max(self._buffer.word(w, k)[1] for k in range(self._bench.slots))
        if generation > self._bench.snapshots:
            return []
        sealed = self._buffer.sealed(w)
        slot = self._rules.free_slot(self._bench.slots, sealed)
        how = "free"
        if slot is None:
            victim = self._rules.superseded_slot(sealed)
            if victim is None:
                return []
            slot, how = victim.slot, "superseded"
        self._check_choice(w, slot, sealed, how)
        label = f"begin {generation} in slot {slot}, {how}"
        if "writing" in self._rules.without:
            return [(label, ("fill", deaths, slot, generation, 0), {})]
        word = {("word", slot): (SlotState.WRITING, generation)}
        return [(label, ("fill", deaths, slot, generation, 0), word)]

    def _check_choice(
        self, w: World, slot: int, sealed: list[tuple[Snapshot, Outcome]], how: str
    ) -> None:
        state, generation = self._buffer.word(w, slot)
        if state is not SlotState.SEALED:
            return
        if generation == max(snapshot.generation for snapshot, _ in sealed):
            raise ViolatedError(f"S2 the newest sealed snapshot {generation} is overwritten")
        kept = w["register", generation] or w["spool", generation]
        if how == "free" and not kept:
            raise ViolatedError(f"I10 {generation} is overwritten as free, and is undecided")
        older = [s.generation for s, _ in sealed if s.generation < generation]
        if how == "superseded" and older:
            raise ViolatedError(f"S3 {generation} is given up before {older[0]}")

    def _fill(self, w: World, deaths: int, slot: int, generation: int, at: int) -> list[Move]:
        places: list[Any] = [("part", slot, n) for n in range(PARTS)]
        places += [("record", slot), ("word", slot)]
        if "barrier" in self._rules.without:
            places.insert(PARTS - 1, places.pop())
        then: Local = ("fill", deaths, slot, generation, at + 1)
        if at + 1 == len(places):
            then = ("idle", deaths)
        key = places[at]
        if key[0] != "word":
            return [(f"write {key} of {generation}", then, {key: generation})]
        changes = {key: (SlotState.SEALED, generation), "newest": generation}
        return [(f"seal {generation}", then, changes)]


class Daemon:
    """Reads sealed slots into the store or the spool, decides them and says so; drains the spool.
    It may die anywhere.
    """

    def __init__(self, buffer: Buffer) -> None:
        self._buffer = buffer
        self._rules = buffer.rules
        self._bench = buffer.bench

    def step(self, local: Any, w: World) -> list[Move]:
        kind, crashes, *rest = local
        moves: list[Move] = getattr(self, f"_{kind}")(w, crashes, *rest)
        if kind != "scan" and crashes < self._bench.crashes:
            moves.append(("die, and the next one adopts", ("scan", crashes + 1), {}))
        return moves

    def _scan(self, w: World, crashes: int) -> list[Move]:
        parts = [g for g in range(1, self._bench.snapshots + 1) if w["spool", g]]
        drain = [(f"drain {g}", ("drain", crashes, g), {}) for g in parts[:1]]
        return [*drain, *self._take(w, crashes, frozenset(parts))]

    def _take(self, w: World, crashes: int, spooled: frozenset[int]) -> list[Move]:
        sealed = self._buffer.sealed(w)
        alive = not w["dead"]
        found = self._rules.pick(sealed, writer_alive=alive, skipped=spooled)
        open_ = [
            s.generation
            for s, outcome in sealed
            if outcome is Outcome.UNDECIDED and s.generation not in spooled
        ]
        if found is None:
            return []
        if found.generation != (min(open_) if alive else max(open_)):
            raise ViolatedError(f"S7 {found.generation} is written first, of {open_}")
        label = f"take {found.generation}"
        if w["manifest", found.generation] is not None:
            return [(f"{label}: adopt", ("decide", crashes, found.slot, found.generation), {})]
        return [(label, ("read", crashes, found.slot, found.generation, ()), {})]

    def _unchanged(self, w: World, slot: int, generation: int) -> bool:
        state, now = self._buffer.word(w, slot)
        if "look again" in self._rules.without:
            return True
        if "compare generations" in self._rules.without:
            return state is SlotState.SEALED
        return (state, now) == (SlotState.SEALED, generation)

    def _read(self, w: World, crashes: int, slot: int, generation: int, read: Any) -> list[Move]:
        places: list[Any] = [("record", slot), *(("part", slot, n) for n in range(PARTS))]
        if len(read) == len(places):
            if not self._unchanged(w, slot, generation):
                return [("it was reused", ("give_up", crashes, generation), {})]
            return [("unchanged", ("manifest", crashes, slot, generation, read), {})]
        key = places[len(read)]
        then = ("read", crashes, slot, generation, (*read, w[key]))
        return [(f"read {key}", then, {})]

    def _manifest(
        self, _w: World, crashes: int, slot: int, generation: int, read: Any
    ) -> list[Move]:
        if set(read) != {generation}:
            raise ViolatedError(f"S1 the manifest of {generation} is of {read}")
        then: Local = ("decide", crashes, slot, generation)
        moves: list[Move] = [(f"manifest {generation}", then, {("manifest", generation): True})]
        if self._bench.spool:
            stored = {} if "spool first" in self._rules.without else {("spool", generation): True}
            then = ("settle", crashes, slot, generation, Outcome.SPOOLED)
            moves.append((f"spool {generation}", then, stored))
        return moves

    def _drain(self, w: World, crashes: int, generation: int) -> list[Move]:
        """A part of the spool into the store, unless its step is decided already."""
        if "decide before it goes" in self._rules.without:
            return [
                (f"forget {generation} early", ("scan", crashes), {("spool", generation): None})
            ]
        then = ("drained", crashes, generation)
        if w["register", generation]:
            return [(f"{generation} is decided", then, {})]
        return [(f"bring {generation}", then, {("manifest", generation): True})]

    def _drained(self, w: World, crashes: int, generation: int) -> list[Move]:
        """The decision of a part, and the slot that may still hold its snapshot."""
        found = w["register", generation] or "COMMIT"
        outcome = Outcome.COMMITTED if found == "COMMIT" else Outcome.ABORTED
        then: Local = ("forget", crashes, generation)
        for slot in range(self._bench.slots):
            if self._buffer.word(w, slot) == (SlotState.SEALED, generation):
                then = ("settle", crashes, slot, generation, outcome)
        return [(f"{generation} is {found}", then, {("register", generation): found})]

    def _forget(self, w: World, crashes: int, generation: int) -> list[Move]:
        if not w["register", generation]:
            raise ViolatedError(f"S8 {generation} leaves the spool, and is undecided")
        return [(f"forget {generation}", ("scan", crashes), {("spool", generation): None})]

    def _decide(self, w: World, crashes: int, slot: int, generation: int) -> list[Move]:
        key = ("register", generation)
        if "decide first" in self._rules.without:
            then = ("settle", crashes, slot, generation, Outcome.COMMITTED)
            return [(f"settle {generation} early", then, {})]
        found = w[key] or "COMMIT"
        outcome = Outcome.COMMITTED if found == "COMMIT" else Outcome.ABORTED
        then = ("settle", crashes, slot, generation, outcome)
        return [(f"{generation} is {found}", then, {key: found})]

    def _settle(
        self, _w: World, crashes: int, slot: int, generation: int, outcome: Outcome
    ) -> list[Move]:
        word = {("outcome", slot): int(outcome)}
        then: Local = ("settled", crashes, slot, generation, outcome)
        if "outcome first" in self._rules.without:
            word = {("settled", slot): generation}
        return [(f"tell the outcome of {generation}", then, word)]

    def _settled(
        self, w: World, crashes: int, slot: int, generation: int, outcome: Outcome
    ) -> list[Move]:
        word: dict[Any, Any] = {("settled", slot): generation}
        if "outcome first" in self._rules.without:
            word = {("outcome", slot): int(outcome)}
        drained = outcome.decided and w["spool", generation]
        then: Local = ("forget", crashes, generation) if drained else ("scan", crashes)
        return [(f"settle {generation}", then, word)]

    def _give_up(self, w: World, crashes: int, generation: int) -> list[Move]:
        key = ("register", generation)
        return [(f"give {generation} up", ("scan", crashes), {key: w[key] or "ABORT"})]


def _abort(buffer: Buffer, local: Any, w: World) -> list[Move]:
    """Somebody else gives a sealed step up."""
    if local == buffer.bench.aborts:
        return []
    open_ = [
        snapshot.generation
        for snapshot, _ in buffer.sealed(w)
        if w["register", snapshot.generation] is None
    ]
    return [(f"abort {g}", local + 1, {("register", g): "ABORT"}) for g in open_]


def slots_of(bench: Bench, decide: SlotRules) -> System:
    """A rank and a daemon on one buffer, deciding by `decide`."""
    buffer = Buffer(bench, decide)
    processes = [
        Process("rank", ("idle", 0), Rank(buffer).step),
        Process("daemon", ("scan", 0), Daemon(buffer).step),
    ]
    if bench.aborts:
        processes.append(Process("others", 0, lambda local, w: _abort(buffer, local, w)))
    return System(tuple(processes))


BENCHES = {
    "two slots": Bench(snapshots=4, deaths=1, crashes=2),
    "three slots": Bench(slots=3, snapshots=5, deaths=1, crashes=1),
    "two slots, and others give up": Bench(snapshots=4, aborts=1),
    "two slots and a spool": Bench(snapshots=3, aborts=1, spool=True),
}
BENCHES_FULL = {
    "two slots": Bench(snapshots=9, deaths=3, crashes=3, aborts=2),
    "three slots": Bench(slots=3, snapshots=8, deaths=2, crashes=2, aborts=2),
    "two slots and a spool": Bench(snapshots=5, deaths=2, crashes=2, aborts=2, spool=True),
}


def _any_slot(count: int, sealed: slots.Sealed) -> int | None:
    return slots.free_slot(count, [(s, Outcome.COMMITTED) for s, _ in sealed])


def _newest_too(count: int, sealed: slots.Sealed) -> int | None:
    spare = [s.slot for s, outcome in sealed if outcome is not Outcome.UNDECIDED]
    found = slots.free_slot(count, sealed)
    return spare[-1] if found is None and spare else found


SLOT_BUGS = {
    "the slot is not marked while it is written": SlotRules(without=frozenset({"writing"})),
    "SEALED is seen before the bytes": SlotRules(without=frozenset({"barrier"})),
    "the daemon does not look again": SlotRules(without=frozenset({"look again"})),
    "generations are not compared": SlotRules(without=frozenset({"compare generations"})),
    "an outcome is of the slot, not of the snapshot": SlotRules(
        without=frozenset({"settle by generation"})
    ),
    "the generation is settled before its outcome": SlotRules(without=frozenset({"outcome first"})),
    "an outcome is told before the register": SlotRules(without=frozenset({"decide first"})),
    "SPOOLED is told before the part is stored": SlotRules(without=frozenset({"spool first"})),
    "a part leaves the spool before its step is decided": SlotRules(
        without=frozenset({"decide before it goes"})
    ),
    "an undecided slot is taken for free": SlotRules(free_slot=_any_slot),
    "the newest sealed slot is taken": SlotRules(free_slot=_newest_too),
    "the newest is superseded": SlotRules(superseded_slot=lambda sealed: sealed[-1][0]),
    "the newest goes first while training runs": SlotRules(
        pick=lambda sealed, *, skipped, **_: intake.pick(
            sealed, writer_alive=False, skipped=skipped
        )
    ),
    "the oldest goes first when the trainer is dead": SlotRules(
        pick=lambda sealed, *, skipped, **_: intake.pick(sealed, writer_alive=True, skipped=skipped)
    ),
    "a snapshot that was given up is resumed": SlotRules(
        usable=lambda sealed: [s for s, _ in sealed]
    ),
}
