"""The commit protocol as processes: ranks with their daemons, committers, collectors, readers.

Variables: claim/a, learned/i, have/a/r, resume/a/k, verdict/i/k/r, active/a, data/c/r/i, man/c/r,
commit/c, retired/c, verified/c, hold/c/x and memory/r; `applied` and `acked` are what users saw.
An incarnation i is its nonce. c is a StepId (attempt, step).
"""

from __future__ import annotations

from typing import Any

from ckptmgr.repository.commit import FROM_SCRATCH
from ckptmgr.types import StepId
from model.explore import Local, Move, ViolatedError, World
from model.protocol_puts import PUTTING, STOPPED, Records
from model.protocol_rules import ABORT, RANKS, Rules, Setup, commit_value, committed

FALLBACKS = 2
"""Resume decisions of one attempt."""


def standing(w: World, setup: Setup) -> list[StepId]:
    """Commits that are not retired, oldest first."""
    return [c for c in setup.ids() if committed(w["commit", c]) and not w["retired", c]]


def deleted(w: World, step: StepId, keys: list[Any]) -> dict[Any, Any]:
    """The change that deletes objects of a step, which must have been given up for ever before."""
    register, mark = w["commit", step], w["retired", step]
    aborted = register == ABORT and not w["soft", ("commit", step)]
    retired = mark is not None and not w["soft", ("retired", step)]
    if not aborted and not retired:
        raise ViolatedError(f"I8 data of {step} is deleted before it was given up")
    return dict.fromkeys(keys)


class Process:
    """What a rank and a committer are: a method for each state, and records that are put."""

    def __init__(self, setup: Setup, decide: Rules, incarnation: int, rank: int) -> None:
        self._setup = setup
        self._rules = decide
        self._records = Records(setup, decide)
        self._i = incarnation
        self._r = rank

    def step(self, local: Any, w: World) -> list[Move]:
        if local is STOPPED:
            return []
        if local[0] in PUTTING:
            return self._records.step(local, w)
        act: Any = getattr(self, f"_{local[0]}")
        return act(w, *local[1:]) or []


