"""An explicit-state checker: every interleaving of a few processes over shared variables.

A state is one integer: a field for each process's own state, and one for each shared variable.
What a process can do depends on its own state and on the variables that it reads, so its steps are
computed once for each combination of those and kept as differences to add: the functions that say
what a process does may be slow and readable, and may call the product's own decisions.

A process that stops for ever, or for long, is an interleaving like any other. So there are no
crashes here: a property that holds in every state that can be reached holds after every crash.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Local = Hashable
Move = tuple[str, Local, Mapping[Hashable, Any]]
"""What was done, the process's state after it, and the variables that it changed."""

LOCAL_BITS = 12
VALUE_BITS = 5


class ViolatedError(Exception):
    """A property does not hold."""


class Field:
    """A run of bits of a state, and the values that its numbers stand for; 0 is the first one."""

    def __init__(self, shift: int, bits: int, first: Any) -> None:
        self.shift = shift
        self.low = (1 << bits) - 1
        self.mask = self.low << shift
        self.values: list[Any] = [first]
        self.numbers: dict[Any, int] = {first: 0}

    def number(self, value: Any) -> int:
        found = self.numbers.get(value)
        if found is None:
            found = self.numbers[value] = len(self.values)
            self.values.append(value)
            assert found <= self.low, f"more than {self.low} values: give the field more bits"
        return found


class Space:
    """The fields of a system; a variable gets one when it is first read or written."""

    def __init__(self, bits_of: Callable[[Any], int]) -> None:
        self._bits_of = bits_of
        self._end = 0
        self.fields: dict[Hashable, Field] = {}

    def add(self, bits: int, first: Any) -> Field:
        made = Field(self._end, bits, first)
        self._end += bits
        return made

    def of(self, key: Hashable) -> Field:
        found = self.fields.get(key)
        if found is None:
            found = self.fields[key] = self.add(self._bits_of(key), None)
        return found


class World:
    """The shared variables in one state; None until written. Notes what is read."""

    def __init__(self, space: Space, state: int) -> None:
        self._space = space
        self.state = state
        self.read = 0

    def __getitem__(self, key: Hashable) -> Any:
        found = self._space.of(key)
        self.read |= found.mask
        return found.values[(self.state >> found.shift) & found.low]


@dataclass(frozen=True)
class Process:
    """`step` gives everything that it can do next; nothing means that it waits or has ended."""

    name: str
    start: Local
    step: Callable[[Any, World], Iterable[Move]]


@dataclass(frozen=True)
class System:
    """Processes and what must hold.

    `holds` are looked at in every state, `moves` at every change of a variable, `ends` in every
    state in which nobody can do anything. They raise `ViolatedError`. Processes of a pair of
    `twins` (by index) are alike in everything: their states are kept in order.
    """

    processes: tuple[Process, ...]
    holds: tuple[Callable[[World], None], ...] = ()
    moves: Callable[[World, World, Mapping[Hashable, Any]], None] = lambda _old, _new, _changes: (
        None
    )
    ends: Callable[[World], None] | None = None
    bits_of: Callable[[Any], int] = lambda _key: VALUE_BITS
    twins: tuple[tuple[int, int], ...] = ()
    local_bits: int = LOCAL_BITS


@dataclass(frozen=True)
class Found:
    """What an exploration saw; `violation` is empty if everything held."""

    states: int
    transitions: int
    complete: bool
    violation: str = ""
    trace: tuple[str, ...] = ()

    def __str__(self) -> str:
        how = "complete" if self.complete else "bounded"
        told = f"{self.states:,} states, {self.transitions:,} transitions, {how}"
        if not self.violation:
            return f"{told}: everything holds"
        lines = "\n".join(f"  {n:2d} {line}" for n, line in enumerate(self.trace, 1))
        return f"{told}: {self.violation}\n{lines}"


@dataclass
class _Row:
    """What a process can do in one state of its own, by the variables under `mask`."""

    mask: int = 0
    table: dict[int, list[tuple[int, tuple[_Hold, ...], str]]] = field(default_factory=dict)


@dataclass
class _Hold:
    check: Callable[[World], None]
    mask: int = 0
    good: set[int] = field(default_factory=set)


class _Runner:
    """One process with its field and its rows."""

    def __init__(self, process: Process, own: Field) -> None:
        self.process = process
        self.own = own
        self.rows: list[_Row] = []

    def row(self, number: int) -> _Row:
        while len(self.rows) <= number:
            self.rows.append(_Row())
        return self.rows[number]


