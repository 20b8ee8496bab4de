"""Curves of a run of `bench.beside.scaling` as PNG and SVG, by an environment with matplotlib:
`python -m bench.beside.curves POINTS.jsonl DIRECTORY`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bench.beside.draw import pyplot, save

MODE = "ckptmgr, overlapped"
OURS = (
    ("stall_s", "stall", "#94a3b8"),
    ("lost_s", "training time lost", "#7c3aed"),
    ("durable_s", "durable", "#2563eb"),
    ("memory_s", "restore out of memory", "#059669"),
    ("cold_s", "restore, cold", "#d97706"),
)
BARE = (
    ("copy_s", "bare copy", ":"),
    ("write_s", "bare write", "--"),
    ("read_s", "bare read", "-."),
)
AXES = (("bytes", "mib", "MiB in 50 tensors"), ("tensors", "tensors", "tensors of 256 MiB"))


def main() -> None:
    """Draw both series side by side, on logarithmic axes."""
    plt = pyplot()
    points = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    figure, axes = plt.subplots(1, len(AXES), sharey=True, figsize=(13, 5))
    for axis, (series, name, label) in zip(axes, AXES, strict=True):
        found = [one for one in points if one["series"] == series and one["peer"] == MODE]
        xs = [one[name] for one in found]
        for key, title, colour in OURS:
            axis.plot(xs, [one[key] for one in found], "o-", color=colour, label=title)
        for key, title, style in BARE:
            axis.plot(xs, [one[key] for one in found], style, color="#dc2626", label=title)
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="s")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    save(figure, Path(sys.argv[2]), "scaling")


if __name__ == "__main__":
    main()
