"""The reading commands' work: verify many steps, or write one as files with fallback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ckptmgr.config import BUDGET_BYTES
from ckptmgr.errors import DamageError, NothingToRestoreError, ObjectNotFoundError
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.catalog import Catalog
from ckptmgr.repository.commit import Decision
from ckptmgr.repository.hold import held_step
from ckptmgr.restore.choose import candidates
from ckptmgr.restore.files import Progress, write_hostbuffer, write_safetensors
from ckptmgr.restore.verify import Damage, verify_step


async def verify_store(
    catalog: Catalog, step: str | None, *, every: bool, quick: bool, progress: Progress
) -> list[dict[str, Any]]:
    """Verify the newest step, the one asked for, or all; one report per step.

    A step whose register is damaged is reported like any other damage.
    """
    pool = BufferPool(BUDGET_BYTES)
    reports: list[dict[str, Any]] = []
    for one in await candidates(catalog, step):
        try:
            decision = await catalog.decision(one)
            if not decision.committed:
                continue
            damage = await verify_step(catalog, decision, pool, quick=quick, progress=progress)
        except DamageError as error:
            damage = [Damage(error.subject, 0, error.message)]
        except ObjectNotFoundError:
            continue
        reports.append(
            {
                "step": str(one),
                "damage": [{"key": d.key, "offset": d.offset, "what": d.what} for d in damage],
            }
        )
        if not every:
            break
    return reports


async def restore_files(
    catalog: Catalog, step: str | None, form: str, directory: Path, progress: Progress
) -> dict[str, Any]:
    """Write the newest step that holds (or the one asked for) into `directory`.

    Returns the step, the bytes, and the newer steps that were skipped, each with its damage. For
    other formats than safetensors it leaves a host buffer and names it as `buffer`.

    Raises:
        NothingToRestoreError: there is no such step.
        DamageError: none of the steps holds.
    """
    skipped: list[dict[str, str]] = []
    last: DamageError | None = None
    for one in await candidates(catalog, step):
        try:
            decision = await catalog.decision(one)
            if not decision.committed:
                continue
            written = await _write(catalog, decision, form, directory, progress)
        except ObjectNotFoundError:
            continue
        except DamageError as error:
            last = error
            skipped.append({"step": str(one), "why": f"{error.subject}: {error.message}"})
            for path in directory.iterdir():
                path.unlink()
            continue
        return {
            "step": str(one),
            "bytes": decision.raw_bytes,
            "tags": decision.tags,
            "skipped": skipped,
            **written,
        }
    if last is not None:
        raise last
    raise NothingToRestoreError(
        f"no committed step {step}" if step else "no committed step", subject=catalog.store.url
    )


async def _write(
    catalog: Catalog, decision: Decision, form: str, directory: Path, progress: Progress
) -> dict[str, str]:
    pool = BufferPool(BUDGET_BYTES)
    async with held_step(catalog.store, decision.id):
        manifest = (await catalog.manifest(decision, 0)).manifest
        if form == "safetensors":
            await write_safetensors(catalog.store, manifest, directory, pool, progress)
            return {}
        buffer = await write_hostbuffer(catalog.store, manifest, directory, pool, progress)
        return {"buffer": str(buffer)}
