"""G2 at the lowest level: what put_new acknowledged survives a power cut at any instant."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from powercut import Image, Mark, images, mounted, needs_powercut, record
from powercut_writer import WRITERS, content_of

from ckptmgr.store.local import LocalStore
from scale import scaled

SEED = 20261123
WRITER = Path(__file__).with_name("powercut_writer.py")

pytestmark = [pytest.mark.root, pytest.mark.reliability, pytest.mark.timeout(scaled(600, 1800))]


def lost_and_torn(system: str, place: Path, mode: str) -> tuple[int, int]:
    """Acknowledged objects that are gone, and objects that are not whole, over all images, or up to
    the first image that has any.
    """
    count = scaled(20, 60)

    def put_objects(directory: Path, mark: Mark) -> None:
        command = [sys.executable, WRITER, directory / "store", str(count), mode]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for line in child.stdout:
                mark(line.strip())
        assert child.returncode == 0

    log = record(needs_powercut(system), place, put_objects)
    acknowledged = sum(entry.kind == "M" for entry in log.entries)
    assert acknowledged == count * WRITERS
    for image in images(log, SEED, scaled(16, 400)):
        gone, broken = asyncio.run(look(image))
        if gone or broken:
            return gone, broken
    return 0, 0


async def look(image: Image) -> tuple[int, int]:
    with mounted(image) as directory:
        store = LocalStore(str(directory / "store"))
        found = await store.list("")
        torn = [key for key in found if bytes(await store.get(key)) != content_of(key)]
        await store.aclose()
    lost = set(image.marks) - set(found)
    return len(lost), len(torn)


@pytest.mark.parametrize("mode", ["careful", "make-durable"])
@pytest.mark.parametrize("system", ["ext4", "xfs", "btrfs"])
def test_no_acknowledged_object_is_lost_or_torn(system: str, mode: str, tmp_path: Path) -> None:
    assert lost_and_torn(system, tmp_path, mode) == (0, 0)


@pytest.mark.parametrize("system", ["ext4", "xfs"])
def test_without_the_sync_of_the_directory_acknowledged_objects_are_lost(
    system: str, tmp_path: Path
) -> None:
    """The harness can fail: the same workload, one sync less."""
    lost, _ = lost_and_torn(system, tmp_path, "no-directory-sync")
    assert lost > 0


@pytest.mark.parametrize("system", ["ext4", "xfs", "btrfs"])
def test_without_the_sync_of_the_file_objects_are_lost_or_torn(system: str, tmp_path: Path) -> None:
    lost, torn = lost_and_torn(system, tmp_path, "no-file-sync")
    assert lost + torn > 0
