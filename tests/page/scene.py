"""A real daemon with real jobs, as the status page of docs/images shows them.

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
from ckptmgr.types import Outcome
from driven import Daemon, Rank, until
from page.browser import Browser
from processes import end_processes_of
from rigged import Rig

WORLD = 2


@contextlib.contextmanager
def scene(runtime: Path, place: Path) -> Iterator[tuple[Daemon, Rig]]:
    """Two jobs: one of two ranks that commits as usual, with a mirror and a held step; one whose
    store is full. The second one's store is the rig.
    """
    site = place / "data"
    site.mkdir()
    (place / "full").mkdir()
    rig = Rig(place / "full")
    url = f"file://{site}/llama-3b-run7"
    environment = rig.environment(HOSTNAME="node12")
    with (
        Daemon(runtime, "--mirror", f"file://{place}/copy", environment=environment) as daemon,
        Rank(runtime, url, world=WORLD, mib=8, codec="zstd", keep=12) as first,
        Rank(runtime, url, world=WORLD, mib=8, codec="zstd", keep=12, rank=1, first=first) as second,
        Rank(runtime, rig.url, mib=2) as other,
    ):
        for step in range(1, 31):
            for rank in (first, second):
                rank.save(step * 200)
            for rank in (first, second):
                assert rank.wait(step * 200).outcome == Outcome.COMMITTED
            if step == 22:
                assert call("hold", url, step * 200, "--why", "for the paper").status == 0
            time.sleep(0.1)
        for step in (1, 2, 3):
            other.save(step * 50)
            assert other.wait(step * 50).outcome == Outcome.COMMITTED
        rig.obey(("put_new", "data/", "full"))
        other.save(200)
        until(lambda: "is full" in str(daemon.status()), "its store is full")
        yield daemon, rig


def shoot(page: Browser, directory: Path) -> None:
    """The four pictures, of a page that is open."""
    for name, width, height, dark in (
        ("status-desktop", 1180, 980, False),
        ("status-desktop-dark", 1180, 980, True),
        ("status-phone", 360, 1420, False),
    ):
        page.screen(width, height, dark=dark, scale=2 if width < 500 else 1)
        time.sleep(0.5)
        page.shoot(directory / f"{name}.png")


def main(directory: Path) -> None:
    """Make the pictures."""
    runtime = Path(f"/dev/shm/ckptmgr-test-{os.getpid()}-{secrets.token_hex(4)}")
    open_private_dir(runtime)
    os.environ["CKPTMGR_RUNTIME_DIR"] = str(runtime)
    place = Path(tempfile.mkdtemp(prefix="scene-"))
    try:
        with scene(runtime, place) as (daemon, _), Browser() as page:
            page.screen(1180, 980)
            page.open(f"http://127.0.0.1:{daemon.status()['metrics_port']}/")
            page.await_text("held", ".job tbody") if False else page.await_text("does not take")
            time.sleep(20)
            shoot(page, directory)
    finally:
        end_processes_of(runtime)
        shutil.rmtree(runtime, ignore_errors=True)
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
