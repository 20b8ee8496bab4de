"""The way back of all ranks together: one step, put back everywhere or nowhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from ckptmgr.config import RESTORE_SECONDS_MAX
from ckptmgr.errors import CkptmgrError, DamageError, NothingToRestoreError, StateMismatchError
from ckptmgr.rank.arguments import parse_step
from ckptmgr.rank.group import AGREE_SECONDS_MAX, Ranks, together
from ckptmgr.rank.handle import RestoredStep
from ckptmgr.rank.link import Link
from ckptmgr.rank.taking import Taken, taken
from ckptmgr.rank.wants import shown
from ckptmgr.staging.control import Restore, Restored
from ckptmgr.telling import tell
from ckptmgr.types import StepId


@dataclass(slots=True)
class Live:
    """The live state, as far as restores know: `whole` is whether it is that of one step, and not
    what one has left that was cut short amid putting back another.
    """

    whole: bool = True


class Resuming:
    """The restores of one block. `release` lets the daemon have back what it lent."""

    def __init__(
        self,
        link: Link,
        ranks: Ranks,
        state: MutableMapping[str, Any],
        live: Live,
        release: Callable[[], None],
        *,
        rng: bool,
        url: str,
    ) -> None:
        self._link, self._ranks, self._state, self._live = link, ranks, state, live
        self._release = release
        self._rng = rng
        self._url = url
        self._decisions = 0

    def restore(
        self, step: int | str | None, *, required: bool, before: str = ""
    ) -> RestoredStep | None:
        """The newest step that every rank can use, or `step`; None where the job has none.

        With `before`, of the steps before that expression over tags first held.

        All ranks call it. Nothing is changed on any rank, but for what is undone again, before all
        know that all can use the step and no object refuses it; it returns only when all have it.
        """
        attempt, number = together(
            self._ranks, "restore", AGREE_SECONDS_MAX, lambda: parse_step(step)
        )
        first, skipped = self._decisions, dict[str, str]()
        found = None
        while found is None:
            request = Restore(
                step=number, of_attempt=attempt, k=self._decisions, first_k=first, before=before
            )
            found = self._decided(request, skipped)
        if found.attempt:
            _tell_skipped(f"fell back to step {found.step}", found)
            return found
        _tell_skipped("nothing to restore", found)
        if required:
            raise NothingToRestoreError("the job has no committed step", subject=self._url)
        return None

    def _decided(self, request: Restore, skipped: dict[str, str]) -> RestoredStep | None:
        """One decision, obeyed; None where its step proved unusable on some rank."""
        daemon = self._link.rejoined
        reply = together(
            self._ranks,
            "decided",
            RESTORE_SECONDS_MAX,
            lambda: self._link.ask(request, Restored, RESTORE_SECONDS_MAX),
        )
        self._decisions += 1
        with contextlib.ExitStack() as lent:
            lent.callback(self._release)
            if not reply.attempt:
                return RestoredStep(0, 0, "", reply.skipped)
            skipped.update(reply.skipped)
            try:
                part = together(
                    self._ranks,
                    "fetched",
                    RESTORE_SECONDS_MAX,
                    lambda: self._checked(lent, request, reply, daemon),
                )
            except DamageError as error:
                one = str(StepId(reply.attempt, reply.step))
                skipped[one] = str(error).partition("\n")[0]
                return None
            self._refuse_untaken(part)
            self._put_back(part)
            for note in part.placing.notes:
                tell(note, stacklevel=5)
            reasons = tuple(skipped.items())
            return RestoredStep(reply.step, reply.attempt, part.source, reasons)

    def _put_back(self, part: Taken) -> None:
        """Change the live state. Objects with code of their own may refuse theirs, and Ctrl-C may
        come: as long as that is undone, no byte is written on any rank.
        """
        was_whole, self._live.whole = self._live.whole, False
        try:
            together(self._ranks, "loaded", AGREE_SECONDS_MAX, part.placing.load)
        except BaseException:
            part.placing.undo()
            self._live.whole = was_whole
            raise
        # Another rank may still be reading what this one will write next.
        together(self._ranks, "applied", AGREE_SECONDS_MAX, part.write)
        self._live.whole = True

    def _checked(
        self, lent: contextlib.ExitStack, request: Restore, reply: Restored, daemon: int
    ) -> Taken:
        """What was decided, fetched. A daemon that takes the place of one that died meanwhile knows
        of no decision: it is asked again, obeys what the register says, and everything is fetched
        anew.
        """
        while True:
            try:
                return lent.enter_context(self._taken(reply))
            except (DamageError, StateMismatchError):
                raise
            except CkptmgrError:
                # Asked first: the death of the daemon may not have been noticed yet.
                reply = self._link.ask(request, Restored, RESTORE_SECONDS_MAX)
                if self._link.rejoined == daemon:
                    raise
                daemon = self._link.rejoined

    def _taken(self, reply: Restored) -> contextlib.AbstractContextManager[Taken]:
        return taken(
            self._link.ask,
            reply,
            self._state,
            self._link.buffer,
            rank=self._ranks.rank,
            rng=self._rng,
            alone=self._ranks.world == 1,
        )

    def _refuse_untaken(self, part: Taken) -> None:
        """Stages of a pipeline take only some of what was saved; together they must take it all."""
        surplus = part.placing.surplus
        untaken = self._ranks.common("untaken", surplus, AGREE_SECONDS_MAX)
        if untaken:
            lines = [f"{path}: was saved, but is not in the live state" for path in untaken]
            raise StateMismatchError(shown(lines))


def _tell_skipped(result: str, found: RestoredStep) -> None:
    if found.skipped:
        reasons = "; ".join(f"{one}: {why}" for one, why in found.skipped)
        tell(f"{result}; skipped {reasons}", stacklevel=4)
