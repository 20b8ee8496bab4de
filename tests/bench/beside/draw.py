"""Bars of a run as PNG and SVG, by the environment that the other libraries are in:
`python -m bench.beside.draw RUN.jsonl DIRECTORY`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench.beside.figures import Row, limits_of, rows_of

PANELS = (
    ("training time lost per snapshot", "lost_s", "copy_s", "bare copy"),
    ("time until durable", "durable_s", "write_s", "bare write + fsync"),
    ("restore, cold", "cold_s", "read_s", "bare cold read"),
)
OURS, THEIRS, BARE = "#2563eb", "#94a3b8", "#dc2626"


def colour(row: Row) -> str:
    """Ours stands out."""
    return OURS if row.peer.startswith("ckptmgr") else THEIRS


def pyplot() -> Any:
    """matplotlib, without a screen; the same figures give the same file."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "ckptmgr"
    from matplotlib import pyplot as plt

    return plt


def save(figure: Any, directory: Path, name: str) -> None:
    """As PNG and SVG."""
    figure.tight_layout()
    for kind, about in (("png", {}), ("svg", {"Date": None})):
        figure.savefig(directory / f"{name}.{kind}", dpi=110, metadata=about)


def main() -> None:
    """Draw all panels side by side."""
    plt = pyplot()
    lines = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    rows = [row for row in rows_of(lines) if not row.failure][::-1]
    bare = limits_of(lines)
    size = (14, 1.2 + 0.36 * len(rows))
    figure, axes = plt.subplots(1, len(PANELS), sharey=True, figsize=size)
    for axis, (title, name, limit, what) in zip(axes, PANELS, strict=True):
        values = [row[name] for row in rows]
        axis.barh([row.peer for row in rows], values, color=[colour(row) for row in rows])
        axis.axvline(bare[limit], color=BARE, linewidth=1, label=what)
        axis.set(title=title, xlabel="s")
        axis.legend(fontsize="small")
    save(figure, Path(sys.argv[2]), "peers")


if __name__ == "__main__":
    main()
