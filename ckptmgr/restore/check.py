"""The reading commands' work: verify many steps, or write one as files with fallback."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ckptmgr.config import BUDGET_BYTES
from ckptmgr.errors import DamageError, NothingToRestoreError, ObjectNotFoundError, UsageError
from ckptmgr.repository import keys
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.catalog import Catalog, is_retired
from ckptmgr.repository.commit import Decision
from ckptmgr.repository.envelope import Envelope
from ckptmgr.repository.hold import held_step
from ckptmgr.repository.manifest import Manifest
from ckptmgr.restore.adopted import is_adopted, write_adopted
from ckptmgr.restore.choose import candidates, candidates_before
from ckptmgr.restore.files import Progress, write_hostbuffer, write_safetensors
from ckptmgr.restore.records import list_objects, verify_presence, verify_records
from ckptmgr.restore.verify import Damage, verify_step
from ckptmgr.store.lanes import in_lanes
from ckptmgr.types import StepId

_READS_AT_ONCE = 16


async def verify_store(
    catalog: Catalog, step: str | None, *, every: bool, quick: bool, progress: Progress
) -> list[dict[str, Any]]:
    """Verify the newest step, the one asked for, or all; one report per step, newest first.

    The records of the attempts are always checked; what is wrong with them comes in a report
    without step. With `every`, so are the records of steps that are retired, aborted or undecided.
    A step that is newer than every commit and has manifests, but no register, is reported as not
    committed: its save was cut short, or its commit record is gone. What could not be looked into,
    because its key is not given, or was not, because it is `quick`, is told for each step.
    """
    store, pool = catalog.store, BufferPool(BUDGET_BYTES)
    found = await list_objects(store)
    by_step: dict[StepId | None, list[str]] = {}
    for key in found:
        by_step.setdefault(keys.parse_step(key), []).append(key)
    damage: list[Damage] = []
    commits: list[StepId] = []
    parents: list[StepId] = []
    looks: dict[StepId | None, dict[str, Any]] = {}
    for one in await candidates(catalog, step):
        try:
            decision = await catalog.decision(one)
            if not decision.committed:
                continue
            parents.append(StepId(*decision.parent))
            looks[one] = _look(catalog, decision, quick=quick)
            of_step = await verify_step(catalog, decision, pool, quick=quick, progress=progress)
        except DamageError as error:
            of_step = [Damage(error.subject, 0, error.message)]
        except ObjectNotFoundError:
            continue
        of_step += await verify_records(store, by_step.pop(one, []))
        if of_step and await is_retired(store, one):
            continue  # retention took it away while it was read
        commits.append(one)
        damage += of_step
        if not every:
            break
    rest = [key for one, of_one in by_step.items() if every or one is None for key in of_one]
    damage += await verify_records(store, rest)
    damage += await verify_presence(store, found, parents)
    undecided = [] if step else not_committed(found)
    return _reports(commits, undecided, damage, looks)


def _look(catalog: Catalog, decision: Decision, *, quick: bool) -> dict[str, Any]:
    """With which key a step is encrypted, and what `verify` does not check in it."""
    sealed = decision.sealed_tags
    key = sealed.key if isinstance(sealed, Envelope) else None
    not_checked = ["hashes"] if quick else []
    if key is not None and (quick or not catalog.keyring.known):
        not_checked.append("authentic")
    if not_checked:
        not_checked.append("decoded")
    return {"key": key, "not_checked": not_checked}


NO_STEP = {"id": None, "attempt": None, "step": None}
NO_LOOK: dict[str, Any] = {"key": None, "not_checked": []}


def damaged_store(error: DamageError) -> dict[str, Any]:
    """The one report on a store whose mark does not hold, so that nothing in it is looked at."""
    damage = {"key": error.subject, "offset": 0, "what": error.message}
    return {**NO_STEP, "committed": False, **NO_LOOK, "damage": [damage]}


def not_committed(found: Iterable[str]) -> list[StepId]:
    """Steps newer than every decided one that have a manifest, newest first."""
    steps: dict[str, set[StepId]] = {"man": set(), "commit": set(), "tags": set()}
    for key in found:
        step = keys.parse_step(key)
        if step is not None:
            steps.setdefault(key.partition("/")[0], set()).add(step)
    newest = max(steps["commit"] | steps["tags"], default=StepId(0, 0))
    return sorted((step for step in steps["man"] if step > newest), reverse=True)


def _reports(
    commits: list[StepId],
    undecided: list[StepId],
    damage: list[Damage],
    looks: Mapping[StepId | None, dict[str, Any]],
) -> list[dict[str, Any]]:
    """Everything that was looked at, newest first; what belongs to no step at the end."""
    places: dict[StepId | None, dict[tuple[str, int], Damage]] = {
        step: {} for step in [*commits, *undecided]
    }
    for one in damage:
        places.setdefault(keys.parse_step(one.key), {}).setdefault((one.key, one.offset), one)
    order = sorted((step for step in places if step is not None), reverse=True)
    return [
        {
            **(step.document() if step else NO_STEP),
            "committed": step in commits,
            **looks.get(step, NO_LOOK),
            "damage": [
                {"key": one.key, "offset": one.offset, "what": one.what}
                for one in places[step].values()
            ],
        }
        for step in [*order, *([None] if None in places else [])]
    ]


async def restore_files(
    catalog: Catalog,
    step: str | None,
    form: str,
    directory: Path,
    progress: Progress,
    *,
    before: str = "",
) -> dict[str, Any]:
    """Write the newest step that holds (or the one asked for) into `directory`.

    Returns the step, the bytes, the newer steps that were skipped, each with its damage, and the
    newer ones that were never committed, or whose commit record is gone. For torch and dcp it
    leaves a host buffer of each rank and names them as `buffers`. Without `form` it is files for a
    step that `watch` adopted, and safetensors for any other. With `before`, an expression over
    tags, only steps before it first held are looked at; `broke_out` is the step for which it did.

    Raises:
        NothingToRestoreError: there is no such step.
        DamageError: none of the steps holds.
    """
    skipped: list[dict[str, Any]] = []
    last: DamageError | None = None
    lists = [await catalog.store.list(prefix) for prefix in ("man/", "commit/", "tags/")]
    found = [key for of_prefix in lists for key in of_prefix]
    undecided = [] if step else not_committed(found)
    broke_out = None
    if before:
        offered, broke_out = await candidates_before(catalog, before)
    else:
        offered = await candidates(catalog, step)
    for one in offered:
        try:
            decision = await catalog.decision(one)
            if not decision.committed:
                continue
            written = await _write(catalog, decision, form, directory, progress)
        except ObjectNotFoundError:
            continue
        except DamageError as error:
            last = error
            skipped.append({**one.document(), "why": f"{error.subject}: {error.message}"})
            for path in directory.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            continue
        return {
            **one.document(),
            "bytes": decision.raw_bytes,
            "tags": decision.tags,
            "skipped": skipped,
            "not_committed": [str(s) for s in undecided],
            "broke_out": str(broke_out) if broke_out else None,
            **written,
        }
    if last is not None:
        raise last
    what = f" before {before}" if before else f" {step}" if step else ""
    raise NothingToRestoreError(f"no committed step{what}", subject=catalog.store.url)


async def _write(
    catalog: Catalog, decision: Decision, form: str, directory: Path, progress: Progress
) -> dict[str, list[str]]:
    store, pool = catalog.store, BufferPool(BUDGET_BYTES)

    async def read(rank: int) -> Manifest:
        return (await catalog.manifest(decision, rank)).manifest

    async with held_step(store, decision.id):
        manifests = await in_lanes(read, range(decision.world), _READS_AT_ONCE)
        adopted = is_adopted(manifests)
        if form == "files" and not adopted:
            raise UsageError(
                "is a state, and not files",
                subject=f"step {decision.id}",
                hint="Use --format safetensors, torch or dcp.",
            )
        if adopted and form in ("", "files"):
            await write_adopted(store, manifests[0], directory, pool, progress)
            return {}
        if form in ("", "safetensors"):
            await write_safetensors(store, manifests, directory, pool, progress)
            return {}
        return {
            "buffers": [
                str(await write_hostbuffer(store, one, directory, pool, progress))
                for one in manifests
            ]
        }