class Explorer:
    """One breadth-first exploration, so that the first violation is one of the nearest."""

    def __init__(self, system: System) -> None:
        self._system = system
        self._space = Space(system.bits_of)
        self._runners: list[_Runner] = []
        firsts = {second: first for first, second in system.twins}
        self._twins = []
        for at, process in enumerate(system.processes):
            own = self._space.add(system.local_bits, process.start)
            if at in firsts:
                # Twins share the numbers of their states, so that these can change places.
                elder = self._runners[firsts[at]].own
                own.values, own.numbers = elder.values, elder.numbers
                self._twins.append((elder, own))
            self._runners.append(_Runner(process, own))
        self._holds = [_Hold(check) for check in system.holds]
        self._parents: dict[int, tuple[int, str]] | None = None
        self._at = 0
        self._doing = ""

    def run(self, states_max: int, *, parents: bool = False) -> Found:
        """Explore until everything was seen, something is violated, or `states_max` are known."""
        self._parents = {} if parents else None
        seen = {0}
        frontier = [0]
        transitions = 0
        try:
            for hold in self._holds:
                self._look(hold, 0)
            while frontier and len(seen) < states_max:
                frontier, moved = self._level(frontier, seen)
                transitions += moved
        except ViolatedError as violation:
            return Found(len(seen), transitions, False, str(violation), self._trace())
        return Found(len(seen), transitions, not frontier)

    def _level(self, frontier: list[int], seen: set[int]) -> tuple[list[int], int]:
        found: list[int] = []
        moved = 0
        twins, parents, ends = self._twins, self._parents, self._system.ends
        runners = [(r.own.shift, r.own.low, r.rows, r) for r in self._runners]
        for state in frontier:
            before = moved
            for shift, low, rows, runner in runners:
                number = (state >> shift) & low
                if number < len(rows):
                    row = rows[number]
                    steps = row.table.get(state & row.mask)
                else:
                    steps = None
                if steps is None:
                    steps = self._fill(runner, number, state)
                for delta, holds, label in steps:
                    after = state + delta
                    moved += 1
                    if twins:
                        after = self._ordered(after)
                    if after in seen:
                        continue
                    seen.add(after)
                    found.append(after)
                    if parents is not None:
                        parents[after] = (state, f"{runner.process.name}: {label}")
                    for hold in holds:
                        if after & hold.mask not in hold.good:
                            self._at, self._doing = after, ""
                            self._look(hold, after)
            if ends is not None and moved == before:
                self._at, self._doing = state, ""
                ends(World(self._space, state))
        return found, moved

    def _ordered(self, state: int) -> int:
        for one, two in self._twins:
            first, second = (state >> one.shift) & one.low, (state >> two.shift) & two.low
            if first > second:
                state += (second - first << one.shift) + (first - second << two.shift)
        return state

    def _fill(
        self, runner: _Runner, number: int, state: int
    ) -> list[tuple[int, tuple[_Hold, ...], str]]:
        """Compute what a process can do, and keep it for all states that look the same to it."""
        row = runner.row(number)
        world = World(self._space, state)
        self._at, self._doing = state, runner.process.name
        steps = []
        for label, local, changes in runner.process.step(runner.own.values[number], world):
            delta = (runner.own.number(local) - number) << runner.own.shift
            changed = 0
            for key, value in changes.items():
                place = self._space.of(key)
                now, then = (state >> place.shift) & place.low, place.number(value)
                world.read |= place.mask
                if now != then:
                    delta += (then - now) << place.shift
                    changed |= place.mask
            if changed:
                self._doing = f"{runner.process.name}: {label}"
                after = World(self._space, state + delta)
                self._system.moves(world, after, changes)
                world.read |= after.read
            if delta:
                holds = tuple(h for h in self._holds if h.mask & changed)
                steps.append((delta, holds, label))
        if world.read & ~row.mask:
            row.mask |= world.read
            row.table.clear()
        row.table[state & row.mask] = steps
        return steps

    def _look(self, hold: _Hold, state: int) -> None:
        world = World(self._space, state)
        hold.check(world)
        if world.read & ~hold.mask:
            hold.mask |= world.read
            hold.good.clear()
            # Which steps can break it is to be found out anew.
            for runner in self._runners:
                for row in runner.rows:
                    row.table.clear()
        hold.good.add(state & hold.mask)

    def _trace(self) -> tuple[str, ...]:
        if self._parents is None:
            return ()
        lines = [self._doing] if self._doing else []
        at = self._at
        while at in self._parents:
            at, line = self._parents[at]
            lines.append(line)
        return tuple(reversed(lines))


def explore(system: System, states_max: int = 1 << 40) -> Found:
    """Explore a system; a violation comes with the shortest way to it."""
    found = Explorer(system).run(states_max)
    if found.violation:
        # Again, this time remembering every state's predecessor: twice the memory, and rarely.
        return Explorer(system).run(states_max, parents=True)
    return found
