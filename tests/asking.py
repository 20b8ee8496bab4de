"""How a rank without torch gets a step back: decide, read its table, fetch its part, k by k."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from ckptmgr.errors import DamageError, HostMemoryError, UsageError
from ckptmgr.staging.control import Client, Fetch, Fetched, Load, Restore, Restored
from ckptmgr.staging.layout import decode_layout
from ckptmgr.staging.tables import read_tables

Ask = Callable[..., Any]
TRIES_MAX = 5


@dataclass(frozen=True, slots=True)
class Came:
    """A step that came back whole, and where it is; attempt 0 is none."""

    attempt: int
    step: int
    source: str = ""
    path: str = ""
    slot: int = 0
    generation: int = 0
    skipped: tuple[tuple[str, str], ...] = ()


def part_of(ask: Ask, reply: Restored, seconds: float) -> Came:
    """Fetch the whole part of the rank that asked."""
    if reply.damage:
        raise DamageError(reply.damage)
    tables = read_tables(Path(reply.tables))
    assert (tables.attempt, tables.step, tables.world) == (reply.attempt, reply.step, reply.world)
    (table,) = tables.ranks
    end = decode_layout(table.layout, subject="table").data_bytes
    (lent,) = ask(Fetch(((table.rank, ((0, end),)),)), Fetched, seconds).parts
    return Came(reply.attempt, reply.step, lent.source, lent.path, lent.slot, lent.generation)


def bring(ask: Ask, request: Restore, k: int, seconds: float) -> tuple[Came, int]:
    """Restore one step, going on behind those that prove unusable; also the next free k."""
    first, skipped, tries = k, list[tuple[str, str]](), 0
    while True:
        one = msgspec.structs.replace(request, k=k, first_k=first)
        try:
            reply = ask(one, Restored, seconds)
        except DamageError as error:
            told = "; ".join(f"{step}: {why}" for step, why in skipped)
            error.message = f"{error.message}; {told}"
            raise
        k += 1
        skipped += reply.skipped
        if not reply.attempt:
            return Came(0, 0, skipped=tuple(skipped)), k
        try:
            came = part_of(ask, reply, seconds)
        except DamageError as error:
            skipped.append((f"{reply.attempt}.{reply.step}", str(error).partition("\n")[0]))
            continue
        except (UsageError, HostMemoryError):
            # The daemon died meanwhile, and the next one knows of no decision: ask for it again.
            k, tries = k - 1, tries + 1
            if tries > TRIES_MAX:
                raise
            continue
        return replace(came, skipped=tuple(skipped)), k


def load(client: Client, request: Load, seconds: float) -> Came:
    """Read one step without claiming anything, going on behind damage."""
    skipped = list[tuple[str, str]]()
    while True:
        reply = client.ask(request, Restored, seconds)
        skipped += reply.skipped
        if not reply.attempt:
            return Came(0, 0, skipped=tuple(skipped))
        try:
            came = part_of(client.ask, reply, seconds)
        except DamageError as error:
            skipped.append((f"{reply.attempt}.{reply.step}", str(error).partition("\n")[0]))
            rejected = (*request.rejected, (reply.attempt, reply.step))
            request = msgspec.structs.replace(request, rejected=rejected)
            continue
        return replace(came, skipped=tuple(skipped))
