"""`doctor URL` proves a store, and finds each promise that one breaks."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from called import Called, call
from ckptmgr.doctor import disk
from ckptmgr.store.finding import Health
from driven import Daemon, Rank
from hf3fs.mounted import Mounted
from knowing.stores import install
from rigged import Rig


def looked(url: object, *arguments: str, **environment: str) -> tuple[Called, dict[str, Any]]:
    """What `doctor` found, by check."""
    found = call("doctor", url, "--probe-mib=1", "--json", *arguments, **environment)
    assert found.err == "" or found.status, found
    rows = found.document
    for row in rows:
        assert row["what"]
        assert row["fix"] or row["state"] in ("ok", "not checked"), row
    return found, {row["check"]: row for row in rows}


@pytest.fixture
def broken(tmp_path: Path) -> dict[str, str]:
    """The environment in which the stores of stores.py are found."""
    return {"PYTHONPATH": install(tmp_path / "site")}


def test_a_good_store_is_proved_and_left_as_it_was(tmp_path: Path) -> None:
    found, by_check = looked(tmp_path / "store", "--state-gib=0.001")
    assert found.status == 0
    assert not (tmp_path / "store").exists(), "nothing is left of a look into a new store"
    proved = ("reachable", "clock", "put-if-absent", "read-after-write", "list-after-write")
    proved += ("visibility lag", "link and fsync", "bandwidth put", "contents", "deletes")
    assert {check: by_check[check]["state"] for check in proved} == dict.fromkeys(proved, "ok")
    assert by_check["put-if-absent"]["evidence"] == "24 of 24 races of 8 writers had one winner"


def test_a_store_in_use_keeps_what_it_has(runtime: Path, store_url: str) -> None:
    root = Path(store_url.removeprefix("file://"))
    with Daemon(runtime), Rank(runtime, store_url) as rank:
        rank.save(1)
        rank.wait(1)
        before = sorted(path for path in root.rglob("*") if path.is_file())
        assert looked(root)[0].status == 0
        assert sorted(path for path in root.rglob("*") if path.is_file()) == before
    assert not (root / "doctor").exists()


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
    row = by_check["put-if-absent"]
    assert (found.status, row["state"]) == (1, "failure")
    assert row["evidence"].startswith("0 of 24 races of 8 writers had one winner, up to 8")
    assert "CKPTMGR_SINGLE_DECIDER=1" in row["fix"]


def test_an_object_that_is_shown_late_is_found(tmp_path: Path, broken: dict[str, str]) -> None:
    found, by_check = looked(f"late://{tmp_path}/store", **broken)
    assert found.status == 1
    for check in ("read-after-write", "list-after-write"):
        assert by_check[check]["state"] == "failure"
        assert "the store declares 0 s" in by_check[check]["evidence"]


def test_other_bytes_than_were_put_are_found(tmp_path: Path, broken: dict[str, str]) -> None:
    found, by_check = looked(f"rotten://{tmp_path}/store", **broken)
    assert (found.status, by_check["contents"]["state"]) == (1, "failure")
    assert by_check["contents"]["evidence"] == "0 of 1 objects came back bit for bit"


def test_a_clock_that_is_ahead_is_a_warning(tmp_path: Path, broken: dict[str, str]) -> None:
    found, by_check = looked(f"ahead://{tmp_path}/store", **broken)
    assert (found.status, by_check["clock"]["state"]) == (0, "warning")
    assert "3600.0 s ahead" in by_check["clock"]["evidence"] or "3599" in str(by_check["clock"])


def test_objects_that_can_not_be_deleted_are_found(tmp_path: Path, broken: dict[str, str]) -> None:
    found, by_check = looked(f"undeletable://{tmp_path}/store", **broken)
    assert (found.status, by_check["deletes"]["state"]) == (1, "failure")
    assert "doctor/" in by_check["deletes"]["evidence"]


def test_a_store_that_is_too_slow_for_the_interval_is_found(tmp_path: Path) -> None:
    found, by_check = looked(tmp_path / "store", "--state-gib=500000", "--every=1s")
    assert found.status == 1
    assert by_check["bandwidth put"]["state"] == "failure"
    assert by_check["free space"]["state"] == "failure"
    assert "are 488.3 TiB/s" in by_check["bandwidth put"]["evidence"]


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
    (small_disk / "other").write_bytes(bytes(15_900_000))
    found, by_check = looked(small_disk / "store", "--probe-mib=0")
    assert (found.status, by_check["free space"]["state"]) == (0, "warning")
    assert by_check["durable place"]["state"] == "warning", "tmpfs does not outlive the host"
    found, by_check = looked(small_disk / "store", "--probe-mib=0", "--state-gib=0.01")
    assert (found.status, by_check["free space"]["state"]) == (1, "failure")
    (small_disk / "other").write_bytes(bytes(16_700_000))
    found, by_check = looked(small_disk / "store", "--probe-mib=1")
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
    os.symlink("30", settings / "usr.negative_timeout")
    assert looked(f"hf3fs://{mount.point}/run7")[1]["3fs rules"]["state"] == "warning"
    os.symlink("true", settings / "usr.dryrun_bench_mode")
    found, by_check = looked(f"file://{mount.point}/run7")
    assert by_check["3fs rules"]["state"] == "failure"
    assert "usr.dryrun_bench_mode is true" in by_check["3fs rules"]["evidence"]
    assert "set-conf/usr.dryrun_bench_mode" in by_check["3fs rules"]["fix"]
