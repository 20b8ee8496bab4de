"""Checkpoint libraries side by side, in one run: `PYTHONPATH=tests python -m bench.beside`.

Same state, same directory, same steps of training, and the same meaning of durable. Rounds take
turns, so that whatever else the machine does meets all of them. docs/performance.md has the method.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.beside.conductor import TESTS, Plan, conduct
from bench.beside.environment import FAILURES
from bench.beside.roster import BY_NAME, ENTRIES
from bench.beside.table import table


def parse() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(prog="bench.beside", description=__doc__)
    parser.add_argument("--mib", type=int, default=256, help="state of each rank")
    parser.add_argument("--tensors", type=int, default=50, help="in how many tensors")
    parser.add_argument("--ranks", type=int, default=1, choices=(1, 2))
    kinds = ("float32", "bfloat16", "float8_e4m3fn")
    parser.add_argument("--dtype", default="float32", choices=kinds)
    parser.add_argument("--repeat", type=int, default=3, help="rounds")
    parser.add_argument("--snapshots", type=int, default=4, help="per visit, the first apart")
    parser.add_argument("--step-ms", type=float, default=100.0, help="length of a training step")
    parser.add_argument("--timeout", type=float, default=180.0, help="of one phase, in seconds")
    parser.add_argument("--peer", nargs="+", choices=BY_NAME, metavar="NAME", help="only these")
    parser.add_argument("--directory", type=Path, help="on the disk that is to be measured")
    parser.add_argument("--environment", type=Path, help="what `make bench` has installed")
    parser.add_argument("--json", type=Path, metavar="OUT", help="keep what was found, as lines")
    parser.add_argument("--again", action="store_true", help="only print what --json has kept")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw peers.png and peers.svg")
    return parser.parse_args()


def interpreter(environment: Path | None) -> Path | None:
    """Python of the other libraries, if that environment was made."""
    python = environment.absolute() / "bin" / "python" if environment else None
    return python if python is not None and python.exists() else None


def missing(environment: Path | None) -> dict[str, str]:
    """What could not be installed."""
    path = environment / FAILURES if environment else None
    found: dict[str, str] = json.loads(path.read_text()) if path and path.exists() else {}
    return found


def measure(args: argparse.Namespace, directory: Path, kept: Path) -> None:
    """Run, and keep each line as it comes, so that a run that is cut short is not lost."""
    names = args.peer or [entry.name for entry in ENTRIES]
    plan = Plan(
        entries=tuple(BY_NAME[name] for name in names),
        directory=directory,
        mib=args.mib,
        tensors=args.tensors,
        dtype=args.dtype,
        ranks=args.ranks,
        repeat=args.repeat,
        snapshots=args.snapshots,
        step_seconds=args.step_ms / 1000,
        timeout_seconds=args.timeout,
        others=interpreter(args.environment),
        missing=missing(args.environment),
    )
    with kept.open("w") as out:
        for line in conduct(plan, lambda text: print(text, file=sys.stderr, flush=True)):
            out.write(json.dumps(line) + "\n")
            out.flush()


def draw(python: Path | None, kept: Path, directory: Path) -> None:
    """The plots need matplotlib, which only that environment has."""
    if python is None:
        sys.exit("plots need --environment")
    directory.mkdir(parents=True, exist_ok=True)
    command = [str(python), "-m", "bench.beside.draw", str(kept.absolute()), str(directory)]
    subprocess.run(command, env={"PYTHONPATH": str(TESTS)}, check=True)


def main() -> None:
    """Measure, print, draw."""
    args = parse()
    with tempfile.TemporaryDirectory(prefix="bench-peers-", dir=args.directory) as name:
        kept = args.json or Path(name) / "lines.jsonl"
        if not args.again:
            measure(args, Path(name), kept)
        print(table([json.loads(line) for line in kept.read_text().splitlines()]))
        if args.plots:
            draw(interpreter(args.environment), kept, args.plots)


if __name__ == "__main__":
    main()