class Rank(Process):
    """One rank of an incarnation, with its part of a daemon: claim, resume, packs, manifest."""

    # -- which attempt ------------------------------------------------------------------------

    def _start(self, w: World) -> list[Move] | None:
        if self._r:
            attempt = w["learned", self._i]
            return attempt and [(f"learn attempt {attempt}", ("join", attempt), {})]
        taken = [a for a in self._setup.attempts if w["claim", a] is not None]
        attempt = self._rules.next_attempt(taken)
        if attempt not in self._setup.attempts:
            return None
        return [(f"{attempt} is free", ("claim", attempt), {})]

    def _claim(self, w: World, attempt: int) -> list[Move]:
        if "claim exclusive" in self._rules.without:
            return [("claim", ("tell", attempt), {("claim", attempt): self._i})]
        won, lost = ("tell", attempt), ("start",)
        return [self._records.put_new(w, "claim", ("claim", attempt), self._i, won, lost)]

    def _tell(self, _w: World, attempt: int) -> list[Move]:
        return [("tell the other ranks", ("join", attempt), {("learned", self._i): attempt})]

    def _join(self, w: World, attempt: int) -> list[Move]:
        if not self._setup.memory:
            return [("join", ("choose", attempt, 0), {})]
        have = ("have", attempt, self._r)
        held = w["memory", self._r] or ()
        then = ("choose", attempt, 0)
        return [self._records.put_new(w, f"have {held}", have, held, then, then)]

    # -- from which step ----------------------------------------------------------------------

    def _choose(self, w: World, attempt: int, k: int) -> list[Move]:
        ids = self._setup.ids()
        commits = standing(w, self._setup)
        given_up = [c for c in ids if w["commit", c] == ABORT or w["retired", c]]
        rejected = [w["resume", attempt, n] for n in range(k)]
        complete = self._complete(w, attempt) if self._setup.memory else frozenset()
        order = self._rules.resume_order(commits, complete, given_up, rejected)
        choice = order[0] if order else FROM_SCRATCH
        self._check_choice(w, attempt, choice, rejected)
        then: Local = ("resume", attempt, k, choice)
        if choice in commits and "resume durable" not in self._rules.without:
            then = self._records.settled(("commit", choice), then)
        return [(f"choose {choice}", then, {})]

    def _check_choice(self, w: World, attempt: int, choice: StepId, rejected: list[StepId]) -> None:
        commits = standing(w, self._setup)
        newest = max((c for c in commits if c not in rejected), default=FROM_SCRATCH)
        if choice < newest:
            raise ViolatedError(f"I5 attempt {attempt} resumes from {choice}, and {newest} stands")
        if choice in rejected and choice != FROM_SCRATCH:
            raise ViolatedError(f"I5 attempt {attempt} goes back to {choice}, which it rejected")
        if choice in commits or choice == FROM_SCRATCH:
            return
        if w["commit", choice] == ABORT or w["retired", choice]:
            raise ViolatedError(f"I5 attempt {attempt} resumes from {choice}, which was given up")
        for r in range(RANKS):
            if w["man", choice, r] is None and choice not in (w["have", attempt, r] or ()):
                raise ViolatedError(
                    f"I6 attempt {attempt} resumes from {choice}: rank {r} lacks it"
                )

    def _complete(self, w: World, attempt: int) -> frozenset[StepId]:
        held = {}
        claims = {a: w["claim", a] for a in self._setup.attempts if w["claim", a] is not None}
        for c in self._setup.ids():
            in_store = {r for r in range(RANKS) if w["man", c, r] == claims.get(c.attempt, 0)}
            in_memory = {r for r in range(RANKS) if c in (w["have", attempt, r] or ())}
            held[c] = in_store | in_memory
        return self._rules.complete_steps(held, dict.fromkeys(claims, RANKS))

    def _resume(self, w: World, attempt: int, k: int, choice: StepId) -> list[Move]:
        label = f"resume {k} from {choice}"
        if "resume register" in self._rules.without:
            return [(label, self._after_decision(attempt, k, choice), {})]
        return [
            self._records.decide_once(
                w,
                label,
                ("resume", attempt, k),
                choice,
                ("resume", attempt, k, choice),
                lambda found: self._after_decision(attempt, k, found),
            )
        ]

    def _after_decision(self, attempt: int, k: int, step: StepId) -> Local:
        judged = self._setup.memory or self._setup.damages
        return ("judge" if judged else "apply", attempt, k, step)

    def _judge(self, w: World, attempt: int, k: int, step: StepId) -> list[Move]:
        nonce = w["claim", step.attempt] if step != FROM_SCRATCH else None
        whole = (
            step == FROM_SCRATCH
            or step in (w["memory", self._r] or ())
            or (w["man", step, self._r] == nonce and w["data", step, self._r, nonce] is True)
        )
        verdict = {("verdict", self._i, k, self._r): "ok" if whole else "damaged"}
        alone = "agreement" in self._rules.without and whole
        then = "apply" if alone else "agree"
        return [(f"{step} is {'whole' if whole else 'damaged'}", (then, attempt, k, step), verdict)]

    def _agree(self, w: World, attempt: int, k: int, step: StepId) -> list[Move] | None:
        verdicts = [w["verdict", self._i, k, r] for r in range(RANKS)]
        if "damaged" in verdicts:
            then = ("choose", attempt, k + 1) if k + 1 < FALLBACKS else STOPPED
            return [("step down", then, {})]
        if None in verdicts:
            return None
        return [("all are whole", ("apply", attempt, k, step), {})]

    def _apply(self, _w: World, attempt: int, _k: int, step: StepId) -> list[Move]:
        applied = {("applied", self._i, self._r): step}
        return [(f"apply {step}", ("save", attempt, step, 0), applied)]

    # -- snapshots ----------------------------------------------------------------------------

    def _save(self, w: World, attempt: int, base: StepId, n: int) -> list[Move] | None:
        if n >= self._setup.steps:
            return None
        step = StepId(attempt, base.step + n + 1)
        then = ("first", attempt, base, n)
        changes = {}
        if self._setup.memory:
            changes = {("memory", self._r): ((w["memory", self._r] or ()) + (step,))[-1:]}
        if self._setup.active:
            newest = max((a for a in self._setup.attempts if w["active", a]), default=0)
            if newest > attempt:
                return [(f"{newest} is active", STOPPED, {})]
            put = ("active", attempt)
            if w[put] is None:
                return [self._records.put_new(w, "active", put, True, ("save", *then[1:]), then)]
        return [(f"seal {step}", then, changes)]

    def _first(self, w: World, attempt: int, base: StepId, n: int) -> list[Move]:
        step = StepId(attempt, base.step + n + 1)
        then = ("second", attempt, base, n)
        if "packs first" in self._rules.without:
            return [self._put_manifest(w, step, then)]
        return [self._put_packs(w, step, then)]

    def _second(self, w: World, attempt: int, base: StepId, n: int) -> list[Move]:
        step = StepId(attempt, base.step + n + 1)
        then = ("save", attempt, base, n + 1)
        if "packs first" in self._rules.without:
            return [self._put_packs(w, step, then)]
        return [self._put_manifest(w, step, then)]

    def _put_packs(self, w: World, step: StepId, then: Local) -> Move:
        return self._records.put(w, f"packs {step}", ("data", step, self._r, self._i), True, then)

    def _put_manifest(self, w: World, step: StepId, then: Local) -> Move:
        key, label = ("man", step, self._r), f"manifest {step}"
        if "manifest exclusive" in self._rules.without:
            return self._records.put(w, label, key, self._i, then)
        return self._records.put_new(w, label, key, self._i, then, STOPPED)


