"""The daemon's Reader, asked as a rank asks it: decide, read the table, fetch, k by k."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from asking import Came
from ckptmgr.daemon.reader import Reader
from ckptmgr.daemon.session import Session
from ckptmgr.errors import DamageError
from ckptmgr.staging.control import Load, Restore, Restored
from ckptmgr.staging.layout import decode_layout
from ckptmgr.staging.tables import read_tables


async def bring(reader: Reader, session: Session) -> Came:
    """The newest step that can be had, whole; a session without an attempt only reads."""
    skipped, rejected = list[tuple[str, str]](), list[tuple[int, int]]()
    while True:
        if session.attempt:
            reply = await reader.restore(session, Restore(k=len(rejected)))
        else:
            url = session.job.url
            reply = await reader.load(session, Load(url, rejected=tuple(rejected)))
        skipped += reply.skipped
        try:
            came = await _part(reader, session, reply)
        except DamageError as error:
            skipped.append((f"{reply.attempt}.{reply.step}", str(error)))
            rejected.append((reply.attempt, reply.step))
            continue
        return replace(came, skipped=tuple(skipped))


async def _part(reader: Reader, session: Session, reply: Restored) -> Came:
    if reply.damage:
        raise DamageError(reply.damage)
    (table,) = read_tables(Path(reply.tables)).ranks
    end = decode_layout(table.layout, subject="table").data_bytes
    (lent,) = (await reader.fetch(session, ((table.rank, ((0, end),)),))).parts
    return Came(reply.attempt, reply.step, lent.source, lent.path, lent.slot, lent.generation)
