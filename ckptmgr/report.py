"""`ckptmgr report`: one HTML page of a job, without scripts, and without anything to load."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from string import Template
from typing import Any

from ckptmgr.config import MIB
from ckptmgr.goodput import Goodput
from ckptmgr.plots import Dot, Line, Mark, duration, plot, split_bar
from ckptmgr.present import size
from ckptmgr.report_style import PAGE
from ckptmgr.repository.history import History

_PATH = re.compile(r"(?<![\w.])~?(?:/[^\s/:'\"<>]+)+/?")

RESTARTS_SHOWN_MAX = 50
STEPS_SHOWN_MAX = 500
"""Rows of the two tables, newest first; the plots have all of them."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a report is made of. `rows` are those of `ls --json`, newest first."""

    name: str
    rows: Sequence[dict[str, Any]]
    history: History
    goodput: Goodput
    made_at: float


def plain(text: str) -> str:
    """Text without the directories of this host: of each path only its last part is left."""
    return _PATH.sub(lambda found: "…/" + found[0].rstrip("/").rpartition("/")[2], text)


def name_of(url: str) -> str:
    """A job's name for people: the scheme and the last part of the path of its URL."""
    scheme, _, rest = url.partition("?")[0].partition("://")
    return f"{scheme}://…/{rest.rstrip('/').rpartition('/')[2]}"


def page(job: Job) -> str:
    """The whole document."""
    commits = _commits(job)
    return Template(PAGE).substitute(
        title=escape(job.name),
        made=_clock(job.made_at),
        figures=_figures(job, commits),
        time=split_bar(_shares(job.goodput)),
        time_note=_time_note(job.goodput),
        steps=_steps_plot(job),
        stall=_per_commit(commits, "stall", lambda one: float(one.stall_seconds), duration),
        written=_per_commit(commits, "time to the store", _written, duration),
        speed=_per_commit(commits, "throughput", _mib_per_second, lambda rate: f"{rate:.3g}"),
        restarts=_restarts(job.goodput),
        rows=_rows(job.rows),
        more=_more(len(job.rows), STEPS_SHOWN_MAX),
    )


# ---- figures ----------------------------------------------------------------


def _commits(job: Job) -> list[Any]:
    found = [entry.decision for entry in job.history.entries if entry.decision is not None]
    return sorted((one for one in found if one.committed), key=lambda one: one.sealed_at)


def _written(commit: Any) -> float:
    return float(commit.written_at - commit.sealed_at) if commit.written_at else 0.0


def _mib_per_second(commit: Any) -> float:
    seconds = _written(commit)
    return float(commit.raw_bytes / MIB / seconds) if seconds > 0 else 0.0