class Committer(Process):
    """A daemon that commits the steps of its incarnation, or gives them up."""

    def _start(self, w: World) -> list[Move] | None:
        base = w["applied", self._i, self._r % RANKS]
        if base is None:
            return None
        return [("begin", ("look", StepId(w["learned", self._i], base.step + 1), 0), {})]

    def _look(self, w: World, step: StepId, n: int) -> list[Move] | None:
        if n >= self._setup.steps:
            return None
        if self._setup.timely and not self._rules.goes_first(step.step, RANKS, {self._r}):
            return [("leave it to another", self._next(step, n), {})]
        moves: list[Move] = []
        manifests = {r: w["man", step, r] for r in range(RANKS)}
        found = {r: str(nonce) for r, nonce in manifests.items() if nonce is not None}
        if not self._rules.missing_ranks(RANKS, str(self._i), found):
            value = commit_value(self._rules, step, tuple(manifests.values()))
            if value is None:
                return [("manifests of others: stop", STOPPED, {})]
            then: Local = ("commit", step, n, value)
            for r in range(RANKS):
                if "manifests durable" not in self._rules.without:
                    then = self._records.settled(("man", step, r), then)
            moves.append((f"{step} is complete", then, {}))
        if self._setup.aborts:
            moves.append((f"{step} is stuck", ("abort", step, n), {}))
        return moves

    def _next(self, step: StepId, n: int) -> Local:
        return ("look", StepId(step.attempt, step.step + 1), n + 1)

    def _commit(self, w: World, step: StepId, n: int, value: Any) -> list[Move]:
        key = ("commit", step)
        if "register exclusive" in self._rules.without:
            return [self._records.put(w, f"commit {step}", key, value, ("ack", step, n, value))]
        again = ("commit", step, n, value)
        return [
            self._records.decide_once(
                w, f"commit {step}", key, value, again, lambda found: ("ack", step, n, found)
            )
        ]

    def _ack(self, _w: World, step: StepId, n: int, found: Any) -> list[Move]:
        changes = {("acked", step): True} if found != ABORT else {}
        return [(f"say {found}", self._next(step, n), changes)]

    def _abort(self, w: World, step: StepId, n: int) -> list[Move]:
        def then(found: Any) -> Local:
            gone = found == ABORT or "abort wins" in self._rules.without
            return ("clear", step, n) if gone else ("ack", step, n, found)

        key, again = ("commit", step), ("abort", step, n)
        return [self._records.decide_once(w, f"give {step} up", key, ABORT, again, then)]

    def _clear(self, w: World, step: StepId, n: int) -> list[Move]:
        mine = [("data", step, r, self._i) for r in range(RANKS)]
        there = [key for key in mine if w[key] is not None]
        if not there:
            return [("all is deleted", self._next(step, n), {})]
        changes = deleted(w, step, there[:1])
        return [(f"delete {there[0]}", ("clear", step, n), changes)]
