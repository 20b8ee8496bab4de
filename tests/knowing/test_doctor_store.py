"""`doctor URL` proves a store, and finds each promise that one breaks."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from called import Called, call
from ckptmgr.doctor import disk
from ckptmgr.doctor.load import Load
from ckptmgr.store.finding import Health
from driven import Daemon, Rank
from hf3fs.mounted import Mounted
from knowing.odd_stores import install
from rigged import Rig

NO_DAEMON = Path("/dev/shm/ckptmgr-test-of-nobody")
"""In memory, as a runtime directory must be, and never made."""


def looked(url: object, *arguments: str, **environment: str) -> tuple[Called, dict[str, Any]]:
    """What `doctor` found, by check."""
    given = ("--probe-mib=1", "--json", *arguments)
    found = call("doctor", url, *given, runtime=NO_DAEMON, **environment)
    assert found.err == "" or found.status, found
    rows = found.document
    for row in rows:
        assert row["what"]
        assert row["fix"] or row["state"] in ("ok", "not checked"), row
    return found, {row["check"]: row for row in rows}


@pytest.fixture
def broken(tmp_path: Path) -> dict[str, str]:
    """The environment in which the stores of odd_stores.py are found."""
    return {"PYTHONPATH": install(tmp_path / "site")}


def test_a_good_store_is_proved_and_left_as_it_was(tmp_path: Path) -> None:
    found, by_check = looked(tmp_path / "store", "--state-gib=0.001")
    assert found.status == 0
    assert not (tmp_path / "store").exists(), "nothing is left of a look into a new store"
    proved = ("reachable", "clock", "put-if-absent", "read-after-write", "list-after-write")
    proved += ("visibility lag", "link and fsync", "bandwidth put", "contents", "deletes")
    assert {check: by_check[check]["state"] for check in proved} == dict.fromkeys(proved, "ok")
    assert by_check["put-if-absent"]["evidence"] == "24 of 24 races of 8 writers had one winner"


def test_a_store_in_use_keeps_what_it_has_and_may_be_too_slow(
    runtime: Path, store_url: str
) -> None:
    root = Path(store_url.removeprefix("file://"))
    with Daemon(runtime), Rank(runtime, store_url) as rank:
        rank.save(1)
        rank.wait(1)
        before = sorted(path for path in root.rglob("*") if path.is_file())
        found, by_check = looked(root, "--state-gib=500000", "--every=1s")
        assert sorted(path for path in root.rglob("*") if path.is_file()) == before
    assert not (root / "doctor").exists()
    assert found.status == 1
    assert by_check["bandwidth put"]["state"] == by_check["free space"]["state"] == "failure"
    assert "are 488.3 TiB/s" in by_check["bandwidth put"]["evidence"]


def test_a_store_that_is_not_exclusive_is_found(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    found, by_check = looked(rig.sloppy_url, PYTHONPATH=rig.python_path)
    row = by_check["put-if-absent"]
    assert (found.status, row["state"]) == (0, "warning"), "a job can live with it"
    assert "had one winner, up to " in row["evidence"]


def test_a_store_on_whose_exclusion_somebody_relies_fails(
    tmp_path: Path, broken: dict[str, str]
) -> None:
    found, by_check = looked(f"declared://{tmp_path}/store", **broken)
    assert found.status == 1
    row = by_check["put-if-absent"]
    assert row["state"] == "failure"
    assert row["evidence"].startswith("0 of 24 races of 8 writers had one winner, up to 8")
    assert "CKPTMGR_SINGLE_DECIDER=1" in row["fix"]
    assert by_check["deletes"]["state"] == "failure"
    assert "doctor/" in by_check["deletes"]["evidence"]


def test_late_objects_other_bytes_and_another_clock_are_found(
    tmp_path: Path, broken: dict[str, str]
) -> None:
    found, by_check = looked(f"broken://{tmp_path}/store", **broken)
    assert found.status == 1
    for check in ("read-after-write", "list-after-write"):
        assert by_check[check]["state"] == "failure"
        assert "the store declares 0 s" in by_check[check]["evidence"]
    assert by_check["contents"]["state"] == "failure"
    assert by_check["contents"]["evidence"] == "0 of 1 objects came back bit for bit"
    assert by_check["clock"]["state"] == "warning"
    assert "s ahead of ours" in by_check["clock"]["evidence"]


@pytest.mark.parametrize("rule", ["refuse", "dead", "full"])
def test_5_a_store_that_takes_nothing(tmp_path: Path, rule: str) -> None:
    rig = Rig(tmp_path)
    rig.obey(("put_new", "", rule))
    more = {"PYTHONPATH": rig.python_path, "CKPTMGR_STORE_TIMEOUT_SECONDS": "0.2"}
    found, by_check = looked(rig.url, **more)
    assert (found.status, by_check["reachable"]["state"]) == (5, "failure")
    assert "put-if-absent" not in by_check
    assert by_check["versions"]["state"] == "ok", "the host is looked at all the same"


def test_2_wrong_arguments(tmp_path: Path) -> None:
    for arguments, words in (
        (["--every=often"], "'often' is not a time"),
        (["--state-gib=-1"], "-1.0 is not a size"),
        (["s3://key:secret@bucket"], "carries credentials"),
    ):
        found = call("doctor", *arguments)
        assert (found.status, found.out) == (2, "")
        assert words in found.err
        assert "secret" not in found.err


# ---- file systems -----------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB in the memory of this host."""
    if os.getuid() != 0:
        pytest.skip("NEEDS ROOT: a full file system is not checked in this run")
    point = tmp_path / "disk"
    point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(point)], check=True)
    yield point
    subprocess.run(["umount", str(point)], check=True)


