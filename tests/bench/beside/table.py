"""The figures of a run as Markdown."""

from __future__ import annotations

from bench.beside.figures import Line, Row, limits_of, rows_of
from bench.beside.roster import BY_NAME

Column = tuple[str, str, str]
"""Heading, figure in seconds or "", figure that stands alone or in brackets."""

SAVING: tuple[Column, ...] = (
    ("stall, s (x copy)", "stall_s", "stall"),
    ("first stall", "first_stall_s", "first_stall"),
    ("lost, s (x copy)", "lost_s", "lost"),
    ("least lost, s", "lost_least_s", ""),
    ("most lost, s", "lost_most_s", ""),
    ("durable, s (x write)", "durable_s", "durable"),
    ("of it synced for it, s", "synced_s", ""),
)
RESTORING: tuple[Column, ...] = (
    ("cold, s (x read)", "cold_s", "cold"),
    ("of it opening, s", "opened_s", ""),
    ("warm, s (x copy)", "warm_s", "warm"),
    ("out of memory, s (x copy)", "memory_s", "memory"),
    ("stored / state", "", "stored"),
    ("memory / state", "", "extra"),
    ("CPU s / GiB", "", "cpu_s_per_gib"),
)


def table(lines: list[Line]) -> str:
    """What was run, the two tables, and what must be said of rows."""
    rows = rows_of(lines)
    parts = [
        about(lines),
        "A snapshot:",
        grid(rows, SAVING),
        "A restore by a new process, and what it all takes:",
        grid(rows, RESTORING),
        remarks(rows),
    ]
    return "\n\n".join(parts) + "\n"


def about(lines: list[Line]) -> str:
    """Size, machine and limits of the run."""
    run = next(line for line in lines if line["kind"] == "run")
    loads = " to ".join(f"{line['load']:.1f}" for line in lines if line["kind"] in {"run", "end"})
    bare = limits_of(lines)
    rounds = 1 + max(line["round"] for line in lines if line["kind"] == "visit")
    return (
        f"{run['mib']} MiB of {run['dtype']} in {run['tensors']} tensors, {run['ranks']} rank(s), "
        f"{rounds} round(s) of {run['snapshots']} snapshots, steps of "
        f"{run['step_seconds'] * 1000:.0f} ms; {run['cores']} cores, {run['memory_gib']} GiB, "
        f"Linux {run['kernel']}, Python {run['python']}, {run['when']}, load {loads}. "
        f"Bare copy {bare['copy_s']:.3f} s, bare write {bare['write_s']:.3f} s, "
        f"bare cold read {bare['read_s']:.3f} s."
    )


def grid(rows: list[Row], columns: tuple[Column, ...]) -> str:
    """One line for each library; one that could not run says why instead."""
    found = [
        "| | " + " | ".join(heading for heading, _, _ in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for row in rows:
        if row.failure:
            reason = row.failure.replace("|", "/")
            cells = [f"could not run: {reason}", *[""] * (len(columns) - 1)]
        else:
            cells = [cell(row[seconds], row[alone]) for _, seconds, alone in columns]
        found.append(f"| {row.peer} | " + " | ".join(cells) + " |")
    return "\n".join(found)


def cell(seconds: float | None, other: float | None) -> str:
    """Seconds with a ratio in brackets, or what there is of them."""
    if seconds is None:
        return "" if other is None else f"{other:.2f}"
    ratio = "" if other is None else f" ({other:.3g})"
    return f"{seconds:.3f}{ratio}"


def remarks(rows: list[Row]) -> str:
    """Versions, and how rows were run where that is not plain."""
    found = []
    for row in rows:
        entry = BY_NAME.get(row.peer)
        told = [f"{entry.distribution} {row.version}" if entry and row.version else ""]
        told.append(entry.remark if entry else "")
        text = "; ".join(filter(None, told))
        if text:
            found.append(f"- {row.peer}: {text}.")
    return "\n".join(found)
