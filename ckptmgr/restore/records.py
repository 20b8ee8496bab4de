"""Every small object of a store against its own key, and what must be there but is not."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from functools import partial
from typing import Any

from ckptmgr.errors import (
    DamageError,
    ObjectNotFoundError,
    ObjectUnreadableError,
    RecordDamagedError,
    StoreError,
    StoreUnreachableError,
)
from ckptmgr.repository import keys
from ckptmgr.repository.catalog import Hold, Verified
from ckptmgr.repository.commit import (
    Active,
    Claim,
    Decision,
    Format,
    Have,
    Resume,
    Retired,
    read_record,
)
from ckptmgr.repository.manifest import read_manifest
from ckptmgr.repository.pack import check_pack_header
from ckptmgr.repository.record import Kind, unseal
from ckptmgr.restore.verify import Damage, seen_twice, verify_end
from ckptmgr.store.base import Store
from ckptmgr.types import PAGE_BYTES, StepId

_READS_AT_ONCE = 16

_TYPES: dict[str, tuple[Kind, type[Any]]] = {
    "format": (Kind.FORMAT, Format),
    "claim": (Kind.CLAIM, Claim),
    "active": (Kind.ACTIVE, Active),
    "have": (Kind.HAVE, Have),
    "resume": (Kind.RESUME, Resume),
    "commit": (Kind.COMMIT, Decision),
    "retired": (Kind.RETIRED, Retired),
    "holds": (Kind.HOLD, Hold),
    "verified": (Kind.VERIFIED, Verified),
    "tags": (Kind.TAGS, Decision),
}
_NAME = re.compile(
    r"format"
    r"|attempts/[0-9]{8}/(claim|active|have/[^/]+|resume/[0-9]{4})"
    r"|(commit|retired|tags|verified)/[0-9]{8}/[0-9]{12}"
    r"|holds/[0-9]{8}/[0-9]{12}/[^/]+"
    r"|man/[0-9]{8}/[0-9]{12}/[0-9]{6}"
    r"|data/[0-9]{8}/[0-9]{12}/[0-9]{6}/[0-9a-f]+\.pack"
)
_PREFIXES = ("data/", "man/", "tags/", "commit/", "verified/", "retired/", "holds/", "attempts/")
"""In this order what is put later is listed earlier: nothing looks missing that is only new."""


async def list_objects(store: Store) -> list[str]:
    """Every key of the format; `format` comes last."""
    return [key for prefix in _PREFIXES for key in await store.list(prefix)] + [keys.FORMAT]


async def verify_records(store: Store, found: Iterable[str]) -> list[Damage]:
    """Read each record of `found`, and the header of each pack; list what does not hold.

    What is deleted meanwhile is passed over.

    Raises:
        StoreUnreachableError: the store can not be read now; this is not damage.
    """
    gate = asyncio.Semaphore(_READS_AT_ONCE)

    async def one(key: str) -> list[Damage]:
        async with gate:
            return await seen_twice(store, partial(_verify, store, key))

    return [damage for damages in await asyncio.gather(*map(one, found)) for damage in damages]


async def _verify(store: Store, key: str) -> list[Damage]:
    if _NAME.fullmatch(key) is None:
        return [Damage(key, 0, "has a name that the format does not have")]
    try:
        if key.startswith("data/"):
            check_pack_header(key, await store.get(key, 0, PAGE_BYTES))
            return []
        record = await read_record(store, kind_of(key), key)
        check_record(key, record)
        return await verify_end(store, key, len(record))
    except StoreUnreachableError:
        raise
    except ObjectNotFoundError:
        return []
    except (DamageError, StoreError) as error:
        return [Damage(key, 0, error.message)]


def kind_of(key: str) -> Kind:
    """The kind of the record that the format has under a name.

    Raises:
        RecordDamagedError: it has none.
    """
    if _NAME.fullmatch(key) is None:
        raise RecordDamagedError("has a name that the format does not have", subject=key)
    parts = key.split("/")
    if parts[0] == "man":
        return Kind.MANIFEST
    return _TYPES[parts[2] if parts[0] == "attempts" else parts[0]][0]


def check_record(key: str, record: memoryview) -> None:
    """Refuse a record that is not what its key says.

    Raises:
        DamageError: it does not hold.
    """
    parts = key.split("/")
    if parts[0] == "man":
        read_manifest(StepId(int(parts[1]), int(parts[2])), int(parts[3]), record)
        return
    kind, type_ = _TYPES[parts[2] if parts[0] == "attempts" else parts[0]]
    unseal(kind, key, record, type_)


def expected(
    found: Iterable[str], parents: Iterable[StepId], exclusive: bool | None = True
) -> set[str]:
    """Keys that must be there because of `found` and of the parents that commits name.

    A claim comes before everything else of its attempt; `active` before its first manifest, unless
    a newer attempt is active already; a register before every mark of its step, and it stays.
    A commit that lost its copy under tags/ may only have been cut short before that was put.
    In single-decider mode a step may be retired that has no register.
    """
    found = set(found)
    of_steps = {key: step for key in found if (step := keys.parse_step(key)) is not None}
    attempts = {step.attempt for step in of_steps.values()}
    attempts |= {a for key in found if (a := keys.parse_attempt(key)) is not None}
    wanted = {keys.claim(attempt) for attempt in attempts}
    newest_active = max((a for a in attempts if keys.active(a) in found), default=0)
    saved = {step.attempt for key, step in of_steps.items() if key.startswith("man/")}
    wanted |= {keys.active(attempt) for attempt in saved if attempt > newest_active}
    marks = ("verified/", "holds/", "tags/", *(("retired/",) if exclusive is not False else ()))
    marked = {step for key, step in of_steps.items() if key.startswith(marks)}
    return wanted | {keys.commit(step) for step in marked | set(parents) if step.attempt}


async def verify_presence(
    store: Store, found: Iterable[str], parents: Iterable[StepId]
) -> list[Damage]:
    """What `expected` names and the store does not hold.

    Raises:
        StoreUnreachableError: the store can not be read now; this is not damage.
    """
    found = set(found)
    missing = []
    for key in sorted(expected(found, parents, store.exclusive) - found):
        try:
            await store.get(key, 0, 0)  # it may have been put since the listing
        except ObjectNotFoundError:
            missing.append(Damage(key, 0, "is gone"))
        except ObjectUnreadableError as error:
            missing.append(Damage(key, 0, error.message))
    return missing
