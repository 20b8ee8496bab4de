"""Freed memory of the size of chunks is used again, and not given back and made anew."""

from __future__ import annotations

import subprocess
import sys

ROUNDS, BLOCKS, BLOCK_BYTES, PAGE_BYTES = 16, 8, 4 << 20, 4096
PR_SET_THP_DISABLE = 41

PROGRAM = f"""
import ctypes, resource, sys
from ckptmgr.heap import keep_freed_memory
if sys.argv[1] == "kept" and not keep_freed_memory():
    sys.exit("no mallopt")
ctypes.CDLL(None).prctl({PR_SET_THP_DISABLE}, 1, 0, 0, 0)  # so that a fault is one small page
for _ in range({ROUNDS}):
    blocks = [b"x" * {BLOCK_BYTES} for _ in range({BLOCKS})]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def faults(how: str) -> int:
    """Pages that a process was given which has so many chunks at a time, again and again."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def test_chunks_come_from_pages_that_were_used_before() -> None:
    a_round = BLOCKS * BLOCK_BYTES // PAGE_BYTES
    kept, given_back = faults("kept"), faults("left alone")
    # How often glibc gives memory back by itself depends on where its heap happens to begin.
    assert kept < given_back / 4, (kept, given_back)
    assert kept < 3 * a_round