def _figures(job: Job, commits: Sequence[Any]) -> str:
    goodput, last = job.goodput, commits[-1] if commits else None
    stalls = sorted(one.stall_seconds for one in commits)
    least = "" if goodput.exact else "at least "
    found = [
        ("Training that counts", f"{goodput.ettr:.1%}", f"of {duration(goodput.wall_seconds)}"),
        ("Last commit", str(last.id) if last else "none", _clock(last.sealed_at) if last else ""),
        ("Commits", str(len(commits)), f"{sum(map(_undone, job.rows))} more not committed"),
        ("Restarts", str(len(goodput.restarts)), f"{least}{goodput.lost_steps} steps lost"),
        ("Stall, median", duration(stalls[len(stalls) // 2]) if stalls else "none", "per snapshot"),
        ("State", size(last.raw_bytes) if last else "none", _stored(last)),
    ]
    cards = [
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><p>{escape(note)}</p></div>"
        for name, value, note in found
    ]
    return "\n".join(cards)


def _stored(last: Any) -> str:
    return f"{size(last.stored_bytes)} stored" if last else ""


def _undone(row: dict[str, Any]) -> bool:
    return row["state"] in ("aborted", "undecided")


def _shares(goodput: Goodput) -> list[tuple[str, float, str]]:
    return [
        ("training that counts", goodput.productive_seconds, "ok"),
        ("stalls", goodput.stall_seconds, "warn"),
        ("lost work", goodput.lost_seconds, "danger"),
        ("down", goodput.down_seconds, "quiet"),
    ]


def _time_note(goodput: Goodput) -> str:
    if goodput.exact:
        return "How far training had come before each restart is known exactly."
    return (
        "Before some restarts no host could tell how far training had come. Lost work is at least "
        f"what is shown, and at most {duration(goodput.lost_seconds_max)}."
    )


# ---- plots ------------------------------------------------------------------

_KIND = {
    "committed": "ok",
    "verified": "ok",
    "retired": "quiet",
    "aborted": "danger",
    "undecided": "warn",
}


def _steps_plot(job: Job) -> str:
    """One line per attempt, a dot per step in the colour of its state, a mark per restart."""
    lines, dots = [], []
    by_attempt: dict[int, list[tuple[float, float]]] = {}
    for entry in job.history.entries:
        at = entry.decision.sealed_at if entry.decision is not None else 0.0
        if at:
            kind = _KIND[entry.state.value]
            dots.append(Dot(at, entry.id.step, kind, f"{entry.id} {entry.state.value}"))
            by_attempt.setdefault(entry.id.attempt, []).append((at, entry.id.step))
    for attempt in job.history.attempts:
        points = by_attempt.get(attempt.number, [])
        if attempt.reached is not None:
            reach = attempt.reached
            points = [*points, (reach.first_at, reach.first_step), (reach.last_at, reach.last_step)]
        lines.append(Line(tuple(sorted(points)), f"attempt {attempt.number}"))
    marks = [
        Mark(one.at, f"attempt {one.attempt} resumed from {one.resumed_from}")
        for one in job.goodput.restarts
    ]
    return plot("steps over time", lines, dots, marks, shown=lambda v: f"{v:,.0f}", height=260)


def _per_commit(
    commits: Sequence[Any],
    title: str,
    value_of: Callable[[Any], float],
    shown: Callable[[float], str],
) -> str:
    """A dot per commit that tells the value, joined within an attempt."""
    dots, by_attempt = [], dict[int, list[tuple[float, float]]]()
    for one in commits:
        value = value_of(one)
        if value > 0:
            dots.append(Dot(one.sealed_at, value, "plain", f"{one.id}: {shown(value)}"))
            by_attempt.setdefault(one.attempt, []).append((one.sealed_at, value))
    lines = [Line(tuple(points), f"attempt {number}") for number, points in by_attempt.items()]
    return plot(title, lines, dots, [], shown=shown, height=170)


# ---- tables -----------------------------------------------------------------


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _restarts(goodput: Goodput) -> str:
    if not goodput.restarts:
        return "<p>None so far.</p>"
    head = ("attempt", "at", "resumed from", "had reached", "steps lost", "time lost")
    newest = goodput.restarts[::-1][:RESTARTS_SHOWN_MAX]
    rows = [
        (
            str(one.attempt),
            _clock(one.at),
            str(one.resumed_from) if one.resumed_from.attempt else "scratch",
            str(one.reached),
            f"{'' if one.exact else '≥ '}{one.lost_steps:,}",
            f"{'' if one.exact else '≤ '}{duration(one.lost_seconds_max)}",
        )
        for one in newest
    ]
    return _table(head, rows) + _more(len(goodput.restarts), RESTARTS_SHOWN_MAX)


def _rows(rows: Sequence[dict[str, Any]]) -> str:
    head = ("step", "state", "sealed", "raw", "stored", "ranks", "tags", "why")
    return _table(head, [_row(row) for row in rows[:STEPS_SHOWN_MAX]])


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["id"],
        row["state"] + (" (damaged)" if row["damage"] else ""),
        _clock(row["sealed_at"]) if row["sealed_at"] else "",
        size(row["raw_bytes"]) if row["raw_bytes"] else "",
        size(row["stored_bytes"]) if row["stored_bytes"] else "",
        f"{row['ranks_present']}/{row['world'] or '?'}",
        plain(" ".join(f"{name}={value}" for name, value in row["tags"].items())),
        plain(row["why"]),
    )


def _more(count: int, shown: int) -> str:
    return f"<p>{count - shown:,} older ones are not listed.</p>" if count > shown else ""


def _clock(at: float) -> str:
    return time.strftime("%-d %b %Y %H:%M UTC", time.gmtime(at))
