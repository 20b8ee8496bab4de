"""Which committed step somebody means by `1200`, `3.1200` or nothing."""

from __future__ import annotations

from collections.abc import Iterable

from ckptmgr.errors import NothingToRestoreError, ObjectNotFoundError, UsageError
from ckptmgr.repository.breakout import Breakout
from ckptmgr.repository.catalog import Catalog, StepEntry, list_steps, standing_steps
from ckptmgr.repository.commit import Decision
from ckptmgr.repository.envelope import Envelope
from ckptmgr.repository.line import line_of, sources_of, steps_before
from ckptmgr.types import StepId


async def candidates(catalog: Catalog, text: str | None) -> list[StepId]:
    """Decided steps that stand and are meant by `text`, newest first; some may be ABORT.

    Raises:
        UsageError: `text` is not a step.
    """
    standing = await standing_steps(catalog.store)
    return standing if text is None else _meant(standing, text)


def _meant(steps: Iterable[StepId], text: str) -> list[StepId]:
    try:
        attempt, number = StepId.parse(text)
    except ValueError as error:
        raise UsageError(str(error), subject="step") from None
    return [s for s in steps if s.step == number and attempt in (None, s.attempt)]


async def candidates_before(catalog: Catalog, text: str) -> tuple[list[StepId], StepId | None]:
    """Commits that stand and that the newest one came through before the expression `text` first
    held, newest first; and the step for which it did, None where it holds for none.

    A step counts even if it was retired: its register stays, and with that its tags.

    Raises:
        UsageError: `text` is no expression.
        LockedError: a step that it might have held for first has tags whose key is not given.
    """
    breakout = Breakout.parse(text)
    standing = await standing_steps(catalog.store)
    found = [entry.decision for entry in await catalog.entries()]
    commits = {one.id: one for one in found if one is not None and one.committed}
    newest = next((step for step in standing if step in commits), None)
    if newest is None:
        return [], None
    sources = await sources_of(catalog.store, {step.attempt for step in commits})
    line = line_of(newest, commits, sources)
    before, broke_out = steps_before(breakout, commits.values(), line)
    looked_at = line if broke_out is None else line[: line.index(broke_out)]
    for one in (commits[step] for step in looked_at if step in commits):
        if isinstance(one.sealed_tags, Envelope):
            catalog.keyring.key_of(one.sealed_tags, subject=f"step {one.id} on the way there")
    return [step for step in before if step in set(standing)], broke_out


async def find_entry(catalog: Catalog, text: str | None) -> StepEntry:
    """The newest commit that is meant; if there is none, the newest step of that name in any state.

    Raises:
        NothingToRestoreError: there is none.
        DamageError: its register is damaged.
    """
    try:
        meant = (await find(catalog, text)).id
    except NothingToRestoreError:
        named = await catalog.entry(*StepId.parse(text)) if text else None
        if named is None:
            raise
        return named
    entry = await catalog.entry(meant.attempt, meant.step)
    if entry is None:  # somebody has emptied the store meanwhile
        raise NothingToRestoreError(f"step {meant} is gone", subject=catalog.store.url)
    return entry


async def find(catalog: Catalog, text: str | None) -> Decision:
    """The newest commit that is meant.

    Raises:
        NothingToRestoreError: there is none.
        DamageError: its register is damaged.
    """
    for step in await candidates(catalog, text):
        try:
            decision = await catalog.decision(step)
        except ObjectNotFoundError:
            continue
        if decision.committed:
            return decision
    raise NothingToRestoreError(
        f"no committed step {text}" if text else "no committed step", subject=catalog.store.url
    )


async def find_held(catalog: Catalog, text: str, hold_id: str) -> StepId:
    """The newest step that is meant and has that hold. One that was retired in the instant before
    it was held is found, too: its data stays until it is released.

    Raises:
        NothingToRestoreError: no committed step is meant.
        UsageError: what is meant has no such hold.
        DamageError: its register is damaged.
    """
    holds = (await list_steps(catalog.store)).holds
    held = _meant((step for step, ids in holds.items() if hold_id in ids), text)
    if held:
        return max(held)
    meant = (await find(catalog, text)).id
    raise UsageError(f"has no hold {hold_id}", subject=f"step {meant}")
