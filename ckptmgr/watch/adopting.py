"""One whole candidate becomes one committed step; the store itself tells what was adopted."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

from ckptmgr.daemon.job import Job
from ckptmgr.daemon.log import event
from ckptmgr.daemon.pipeline import Pipeline
from ckptmgr.daemon.resume import claim_attempt, parent_of, put_active
from ckptmgr.errors import (
    CkptmgrError,
    NothingToRestoreError,
    StoreError,
    SupersededError,
    UsageError,
)
from ckptmgr.repository import keys
from ckptmgr.repository.budget import in_thread
from ckptmgr.repository.catalog import exists
from ckptmgr.repository.commit import (
    Decision,
    check_format,
    commit_step,
    has_locked_tags,
    put_witness,
)
from ckptmgr.repository.envelope import Envelope
from ckptmgr.repository.hold import host_name
from ckptmgr.restore.adopted import CONTENT, SOURCE, STAT
from ckptmgr.types import StepId, StepState
from ckptmgr.watch.found import Candidate
from ckptmgr.watch.origin import FilesOrigin, Pieces, content_of, snapshot_of
from ckptmgr.watch.settling import Newest, step_for
from ckptmgr.watch.whole import said_of

RUN_ID = "watch"
"""What the claims of this program say of their run."""


@dataclass(slots=True)
class Known:
    """What a store holds of adopted candidates: by name, the digests of files and of bytes."""

    stats: set[tuple[str, str]] = field(default_factory=set)
    contents: set[tuple[str, str]] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    newest: Newest | None = None

    def add(self, decision: Decision) -> None:
        """Take note of a commit.

        Raises:
            UsageError: it is none of an adopted candidate.
        """
        tags = {name: str(value) for name, value in decision.tags.items()}
        if not {SOURCE, STAT, CONTENT} <= tags.keys():
            raise UsageError(
                f"holds step {decision.id}, which watch did not put there",
                subject="--to",
                hint="Give each watched directory a place of its own.",
            )
        self.names.add(tags[SOURCE])
        self.stats.add((tags[SOURCE], tags[STAT]))
        self.contents.add((tags[SOURCE], tags[CONTENT]))
        if self.newest is None or decision.id > self.newest.id:
            self.newest = Newest(decision.id, decision.sealed_at)


class Adopter:
    """Brings candidates of one directory into the store of one job.

    It claims an attempt with its first candidate, and another one where a step would not be greater
    than the last: a training run went back; or where a step failed after its manifest was put.
    """

    def __init__(self, root: Path, job: Job, pipeline: Pipeline, codec: str) -> None:
        self._root, self._job, self._pipeline, self._codec = root, job, pipeline, codec
        self._keyring = job.catalog.keyring
        self._attempt, self._nonce = 0, ""
        self._in_doubt = False
        self.known = Known()

    async def learn(self) -> None:
        """Read what the store holds.

        A retired step whose key was taken away tells nothing any more, and need not: what is
        older than the newest step is not adopted.

        Raises:
            UsageError: it holds the steps of something else.
            LockedError: it holds a step that stands, and whose key is not given.
            StoreError: it can not be read.
        """
        known = Known()
        with contextlib.suppress(NothingToRestoreError):
            if await check_format(self._job.store, create=False):
                for entry in await self._job.catalog.entries():
                    found = entry.decision
                    if found is None or not found.committed:
                        continue
                    if has_locked_tags(found, self._keyring) and entry.state is StepState.RETIRED:
                        continue
                    if isinstance(found.sealed_tags, Envelope):
                        self._keyring.key_of(found.sealed_tags, subject=f"step {found.id}")
                    known.add(found)
        self.known, self._in_doubt = known, False

    async def is_known(self, candidate: Candidate) -> bool:
        """Whether a candidate was adopted: it has the times it had then, or the bytes.

        Raises:
            TornSnapshotError: it changes.
            StoreError: what became of the last one can not be read.
        """
        if self._in_doubt:
            await self.learn()
        if (candidate.name, candidate.digest) in self.known.stats:
            return True
        if candidate.name not in self.known.names:
            return False
        content = await in_thread(content_of, self._root, candidate)
        if (candidate.name, content) not in self.known.contents:
            return False
        self.known.stats.add((candidate.name, candidate.digest))
        return True

    async def adopt(self, candidate: Candidate) -> StepId | None:
        """Commit a candidate that is whole; None where it is older than what was adopted already.

        Raises:
            TornSnapshotError: it changed meanwhile; nothing of it is left.
            OSError: a file of it can not be read; nothing of it is left.
            SupersededError: another process watches for the same store.
            StoreError: the store failed.
        """
        step = step_for(candidate, self.known.newest, self._attempt)
        if step is None:
            return None
        if not step.attempt:
            self._attempt, self._nonce = await claim_attempt(self._job.store, 1, RUN_ID)
            await self._job.settle_exclusion()
            step = StepId(self._attempt, step.step)
        event("watch_adopting", source=candidate.name, step=str(step), bytes=candidate.nbytes)
        try:
            decision = await self._commit(candidate, step)
        except (CkptmgrError, OSError) as error:
            # The store may have the COMMIT, and only its answer was lost.
            self._in_doubt = isinstance(error, StoreError)
            attempt, self._attempt = self._attempt, 0
            with contextlib.suppress(StoreError):  # else collection deletes it
                if await self._discarded(step):
                    self._attempt = attempt
            raise
        self.known.add(decision)
        self._job.committed(decision)
        event("watch_adopted", source=candidate.name, step=str(step))
        return step

    async def _commit(self, candidate: Candidate, step: StepId) -> Decision:
        store = self._job.store
        newest = await put_active(store, step.attempt, self._nonce, self._job.active)
        if newest > step.attempt:
            raise _superseded(newest, store.url)
        said = await in_thread(said_of, self._root, candidate)
        snapshot = snapshot_of(candidate, step, self._nonce)
        pieces = await in_thread(Pieces, self._root, candidate)
        origin = FilesOrigin(pieces, snapshot, store, host_name(), said, self._keyring)
        sealed = await self._pipeline.write(origin, self._codec, lambda _raw, _stored: None)
        parent = await parent_of(self._job.catalog, step)
        decision = await commit_step(store, [sealed], parent, self._keyring)
        if not decision.committed:  # only a newer attempt takes an older one's step for garbage
            raise _superseded(step.attempt + 1, store.url)
        with contextlib.suppress(StoreError):  # the step is committed without its copy
            await put_witness(store, decision)
        return decision

    async def _discarded(self, step: StepId) -> bool:
        """Delete packs that no manifest names: of this process alone, for it has the nonce. Whether
        the step may be tried again: its manifest is for these bytes alone, and the files may have
        others by then.
        """
        store = self._job.store
        if await exists(store, keys.manifest(step, 0)):
            return False
        for key in await store.list(keys.packs(step)):
            await store.delete(key)
        return True


def _superseded(newest: int, url: str) -> SupersededError:
    return SupersededError(f"attempt {newest} is active: another process watches", subject=url)