@pytest.mark.root
def test_a_disk_that_is_nearly_full_is_found(small_disk: Path) -> None:
    root = str(small_disk / "store")
    assert disk.space(root, Load()).health is Health.OK
    (small_disk / "other").write_bytes(bytes(16_100_000))
    assert disk.space(root, Load()).health is Health.WARNING
    assert disk.space(root, Load(state_bytes=1_000_000)).health is Health.FAILURE
    assert disk.place(root).health is Health.WARNING, "tmpfs does not outlive the host"
    with suppress(OSError):
        (small_disk / "rest").write_bytes(bytes(16_100_000))
    found, by_check = looked(root)
    assert (found.status, by_check["reachable"]["state"]) == (5, "failure")
    assert "ENOSPC" in by_check["reachable"]["evidence"]


def test_a_file_system_without_links_is_found(tmp_path: Path) -> None:
    """In /proc nothing can be made."""
    finding = disk.links("/proc/self")
    assert finding.health is Health.FAILURE
    assert finding.fix


@pytest.mark.root
@pytest.mark.timeout(120)
def test_the_rules_of_a_3fs_mount_are_looked_at(mount: Mounted) -> None:
    found, by_check = looked(f"hf3fs://{mount.point}/run7")
    assert (found.status, by_check["3fs rules"]["state"]) == (0, "ok"), found
    assert by_check["visibility lag"]["evidence"].startswith("declared 5 s")
    settings = mount.point / "3fs-virt/set-conf"
    for name, value in (("usr.negative_timeout", "30"), ("usr.dryrun_bench_mode", "true")):
        with suppress(FileNotFoundError):  # it is set, and no entry is there to be looked at
            os.symlink(value, settings / name)
    found, by_check = looked(f"file://{mount.point}/run7")
    assert found.status == 1
    of_mount = [row for row in found.document if row["check"] == "3fs rules"]
    assert [row["state"] for row in of_mount] == ["failure", "warning"]
    assert "usr.negative_timeout is 30 s" in of_mount[1]["evidence"]
    by_check["3fs rules"] = of_mount[0]
    assert "usr.dryrun_bench_mode is true" in by_check["3fs rules"]["evidence"]
    assert "set-conf/usr.dryrun_bench_mode" in by_check["3fs rules"]["fix"]
