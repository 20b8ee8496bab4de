"""A store in memory that remembers the instant before each of its changes, for crashes at all.

What a crash leaves behind is such an instant and what became of the change that was under way. So
the code runs once, whole, and every crash of it is a copy of a dict.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from ckptmgr.errors import ObjectNotFoundError, StoreUnreachableError
from ckptmgr.repository import keys
from ckptmgr.store.base import Buffers, PutResult, Store, range_of
from ckptmgr.types import StepId

Kind = Literal["put", "delete", "durable"]


class ViolatedError(AssertionError):
    """An invariant does not hold."""


@dataclass(frozen=True)
class Sealed:
    """A snapshot in the memory of all hosts, which is undecided as far as they know."""

    attempt: int
    nonce: str
    step: int

    @property
    def id(self) -> StepId:
        return StepId(self.attempt, self.step)


@dataclass(frozen=True)
class Ledger:
    """What users were told, and what host memory holds."""

    acked: frozenset[StepId] = frozenset()
    resumed: tuple[tuple[int, StepId], ...] = ()
    sealed: tuple[Sealed, ...] = ()


@dataclass(frozen=True)
class Change:
    """One change of the store."""

    kind: Kind
    key: str
    blob: bytes = b""


@dataclass(frozen=True)
class State:
    """What a store holds, which of it is visible but not durable, and what was told of it.

    Where it is not `exclusive`, a put that comes late replaces what others have put meanwhile, save
    a manifest (docs/guarantees.md).
    """

    objects: Mapping[str, bytes] = field(default_factory=dict)
    soft: frozenset[str] = frozenset()
    ledger: Ledger = field(default_factory=Ledger)
    exclusive: bool = True

    def name(self) -> object:
        """Equal for equal states."""
        return frozenset(self.objects.items()), self.soft, self.ledger

    def after(self, change: Change, *, durable: bool) -> State:
        """With a change made; a put over something else is no change, where one wins."""
        objects, soft = dict(self.objects), set(self.soft)
        replaces = not self.exclusive and not change.key.startswith("man/")
        if change.kind == "put" and (replaces or change.key not in objects):
            objects[change.key] = change.blob
            soft |= set() if durable else {change.key}
        elif change.kind == "delete":
            check_delete(objects, self.soft, change.key)
            objects.pop(change.key, None)
            soft.discard(change.key)
        elif change.kind == "durable":
            soft.discard(change.key)
        return replace(self, objects=objects, soft=frozenset(soft))

    def cut(self) -> State:
        """After a power cut: what was not durable is gone."""
        objects = {key: blob for key, blob in self.objects.items() if key not in self.soft}
        return replace(self, objects=objects, soft=frozenset())


def check_delete(objects: Mapping[str, bytes], soft: frozenset[str] | set[str], key: str) -> None:
    """I8 and I9: data only of steps that are given up for ever, and of registers nothing."""
    kind = key.split("/", 1)[0]
    if kind == "holds" or key not in objects:
        return
    step = keys.parse_step(key)
    if kind not in {"data", "man"} or step is None:
        raise ViolatedError(f"I9 {key} is deleted")
    retired, register = keys.retired(step), keys.commit(step)
    aborted = b'"ABORT"' in objects.get(register, b"") and register not in soft
    if not aborted and not (retired in objects and retired not in soft):
        raise ViolatedError(f"I8 {key} is deleted, and {step} was not given up")


class CrashStore(Store):
    """`instants` are the states before each change, with the change; `now` is the state."""

    durable_on_return = False

    def __init__(self, state: State, *, ambiguous: int = -1) -> None:
        self._objects = dict(state.objects)
        self._soft = set(state.soft)
        self._ambiguous = ambiguous
        self.ledger = state.ledger
        self.exclusive: bool = state.exclusive
        self.instants: list[tuple[State, Change]] = []
        self._keys: list[str] | None = None

    @property
    def url(self) -> str:
        return "crash://"

    @property
    def now(self) -> State:
        return State(dict(self._objects), frozenset(self._soft), self.ledger, self.exclusive)

    def tell(self, **changes: object) -> None:
        """Change the ledger."""
        self.ledger = replace(self.ledger, **changes)  # type: ignore[arg-type]

    def _note(self, change: Change) -> bool:
        """Remember the instant; whether the answer to this change is lost."""
        self.instants.append((self.now, change))
        self._keys = None
        return len(self.instants) - 1 == self._ambiguous

    async def put_new(self, key: str, buffers: Buffers) -> PutResult:
        blob = b"".join(buffers)
        lost = self._note(Change("put", key, blob))
        result = PutResult.CONFLICT if key in self._objects else PutResult.OK
        self._objects.setdefault(key, blob)
        if lost:
            raise StoreUnreachableError("the answer is lost", subject=key)
        return result

    async def get(
        self,
        key: str,
        offset: int = 0,
        length: int | None = None,
        into: memoryview | None = None,
    ) -> memoryview:
        blob = self._objects.get(key)
        if blob is None:
            raise ObjectNotFoundError("does not exist", subject=key)
        return range_of(key, memoryview(blob), offset, length, into)

    async def list(self, prefix: str) -> list[str]:
        if self._keys is None:
            self._keys = sorted(self._objects)
        # "0" is the character after "/", with which every prefix ends.
        end = f"{prefix[:-1]}0"
        return self._keys[bisect_left(self._keys, prefix) : bisect_left(self._keys, end)]

    async def delete(self, key: str) -> None:
        lost = self._note(Change("delete", key))
        check_delete(self._objects, self._soft, key)
        self._objects.pop(key, None)
        self._soft.discard(key)
        if lost:
            raise StoreUnreachableError("the answer is lost", subject=key)

    async def make_durable(self, key: str) -> None:
        if key not in self._objects:
            raise ObjectNotFoundError("does not exist", subject=key)
        if key in self._soft:
            self._note(Change("durable", key))
            self._soft.discard(key)

    async def aclose(self) -> None:
        pass
