"""A store on a mount declares how late it may see what other hosts did."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from ckptmgr.store import mounts
from ckptmgr.store.local import LocalStore
from ckptmgr.store.mounts import lag_seconds, mount_of, parse

NFS = "nas:/e rw,vers=4.2,rsize=1048576"
TABLE = rf"""
25 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 25 0:40 / /nfs rw,relatime - nfs4 {NFS},hard,local_lock=none
31 25 0:41 / /quick rw,relatime shared:9 master:2 - nfs {NFS},acdirmin=0,acdirmax=3
32 25 0:42 / /strict rw,relatime - nfs4 {NFS},acregmin=0,noac
33 25 0:43 / /with\040blank rw,nosuid - fuse mfs\0431.2.3.4:9421 rw,allow_other
34 30 0:44 / /nfs/scratch rw - xfs /dev/vdb rw
35 25 0:45 / /gluster rw - fuse.glusterfs host:/v rw
36 25 0:46 / /over rw - nfs4 {NFS}
37 36 0:47 / /over rw - tmpfs tmpfs rw
38 25 0:48 / /lustre rw - lustre 1.2.3.4@tcp:/l rw,flock
""".strip()


@pytest.fixture(autouse=True)
def _table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(TABLE)
    monkeypatch.setattr(mounts, "MOUNTS", str(table))


@pytest.mark.parametrize(
    ("path", "lag"),
    [
        ("/data/run7", 0.0),
        ("/nfs/run7", 60.0),
        ("/nfs", 60.0),
        ("/nfsx/run7", 0.0),
        ("/quick/a/b", 3.0),
        ("/strict/a", 0.0),
        ("/with blank/x", 1.0),
        ("/gluster/x", 1.0),
        ("/over/x", 0.0),
        ("/lustre/x", 0.0),
        ("/", 0.0),
    ],
)
def test_the_lag_is_that_of_the_mount(path: str, lag: float) -> None:
    assert lag_seconds(path) == lag


def test_a_link_leads_to_the_mount_behind_it(tmp_path: Path) -> None:
    (tmp_path / "far").symlink_to("/quick/deep")
    (tmp_path / "near").symlink_to("../" + tmp_path.name + "/far")
    assert lag_seconds(str(tmp_path / "near/run7")) == 3.0
    (tmp_path / "round").symlink_to("round")
    assert lag_seconds(str(tmp_path / "round/run7")) == 0.0


def test_no_link_is_looked_for_on_a_mount_that_may_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []

    def readlink(path: str) -> str:
        looked.append(path)
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mounts.os, "readlink", readlink)
    assert lag_seconds("/nfs/run7/store") == 60.0
    assert lag_seconds("/data/run7") == 0.0
    assert looked == ["/data", "/data/run7"]


def test_without_the_table_there_is_no_lag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "MOUNTS", "/nowhere/mountinfo")
    assert lag_seconds("/nfs/run7") == 0.0


def test_the_table_of_this_machine_is_read() -> None:
    found = parse(Path("/proc/self/mountinfo").read_text())
    assert mount_of("/proc/self", found).kind == "proc"
    assert mount_of("/no/such/place", found).point == "/"


def test_the_store_declares_it() -> None:
    async def declared(root: str) -> float:
        store = LocalStore(root)
        await store.aclose()
        return store.visibility_lag_seconds

    assert asyncio.run(declared("/nfs/run7")) == 60.0
    assert asyncio.run(declared("/data/run7")) == 0.0
