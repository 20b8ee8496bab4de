"""A real daemon with two real jobs, as the pictures of its status page in docs/images show them.

`PYTHONPATH=.:tests python tests/page/scene.py docs/images` makes the pictures anew.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from called import call
from ckptmgr.config import open_private_dir
from ckptmgr.daemon.glance import GLANCE_SECONDS_MIN
from ckptmgr.types import Outcome
from driven import Daemon, Rank, until
from page.browser import Browser
from processes import end_processes_of

SCREENS = (
    ("status-desktop", 1120, 900, False),
    ("status-desktop-dark", 1120, 900, True),
    ("status-phone", 360, 740, False),
)


@contextlib.contextmanager
def scene(runtime: Path, place: Path, pause_seconds: float) -> Iterator[Daemon]:
    """A job of two ranks that commits as usual, with a mirror and a held step; and one whose store
    has gone away, as a network file system that is not mounted any more.
    """
    stores = place / "store"
    stores.mkdir()
    url, lost = f"file://{stores}/llama-3b-run7", stores / "gpt2-finetune"
    with (
        Daemon(runtime, "--mirror", f"file://{place}/copy") as daemon,
        Rank(runtime, f"file://{lost}", mib=2) as other,
        Rank(runtime, url, world=2, mib=8, codec="zstd", keep=16) as first,
        Rank(runtime, url, world=2, mib=8, codec="zstd", keep=16, rank=1, first=first) as second,
    ):
        for step in (50, 100, 150):
            save(step, other)
        lost.rename(place / "away")
        other.save(200)
        until(lambda: "is not mounted" in str(daemon.status()), "it is missed")
        for step in range(200, 8200, 200):
            save(step, first, second)
            if step == 5600:
                assert call("hold", url, step, "--why", "for the paper").status == 0
            time.sleep(pause_seconds)
        yield daemon


def save(step: int, *ranks: Rank) -> None:
    """Snapshot a step on all ranks, and see it committed."""
    for rank in ranks:
        rank.save(step)
    for rank in ranks:
        assert rank.wait(step).outcome == Outcome.COMMITTED


def main(directory: Path) -> None:
    """Make the pictures."""
    runtime = Path(f"/dev/shm/ckptmgr-test-{os.getpid()}-{secrets.token_hex(4)}")
    open_private_dir(runtime)
    os.environ["CKPTMGR_RUNTIME_DIR"] = str(runtime)
    place = Path(tempfile.mkdtemp(prefix="ckpt-"))
    try:
        with scene(runtime, place, 1.5) as daemon, Browser() as page:
            page.screen(1120, 900)
            page.open(f"http://127.0.0.1:{daemon.status()['metrics_port']}/")
            page.await_text("Commits come as usual")
            time.sleep(GLANCE_SECONDS_MIN + 3)
            for name, width, height, dark in SCREENS:
                page.screen(width, height, dark=dark, scale=1.5 if width < 500 else 1)
                time.sleep(0.5)
                page.shoot(directory / f"{name}.png")
    finally:
        end_processes_of(runtime)
        shutil.rmtree(runtime, ignore_errors=True)
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
