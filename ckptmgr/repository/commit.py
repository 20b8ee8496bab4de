"""Decide-once registers: claims, resume decisions, and COMMIT or ABORT of a step.

A register is decided by `put_new`: one winner, for ever. Whoever loses reads what won, makes it
durable (visible is not durable) and obeys it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from ckptmgr.errors import (
    DamageError,
    MissingObjectError,
    ObjectNotFoundError,
    RecordDamagedError,
    RegisterConflictError,
    StoreError,
    StoreUnreachableError,
    UnsupportedFormatError,
    UntrustedError,
    UsageError,
)
from ckptmgr.repository import keys
from ckptmgr.repository.budget import in_thread
from ckptmgr.repository.envelope import Envelope
from ckptmgr.repository.exclusion import is_exclusive
from ckptmgr.repository.keyring import CLEAR, CLEAR_HINT, NO_KEYS, Keyring
from ckptmgr.repository.manifest import SealedManifest, read_manifest
from ckptmgr.repository.opening import check_vouched, open_tags
from ckptmgr.repository.record import HEADER_BYTES, VERSION, Kind, declared_bytes, seal, unseal
from ckptmgr.repository.signature import COMMIT, Signer, is_signed
from ckptmgr.store.base import PutResult, Store
from ckptmgr.store.mirrored import from_either
from ckptmgr.types import Reach, StepId, Tags

T = TypeVar("T")

FROM_SCRATCH = StepId(0, 0)
"""What an attempt resumes from when the job has no step yet."""


_NO_MARK = "Start the job: it writes the mark again, and loses nothing."
_BAD_MARK = "Delete this object and start the job: it writes the mark again, and loses nothing."


class Format(msgspec.Struct, frozen=True, omit_defaults=True):
    """The store's format version, and whether its `put_new` decides once, as was proved when the
    mark was made. Where not, the job is in single-decider mode (docs/format.md).
    """

    version: int
    exclusive: bool = True


class Claim(msgspec.Struct, frozen=True):
    """Who took an attempt; `at` is Unix time, for people only."""

    attempt: int
    nonce: str
    world: int
    host: str
    run_id: str
    at: float


class Active(msgspec.Struct, frozen=True):
    """An attempt that has put its first snapshot: older attempts end themselves."""

    attempt: int
    nonce: str


class Have(msgspec.Struct, frozen=True, omit_defaults=True):
    """Sealed (attempt, step, rank) snapshots in one host's memory: candidates, never decisions.

    `reached` is how far training of earlier attempts came, as that memory tells: for people only.
    """

    host: str
    snapshots: tuple[tuple[int, int, int], ...]
    reached: tuple[Reach, ...] = ()


class Resume(msgspec.Struct, frozen=True):
    """What an attempt resumes from."""

    attempt: int
    step: int

    @property
    def id(self) -> StepId:
        """The (attempt, step) to resume from; FROM_SCRATCH for none."""
        return StepId(self.attempt, self.step)


class Retired(msgspec.Struct, frozen=True):
    """Retention gave a step up; its data may be gone."""

    attempt: int
    step: int
    why: str = ""


class Decision(msgspec.Struct, frozen=True):
    """The register of a step: COMMIT with the digest (hex) of every rank's manifest, or ABORT.

    The tags of an encrypted step are in `sealed_tags`; `tags` has them once `readable` gave them.
    `stall_seconds` and `written_at` are those of the slowest rank; 0 where nobody knows.
    """

    decision: Literal["COMMIT", "ABORT"]
    attempt: int
    step: int
    nonce: str = ""
    world: int = 0
    parent: tuple[int, int] = (0, 0)
    manifests: tuple[str, ...] = ()
    raw_bytes: int = 0
    stored_bytes: int = 0
    sealed_at: float = 0.0
    tags: Tags = {}
    why: str = ""
    stall_seconds: float = 0.0
    written_at: float = 0.0
    sealed_tags: Envelope | UnsetType = UNSET
    signer: str | UnsetType = UNSET
    signature: str | UnsetType = UNSET

    @property
    def id(self) -> StepId:
        """The (attempt, step) it decides."""
        return StepId(self.attempt, self.step)

    @property
    def committed(self) -> bool:
        """Whether the step is a checkpoint."""
        return self.decision == "COMMIT"


async def put_record(store: Store, kind: Kind, key: str, payload: Any) -> PutResult:
    """Put a record; CONFLICT if the key exists, whatever it holds."""
    return await store.put_new(key, [memoryview(seal(kind, key, payload))])


async def read_record(store: Store, kind: Kind, key: str) -> memoryview:
    """The bytes of a record, unchecked, and no more of them than its header declares, nor than a
    record of that kind may have.

    The length is read first: memory is never taken for however long an object turns out to be.

    Raises:
        ObjectNotFoundError: no such key.
        RecordDamagedError: not a record, too long, or cut off.
        StoreUnreachableError: it can not be read now.
    """
    try:
        header = await store.get(key, 0, HEADER_BYTES)
        record = memoryview(bytearray(declared_bytes(kind, key, header)))
        record[:HEADER_BYTES] = header
        await store.get(key, HEADER_BYTES, into=record[HEADER_BYTES:])
    except (ObjectNotFoundError, StoreUnreachableError):
        raise
    except StoreError as error:
        raise RecordDamagedError(error.message, subject=key) from error
    return record


async def get_record(store: Store, kind: Kind, key: str, type_: type[T]) -> T:
    """Read and check a record.

    Raises:
        ObjectNotFoundError: no such key.
        DamageError: it does not hold.
    """

    async def read(one: Store) -> T:
        return unseal(kind, key, await read_record(one, kind, key), type_)

    return await from_either(store, key, read)


async def stored_manifest(store: Store, step: StepId, rank: int) -> SealedManifest:
    """Read and check the manifest of a part; errors as `get_record`."""
    key = keys.manifest(step, rank)

    async def read(one: Store) -> SealedManifest:
        return read_manifest(step, rank, await read_record(one, Kind.MANIFEST, key))

    return await from_either(store, key, read)


async def claim_of(store: Store, attempt: int) -> Claim | None:
    """The claim of an attempt; None if it is not there, or does not hold."""
    try:
        return await get_record(store, Kind.CLAIM, keys.claim(attempt), Claim)
    except (ObjectNotFoundError, DamageError):
        return None


async def same_job(first: Store, copy: Store) -> bool | None:
    """Whether `copy` is of the incarnation of the job that `first` holds: the claim of its newest
    attempt, of those that hold in both, is one of `first`'s. None where nothing can be compared.

    Raises:
        StoreError: one of the stores failed.
    """
    found = [key for key in await copy.list("attempts/") if key.endswith("/claim")]
    for attempt in sorted({keys.parse_attempt(key) or 0 for key in found}, reverse=True):
        theirs = await claim_of(copy, attempt)
        if theirs is None:
            continue
        try:
            return theirs == await get_record(first, Kind.CLAIM, keys.claim(attempt), Claim)
        except ObjectNotFoundError:
            return False if await first.list("attempts/") else None
        except DamageError:
            continue
    return None


async def decide(store: Store, kind: Kind, key: str, payload: T) -> T:
    """Put `payload` into a register, or return what somebody else decided, made durable."""
    if await put_record(store, kind, key, payload) is PutResult.OK:
        return payload
    # Durable first, then read: what is read before may be lost in a power cut of the store, and
    # another decision be made durable in its place.
    await store.make_durable(key)
    return await get_record(store, kind, key, type(payload))


async def check_format(store: Store, *, create: bool) -> bool:
    """Check that the store is of our format version; `create` marks an empty one.

    Settles `store.exclusive` for good: by the mark, or by a race before the mark is made.
    Returns False where there is no mark (and none was to be made).

    Raises:
        UnsupportedFormatError: it was written by a newer ckptmgr.
        DamageError: the mark is damaged, or is gone from a store that is not empty.
        UsageError: it is to be in single-decider mode, and its mark says otherwise.
    """
    try:
        found = await get_record(store, Kind.FORMAT, keys.FORMAT, Format)
    except ObjectNotFoundError:
        if not create:
            if await store.list("attempts/"):
                raise MissingObjectError("is gone", subject=keys.FORMAT, hint=_NO_MARK) from None
            return False
        exclusive = await is_exclusive(store) if store.exclusive is None else store.exclusive
        found = await decide(store, Kind.FORMAT, keys.FORMAT, Format(VERSION, exclusive))
    except RecordDamagedError as error:
        raise RecordDamagedError(error.message, subject=keys.FORMAT, hint=_BAD_MARK) from error
    if found.version != VERSION:
        raise UnsupportedFormatError(f"store has format {found.version}", subject=store.url)
    if store.exclusive is False and found.exclusive:
        raise UsageError(
            "is in use by daemons that are not in single-decider mode",
            subject=store.url,
            hint="Give the job a new URL, or leave CKPTMGR_SINGLE_DECIDER away.",
        )
    store.exclusive = found.exclusive
    return True


def commit_of(manifests: Sequence[SealedManifest], parent: StepId) -> Decision:
    """The COMMIT of a step: a pure function of its manifests, so that racing writers agree.

    Raises:
        RegisterConflictError: the manifests are not one of each rank, of one step and nonce.
    """
    ordered = sorted((m.manifest for m in manifests), key=lambda m: m.rank)
    first = ordered[0]
    same = all((m.id, m.nonce, m.world) == (first.id, first.nonce, first.world) for m in ordered)
    if not same or [m.rank for m in ordered] != list(range(first.world)):
        raise RegisterConflictError(
            "manifests of different incarnations or ranks", subject=keys.manifests(first.id)
        )
    by_rank = sorted(manifests, key=lambda m: m.manifest.rank)
    return Decision(
        decision="COMMIT",
        attempt=first.attempt,
        step=first.step,
        nonce=first.nonce,
        world=first.world,
        parent=(parent.attempt, parent.step),
        manifests=tuple(m.digest.hex() for m in by_rank),
        raw_bytes=sum(m.raw_bytes for m in ordered),
        stored_bytes=sum(m.stored_bytes for m in ordered),
        sealed_at=first.sealed_at,
        tags=first.tags if first.sealed_tags is UNSET else {},
        stall_seconds=max(m.stall_seconds for m in ordered),
        written_at=max(m.written_at for m in ordered),
        sealed_tags=first.sealed_tags,
    )


def as_stored(commit: Decision) -> Decision:
    """A decision as a store holds it: the tags of an encrypted step are sealed."""
    if commit.sealed_tags is UNSET:
        return commit
    return msgspec.structs.replace(commit, tags={})


def signed(commit: Decision, signer: Signer) -> Decision:
    """A COMMIT that says who made it."""
    named = msgspec.structs.replace(as_stored(commit), signer=signer.id, signature=UNSET)
    return msgspec.structs.replace(named, signature=signer.sign(COMMIT, msgspec.json.encode(named)))


def readable(decision: Decision, keyring: Keyring) -> Decision:
    """A register as it is for who has these keys: with its tags, if it is to be trusted.

    Raises:
        UntrustedError: it is a COMMIT that none of the trusted keys has signed, or of a step that
            is not encrypted as the keyring asks.
        RecordDamagedError: its tags are not those that were sealed.
    """
    if not decision.committed:
        return decision
    subject = keys.commit(decision.id)
    if keyring.trusted is not None:
        payload = msgspec.json.encode(msgspec.structs.replace(as_stored(decision), signature=UNSET))
        if not (isinstance(decision.signer, str) and isinstance(decision.signature, str)):
            raise UntrustedError("is not signed", subject=subject)
        signed_by = decision.signer, decision.signature
        if not is_signed(keyring.trusted, *signed_by, COMMIT, payload):
            why = f"is not signed by any of the keys {', '.join(keyring.trusted)}"
            raise UntrustedError(f"{why}; it names {decision.signer[:16]}", subject=subject)
    if not isinstance(decision.sealed_tags, Envelope):
        if keyring.refuses_clear:
            raise UntrustedError(CLEAR, subject=subject, hint=CLEAR_HINT)
        return decision
    place = decision.attempt, decision.step, decision.nonce
    tags = open_tags(decision.sealed_tags, place, keyring, subject)
    return msgspec.structs.replace(decision, tags=tags)


def has_locked_tags(decision: Decision, keyring: Keyring) -> bool:
    """Whether a register has tags that none of these keys opens: `readable` gives it none."""
    sealed = decision.sealed_tags
    return isinstance(sealed, Envelope) and sealed.key not in keyring.known


async def commit_step(
    store: Store,
    manifests: Sequence[SealedManifest],
    parent: StepId,
    keyring: Keyring = NO_KEYS,
) -> Decision:
    """Decide a step whose manifests are all durable; returns what the register holds, as it is for
    who has these keys.

    Raises:
        RegisterConflictError: it holds the commit of other manifests.
        UntrustedError: it holds a COMMIT that no reader with these keys takes; or this would be
            one, and was not put; or one of the parts was not written by whom the keys trust.
    """
    commit = commit_of(manifests, parent)
    if keyring.signer is not None:
        await in_thread(_check_all_vouched, manifests, keyring)
        commit = signed(commit, keyring.signer)
    readable(commit, keyring)
    decided = await decide(store, Kind.COMMIT, keys.commit(commit.id), commit)
    if decided.committed and decided.manifests != commit.manifests:
        raise RegisterConflictError("holds another commit", subject=keys.commit(commit.id))
    return readable(decided, keyring)


def _check_all_vouched(manifests: Sequence[SealedManifest], keyring: Keyring) -> None:
    for one in manifests:
        check_vouched(one, keyring)


def abort_of(step: StepId, why: str) -> Decision:
    """The ABORT of a step."""
    return Decision(decision="ABORT", attempt=step.attempt, step=step.step, why=why)


async def abort_step(store: Store, step: StepId, why: str, keyring: Keyring = NO_KEYS) -> Decision:
    """Give a step up, unless it is committed already; returns what the register holds.

    In single-decider mode the mark of retirement comes first: a COMMIT that a stopped daemon put,
    and that arrives only now, would overwrite the ABORT, and the mark hides it all the same.

    Raises:
        UntrustedError: it holds a COMMIT that no reader with these keys takes.
    """
    if store.exclusive is False:
        with contextlib.suppress(ObjectNotFoundError):
            await store.make_durable(keys.commit(step))
            found = await get_record(store, Kind.COMMIT, keys.commit(step), Decision)
            return readable(found, keyring)
        mark = Retired(step.attempt, step.step, why)
        if await put_record(store, Kind.RETIRED, keys.retired(step), mark) is PutResult.CONFLICT:
            await store.make_durable(keys.retired(step))
    decided = await decide(store, Kind.COMMIT, keys.commit(step), abort_of(step, why))
    return readable(decided, keyring)


async def put_witness(store: Store, commit: Decision) -> None:
    """Put a copy of a COMMIT beside it, so that a register that is lost later can be missed.

    Nothing depends on it: a crash before it leaves a step that is committed all the same.
    """
    await put_record(store, Kind.TAGS, keys.tags(commit.id), as_stored(commit))
