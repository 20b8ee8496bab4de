"""From the lines of a run to the figures of its table: medians, and ratios within each round."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

Line = dict[str, Any]
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Row:
    """The figures of one library; `failure` says why there are none."""

    peer: str
    version: str = ""
    failure: str = ""
    figures: dict[str, float] | None = None

    def __getitem__(self, name: str) -> float | None:
        return None if self.figures is None else self.figures.get(name)


def limits_of(lines: list[Line]) -> dict[str, float]:
    """Medians of the bare copy, write and read."""
    rounds = [line for line in lines if line["kind"] == "limits"]
    names = ("copy_s", "write_s", "read_s")
    return {name: median(line[name] for line in rounds) for name in names}


def rows_of(lines: list[Line]) -> list[Row]:
    """One row for each library, in the order of its first visit. One failure is a failure."""
    limits = {line["round"]: line for line in lines if line["kind"] == "limits"}
    run = next(line for line in lines if line["kind"] == "run")
    state_bytes = run["mib"] * run["ranks"] * (1 << 20)
    visits: dict[str, list[Line]] = {}
    for line in lines:
        if line["kind"] == "visit":
            visits.setdefault(line["peer"], []).append(line)
    rows = []
    for peer, found in visits.items():
        failure = next((line["failure"] for line in found if "failure" in line), "")
        if failure:
            rows.append(Row(peer, failure=failure))
            continue
        each = [figures(line, limits[line["round"]], state_bytes) for line in found]
        names = {name for one in each for name in one}
        medians = {name: median(one[name] for one in each) for name in names}
        lost = [one["lost_s"] for line in found for one in line["save"]["snapshots"][1:]]
        medians |= {"lost_least_s": min(lost), "lost_most_s": max(lost)}
        rows.append(Row(peer, found[0]["save"]["version"], "", medians))
    return rows


def figures(visit: Line, limits: Line, state_bytes: int) -> dict[str, float]:
    """Medians of one visit and their ratios to the limits of its round. The first snapshot is a
    figure of its own, and in none of the others.
    """
    saved = visit["save"]
    first, *steady = saved["snapshots"]
    found = {
        name: median(one[name] for one in steady)
        for name in ("stall_s", "lost_s", "durable_s", "stored_bytes")
    }
    found["cpu_s"] = median(one["cpu_s"] - one["steps_cpu_s"] for one in steady)
    found["synced_s"] = median(one["durable_s"] - one["complete_s"] for one in steady)
    found["first_stall_s"] = first["stall_s"]
    found["extra_bytes"] = saved["extra_bytes"]
    found["opened_s"] = visit["cold"]["opened_s"]
    for name in ("cold", "warm", "memory"):
        if name in visit:
            found[f"{name}_s"] = visit[name]["opened_s"] + visit[name]["restore_s"]
    ratios = {
        "first_stall": ("first_stall_s", "copy_s"),
        "stall": ("stall_s", "copy_s"),
        "lost": ("lost_s", "copy_s"),
        "durable": ("durable_s", "write_s"),
        "cold": ("cold_s", "read_s"),
        "warm": ("warm_s", "copy_s"),
        "memory": ("memory_s", "copy_s"),
    }
    for name, (own, bare) in ratios.items():
        if own in found:
            found[name] = found[own] / limits[bare]
    found["stored"] = found["stored_bytes"] / state_bytes
    found["extra"] = found["extra_bytes"] / state_bytes
    found["cpu_s_per_gib"] = found["cpu_s"] / (state_bytes / GIB)
    return found
