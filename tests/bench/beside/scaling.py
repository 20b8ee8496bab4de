"""How our cost grows with bytes and with tensors, over three orders of magnitude, in one run:
`PYTHONPATH=tests python -m bench.beside.scaling`. The method is that of the other libraries' table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.beside.conductor import TESTS, Plan, conduct
from bench.beside.figures import limits_of, rows_of
from bench.beside.roster import BY_NAME

MIB = 1 << 20
SIZES = (4, 16, 64, 256, 1024, 4096)
COUNTS = (50, 500, 5_000, 50_000)
SLOTS = 2
COLUMNS = ("stall_s", "lost_s", "durable_s", "memory_s", "cold_s", "cpu_s")
HEADS = ("stall, s", "lost, s", "durable, s", "out of memory, s", "cold, s", "CPU s per snapshot")


def parse() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(prog="bench.beside.scaling", description=__doc__)
    parser.add_argument("--mib", type=int, nargs="+", default=SIZES, help="sizes, in 50 tensors")
    parser.add_argument("--tensors", type=int, nargs="+", default=COUNTS, help="in 256 MiB")
    parser.add_argument("--repeat", type=int, default=1, help="rounds")
    parser.add_argument("--directory", type=Path, help="on the disk that is to be measured")
    parser.add_argument("--environment", type=Path, help="what `make bench` has installed")
    parser.add_argument("--json", type=Path, metavar="OUT", help="keep what was found, as lines")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw scaling.png and .svg")
    return parser.parse_args()


def plans(args: argparse.Namespace, directory: Path) -> list[tuple[str, Plan]]:
    """What grows, and how each point is measured."""
    base = Plan(
        entries=(BY_NAME["ckptmgr"], BY_NAME["ckptmgr, overlapped"]),
        directory=directory,
        mib=256,
        tensors=50,
        dtype="float32",
        ranks=1,
        repeat=args.repeat,
        snapshots=4,
        step_seconds=0.1,
        timeout_seconds=600.0,
        others=None,
        missing={},
    )
    found = [("bytes", replace(base, mib=mib)) for mib in args.mib]
    return found + [("tensors", replace(base, tensors=count)) for count in args.tensors]


def points_of(series: str, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One point of each of our two modes: its figures, and the memory beyond the slots."""
    run, limits = lines[0], limits_of(lines)
    about = {"series": series, "mib": run["mib"], "tensors": run["tensors"], **limits}
    found = []
    for row in rows_of(lines):
        if row.figures is None:
            sys.exit(f"{row.peer}: {row.failure}")
        beyond = row.figures["extra_bytes"] / MIB - SLOTS * run["mib"]
        found.append({**about, "peer": row.peer, "beyond_mib": beyond, **row.figures})
    return found


def show(point: dict[str, Any]) -> None:
    """One row."""
    cells = [point["peer"], f"{point['mib']:,}", f"{point['tensors']:,}"]
    cells += [f"{point[name]:.3f}" for name in ("copy_s", "write_s", "read_s", *COLUMNS)]
    print(f"| {' | '.join([*cells, format(point['beyond_mib'], '.0f')])} |", flush=True)


def main() -> None:
    """Measure, print, draw."""
    args = parse()
    heads = ["", "MiB", "tensors", "bare copy, s", "bare write, s", "bare read, s", *HEADS]
    heads.append("memory beyond the slots, MiB")
    print(f"| {' | '.join(heads)} |")
    print("|---" * len(heads) + "|")
    with tempfile.TemporaryDirectory(prefix="bench-scaling-", dir=args.directory) as name:
        kept = args.json or Path(name) / "points.jsonl"
        with kept.open("w") as out:
            for series, plan in plans(args, Path(name)):
                for point in points_of(series, list(conduct(plan, lambda _: None))):
                    show(point)
                    out.write(json.dumps(point) + "\n")
                    out.flush()
        if args.plots:
            python = str((args.environment or Path()).absolute() / "bin" / "python")
            command = [python, "-m", "bench.beside.curves", str(kept.absolute()), str(args.plots)]
            subprocess.run(command, env={"PYTHONPATH": str(TESTS)}, check=True)


if __name__ == "__main__":
    main()
