"""The file system of a path is known without touching a mount that may hang."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ckptmgr.errors import UsageError
from ckptmgr.store import mounts, registry
from ckptmgr.store.local import LocalStore
from ckptmgr.store.mounts import Mount, mount_of, read_mounts
from ckptmgr.store.registry import open_store

LINES = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:40 / /mnt/net rw - nfs4 server:/x rw
31 30 0:41 / /mnt/net/3fs rw - fuse.hf3fs hf3fs.prod rw
32 22 0:42 / /mnt/with\\040space rw - tmpfs tmpfs rw
33 22 0:43 / /mnt/twice rw - tmpfs tmpfs rw
34 33 0:44 / /mnt/twice rw master:7 - xfs /dev/vdb rw
"""


@pytest.fixture
def table(tmp_path: Path) -> str:
    path = tmp_path / "mountinfo"
    path.write_text(LINES)
    return str(path)


def test_every_field_is_read(table: str) -> None:
    found = list(read_mounts(table))
    assert found[0] == Mount("/", "ext4", "254:0", {"rw": "", "relatime": ""})
    assert found[3] == Mount("/mnt/with space", "tmpfs", "0:42", {"rw": ""})
    assert len(found) == 6


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"),
        ("/mnt", "ext4"),
        ("/mnt/network", "ext4"),
        ("/mnt/net", "nfs4"),
        ("/mnt/net/run7/a", "nfs4"),
        ("/mnt/net/3fs/run7", "fuse.hf3fs"),
        ("/mnt/net/3fs/../x", "nfs4"),
        ("/mnt/with space/x", "tmpfs"),
        ("/mnt/twice/x", "xfs"),
    ],
)
def test_the_longest_mount_point_wins_and_of_two_the_later(
    table: str, path: str, kind: str
) -> None:
    assert mount_of(path, table).kind == kind


def test_links_are_followed_up_to_a_mount_that_may_hang_and_not_beyond(
    table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to("more/../other")
    (tmp_path / "other").symlink_to("/mnt/net/3fs")
    (tmp_path / "loop").symlink_to("loop")
    asked: list[str] = []
    readlink = os.readlink
    monkeypatch.setattr(mounts.os, "readlink", lambda path: (asked.append(path), readlink(path))[1])
    assert mount_of(f"{tmp_path}/link/run7", table).kind == "fuse.hf3fs"
    assert mount_of(f"{tmp_path}/loop/run7", table).kind == "ext4"
    assert not [path for path in asked if path.startswith("/mnt/net")]


NFS = "nas:/e rw,vers=4.2,rsize=1048576"
LAGS = rf"""
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


@pytest.mark.parametrize(
    ("path", "lag"),
    [
        ("/data/run7", 0.0),
        ("/nfs/run7", 60.0),
        ("/nfsx/run7", 0.0),
        ("/nfs/scratch/run7", 0.0),
        ("/quick/a/b", 3.0),
        ("/strict/a", 0.0),
        ("/with blank/x", 1.0),
        ("/gluster/x", 1.0),
        ("/over/x", 0.0),
        ("/lustre/x", 0.0),
    ],
)
def test_a_store_declares_the_lag_of_its_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, lag: float
) -> None:
    (tmp_path / "mountinfo").write_text(LAGS)
    monkeypatch.setattr(mounts, "MOUNTINFO", f"{tmp_path}/mountinfo")
    assert LocalStore(path).visibility_lag_seconds == lag


def test_without_a_table_there_is_no_lag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "MOUNTINFO", "/nowhere/mountinfo")
    assert LocalStore("/nfs/run7").visibility_lag_seconds == 0.0


def test_a_root_that_is_no_mount_is_a_file_system_too(tmp_path: Path) -> None:
    (tmp_path / "mountinfo").write_text("")
    assert mount_of("/x", str(tmp_path / "mountinfo")).point == "/"


def test_a_path_whose_rules_no_installed_plugin_knows_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A size that a 3FS mount remembers wrongly would be taken for damage."""
    monkeypatch.setattr(registry, "mount_of", lambda _: Mount("/mnt", "fuse.hf3fs", "0:41"))
    monkeypatch.setattr(registry, "entry_points", lambda group: [])
    with pytest.raises(UsageError, match="pip install ckptmgr-hf3fs"):
        open_store("/mnt/run7")
