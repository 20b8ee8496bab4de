"""Makes the environment of the other libraries: `python -m bench.beside.environment DIRECTORY`.

Each is installed on its own, so that one that can not be had costs one row and not all.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from bench.beside.roster import ENTRIES

CONSTRAINTS = Path(__file__).with_name("constraints.txt")
PLOTS = "matplotlib"
FAILURES = "failures.json"
REASON_LENGTH_MAX = 160


def main() -> None:
    """Install, and write down what could not be."""
    directory, *arguments = sys.argv[1:]
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    python = str(Path(directory, "bin", "python"))
    failures = {}
    for requirement in ("torch", PLOTS, *filter(None, (entry.requires for entry in ENTRIES))):
        command = [python, "-m", "pip", "install", "--quiet", "-c", str(CONSTRAINTS)]
        done = subprocess.run(
            [*command, *arguments, requirement], check=False, capture_output=True, text=True
        )
        if done.returncode:
            failures[requirement] = reason(done.stderr)
            print(f"{requirement}: {failures[requirement]}", file=sys.stderr)
    Path(directory, FAILURES).write_text(json.dumps(failures))


def reason(text: str) -> str:
    """The last error that pip tells."""
    errors = [line for line in text.splitlines() if line.startswith("ERROR:")]
    told = (errors or text.splitlines() or ["pip says nothing"])[-1]
    return f"not installed: {told.removeprefix('ERROR: ')}"[:REASON_LENGTH_MAX]


if __name__ == "__main__":
    main()
