"""Which committed step somebody means by `1200`, `3.1200` or nothing."""

from __future__ import annotations

from ckptmgr.errors import NothingToRestoreError, ObjectNotFoundError, UsageError
from ckptmgr.repository.catalog import Catalog, StepEntry, standing_steps
from ckptmgr.repository.commit import Decision
from ckptmgr.types import StepId


async def candidates(catalog: Catalog, text: str | None) -> list[StepId]:
    """Decided steps that stand and are meant by `text`, newest first; some may be ABORT.

    Raises:
        UsageError: `text` is not a step.
    """
    standing = await standing_steps(catalog.store)
    if text is None:
        return standing
    try:
        attempt, number = StepId.parse(text)
    except ValueError as error:
        raise UsageError(str(error), subject="step") from None
    return [s for s in standing if s.step == number and attempt in (None, s.attempt)]


async def find_entry(catalog: Catalog, text: str | None) -> StepEntry:
    """The newest commit that is meant; if there is none, the newest step of that name in any state.

    Raises:
        NothingToRestoreError: there is none.
        DamageError: its register is damaged.
    """
    entries = await catalog.entries()
    try:
        meant = (await find(catalog, text)).id
    except NothingToRestoreError:
        attempt, number = StepId.parse(text) if text else (None, None)
        named = [e for e in entries if e.id.step == number and attempt in (None, e.id.attempt)]
        if not named:
            raise
        return named[0]
    return next(entry for entry in entries if entry.id == meant)


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
