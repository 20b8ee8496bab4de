"""The mirror: it follows commits, stands in for what the store does not give, delays nothing."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

import asking
from called import call, spoil
from ckptmgr.errors import StoreUnreachableError, UsageError
from ckptmgr.staging.control import Load
from ckptmgr.staging.hostbuffer import HostBuffer
from ckptmgr.staging.launch import connect
from ckptmgr.store.mirrored import place_of
from ckptmgr.types import Outcome
from driven import PATIENCE_SECONDS, Daemon, Rank, check_slot, until
from rigged import Rig


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mirror that every daemon started from here on keeps."""
    path = tmp_path / "mirror"
    monkeypatch.setenv("CKPTMGR_MIRROR", f"file://{path}")
    return path


def rigged_mirror(
    tmp_path: Path, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[Rig, str]:
    """A mirror that obeys rules, and the place in it of a job, as a local store."""
    rig = Rig(tmp_path / "rig")
    monkeypatch.setenv("PYTHONPATH", rig.python_path)
    monkeypatch.setenv("CKPTMGR_MIRROR", rig.url)
    place = Path(place_of(rig.url, store_url).removeprefix("rigged://"))
    place.parent.mkdir(parents=True)
    for name in ("rules", "log"):
        Path(f"{place}.{name}").symlink_to(f"{rig.path}.{name}")
    return rig, f"file://{place}"


def save(rank: Rank, *steps: int) -> None:
    for step in steps:
        rank.save(step)
        assert rank.wait(step).outcome == Outcome.COMMITTED


def follows(daemon: Daemon, steps: int) -> bool:
    jobs = daemon.status()["jobs"]
    told = len(daemon.events("mirrored")) >= steps
    return told and all(job["mirror"]["behind"] == 0 for job in jobs)


def steps_at(url: object) -> list[str]:
    found = call("ls", url, "--json", CKPTMGR_MIRROR="").document
    return [entry["id"] for entry in found if entry["state"] in ("committed", "verified")]


@pytest.mark.parametrize(
    ("mirror", "url", "place"),
    [
        ("file:///m", "file:///data/run7", "file:///m/file/data/run7"),
        ("/m/", "/data/a b", "file:///m/file/data/a b"),
        ("s3://copy/x?endpoint=e", "s3://bucket/run7", "s3://copy/x/s3/bucket/run7?endpoint=e"),
        ("file:///m", "s3://bucket/run7?endpoint=e", "file:///m/s3/bucket/run7-46d9265e"),
        ("file:///m", "s3://bucket/a b", "file:///m/s3/bucket/a b"),
        ("file:///m", "s3://bucket/a%20b", "file:///m/s3/bucket/a%2520b"),
        ("file:///m", "s3://b/%2e%2e/%2e%2e/x", "file:///m/s3/b/%252e%252e/%252e%252e/x"),
        ("s3://copy/x", "s3://bucket/a%2f..%2fb", "s3://copy/x/s3/bucket/a%2f..%2fb"),
    ],
)
def test_each_job_has_a_place_of_its_own(mirror: str, url: str, place: str) -> None:
    assert place_of(mirror, url).replace("%20", " ") == place


@pytest.mark.parametrize("url", ["s3://b/../../x", "hf3fs://stage/a%2f..%2f../x", "memory://./x"])
def test_no_job_leads_its_copy_out_of_the_mirror(url: str) -> None:
    with pytest.raises(UsageError, match="leads out of a mirror"):
        place_of("file:///m", url)


def test_a_mirror_is_a_store_by_itself_and_follows_retention(
    runtime: Path, store_url: str, mirror: Path
) -> None:
    place = place_of(f"file://{mirror}", store_url)
    with Daemon(runtime) as daemon, Rank(runtime, store_url, keep=2) as rank:
        save(rank, 1, 2, 3, 4)
        until(lambda: steps_at(place) == steps_at(store_url) == ["1.4", "1.3"], "it follows")
        until(lambda: follows(daemon, 2), "it is told")
        assert not daemon.events("mirror_read")
    assert call("verify", place, "--all").status == 0
    shutil.rmtree(store_url.removeprefix("file://"))
    assert call("restore", place, "--to", mirror / "out").status == 0


def test_what_the_first_store_lost_is_read_from_the_mirror(
    runtime: Path, store_url: str, mirror: Path, tmp_path: Path
) -> None:
    first = Path(store_url.removeprefix("file://"))
    with Daemon(runtime) as daemon, Rank(runtime, store_url) as rank:
        save(rank, 1, 2)
        until(lambda: follows(daemon, 2), "it follows")
    spoil(first, 1, 2)
    shutil.rmtree(runtime / "buffers")
    with Daemon(runtime) as daemon, Rank(runtime, store_url) as rank:
        reply = rank.restore()
        assert (reply.step, reply.skipped) == (2, ())
        assert daemon.events("mirror_read")[-1]["key"].startswith("data/")
        assert daemon.status()["jobs"][0]["mirror"]["reads"] > 0
    healed = call("restore", store_url, "--to", tmp_path / "healed", "--json")
    assert (healed.status, healed.document["id"]) == (0, "1.2")
    assert "read from the mirror: data/" in healed.err
    assert call("verify", store_url).status == 3, "verify tells of the store itself"
    first.rename(tmp_path / "gone")
    out = call("restore", store_url, "--to", tmp_path / "out", "--json")
    assert (out.status, out.document["id"]) == (0, "1.2"), out
    assert "is not a store any more" in out.err
    same = [(tmp_path / name / "state.safetensors").read_bytes() for name in ("out", "healed")]
    assert same[0] == same[1]


def test_a_dead_mirror_delays_nothing(
    runtime: Path, store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, _ = rigged_mirror(tmp_path, store_url, monkeypatch)
    rig.obey(("*", "", "hang"))
    with Daemon(runtime) as daemon, Rank(runtime, store_url) as rank:
        save(rank, 1, 2, 3)
        assert rank.restore().step == 3
        assert not daemon.events("mirrored")
        assert daemon.status()["jobs"][0]["last_commit"] == "1.3"
    assert steps_at(store_url) == ["1.3", "1.2", "1.1"]


def test_a_mirror_that_is_back_catches_up(
    runtime: Path, store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, place = rigged_mirror(tmp_path, store_url, monkeypatch)
    monkeypatch.setenv("CKPTMGR_STORE_TIMEOUT_SECONDS", "1")
    with Daemon(runtime) as daemon, Rank(runtime, store_url, keep=9) as rank:
        save(rank, 1)
        until(lambda: follows(daemon, 1), "it follows")
        rig.obey(("*", "", "dead"))
        save(rank, 2, 3)
        assert "is dead by the test's will" in daemon.await_event("mirror_failed")["why"]
        assert daemon.status()["jobs"][0]["mirror"]["behind"] == 2
        rig.obey()
        until(lambda: follows(daemon, 3), "it has caught up")
        until(lambda: not daemon.status()["jobs"][0]["mirror"]["last_failure"], "and says so")
    assert steps_at(place) == steps_at(store_url) == ["1.3", "1.2", "1.1"]
    assert call("verify", place, "--all", CKPTMGR_MIRROR="").status == 0


def test_a_mirror_gets_what_was_committed_after_an_outage_of_the_first_store(
    runtime: Path, rig: Rig, mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPTMGR_STORE_TIMEOUT_SECONDS", "1")
    with Daemon(runtime) as daemon, Rank(runtime, rig.url, keep=9) as rank:
        save(rank, 1)
        until(lambda: follows(daemon, 1), "it follows")
        rig.obey(("*", "", "dead"))
        for step in (2, 3):
            rank.save(step)
        daemon.await_event("store_failed")
        rig.obey()
        assert [rank.wait(step).outcome for step in (2, 3)] == [Outcome.COMMITTED] * 2
        until(lambda: follows(daemon, 3), "it has caught up")
        assert not daemon.events("mirror_skipped")
    place = place_of(f"file://{mirror}", rig.url)
    assert steps_at(place) == ["1.3", "1.2", "1.1"]
    assert call("verify", place, "--all").status == 0


def test_a_daemon_reads_from_the_mirror_while_the_first_store_is_silent(
    runtime: Path, rig: Rig, mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever only reads gets the newest step; a trainer must wait, for it claims an attempt."""
    monkeypatch.setenv("CKPTMGR_STORE_TIMEOUT_SECONDS", "1")
    with Daemon(runtime) as daemon:
        with Rank(runtime, rig.url) as rank:
            save(rank, 1, 2)
            until(lambda: follows(daemon, 2), "it follows")
        daemon.end(signal.SIGKILL)
    rig.obey(("*", "", "dead"))
    shutil.rmtree(runtime / "buffers")
    with Daemon(runtime) as daemon, connect(runtime) as client:
        reply = asking.load(client, Load(rig.url), PATIENCE_SECONDS)
        assert (reply.attempt, reply.step, reply.source, reply.skipped) == (1, 2, "store", ())
        with HostBuffer.open(Path(reply.path)) as lent:
            check_slot(lent, reply)
        assert daemon.events("mirror_read")
        with pytest.raises(StoreUnreachableError):
            Rank(runtime, rig.url)
        rig.obey()
        with Rank(runtime, rig.url) as rank:
            assert rank.restore().step == 2


def test_a_mirror_of_another_incarnation_is_left_alone_and_not_read(
    runtime: Path, store_url: str, mirror: Path, tmp_path: Path
) -> None:
    """Its steps have the same names; one damaged register would bring back another job's state."""
    first = Path(store_url.removeprefix("file://"))
    with Daemon(runtime) as daemon, Rank(runtime, store_url) as rank:
        save(rank, 6, 7)
        until(lambda: follows(daemon, 2), "it follows")
    shutil.rmtree(first)
    shutil.rmtree(runtime / "buffers")
    with Daemon(runtime) as daemon, Rank(runtime, store_url) as rank:
        save(rank, 5, 7)
        assert "another incarnation" in daemon.await_event("mirror_failed")["why"]
    assert steps_at(place_of(f"file://{mirror}", store_url)) == ["1.7", "1.6"]
    shutil.rmtree(runtime / "buffers")
    spoil(first, 1, 7, "commit")
    with Daemon(runtime) as daemon, Rank(runtime, store_url) as rank:
        came = rank.restore()
        assert (came.step, [step for step, _ in came.skipped]) == (5, ["1.7"])
        assert daemon.events("mirror_refused")
        assert not daemon.events("mirror_read")
    found = call("restore", store_url, "--to", tmp_path / "out", "--json")
    assert (found.status, found.document["id"]) == (7, "1.5")
    assert found.err.count("the mirror holds another incarnation of this job") == 1


def test_what_an_attempt_resumes_from_is_not_decided_by_a_mirror_that_lags(
    runtime: Path, rig: Rig, mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One listing that gets no answer for as long as the mirror is asked instead."""
    monkeypatch.setenv("CKPTMGR_STORE_TIMEOUT_SECONDS", "0.5")
    with Daemon(runtime) as daemon, Rank(runtime, rig.url, keep=9) as rank:
        save(rank, 1, 2)
        until(lambda: follows(daemon, 2), "it follows")
    with monkeypatch.context() as unmirrored:
        unmirrored.delenv("CKPTMGR_MIRROR")
        with Daemon(runtime), Rank(runtime, rig.url, keep=9) as rank:
            assert rank.restore().step == 2
            save(rank, 3, 4)
    shutil.rmtree(runtime / "buffers")
    rig.obey(("list", "commit/", "dead"))
    with Daemon(runtime) as daemon, Rank(runtime, rig.url, keep=9) as rank:
        # The mirror has waited for an answer four times as long as who has a mirror waits.
        assert "is dead" in daemon.await_event("mirror_failed")["why"]
        rig.obey()
        came = rank.restore()
        assert (came.attempt, came.step, came.skipped) == (2, 4, ())


def mirrored_and_forgotten(runtime: Path, store_url: str) -> None:
    """Two steps in both stores, and in no memory."""
    with Daemon(runtime) as daemon, Rank(runtime, store_url) as rank:
        save(rank, 1, 2)
        until(lambda: follows(daemon, 2), "it follows")
    shutil.rmtree(runtime / "buffers")


def test_a_register_that_is_gone_costs_its_step_though_the_mirror_has_it(
    runtime: Path, store_url: str, mirror: Path
) -> None:
    """What training goes on from must be durable in the first store: a mirror decides nothing."""
    mirrored_and_forgotten(runtime, store_url)
    (Path(store_url.removeprefix("file://")) / "commit/00000001/000000000002").unlink()
    with Daemon(runtime), Rank(runtime, store_url) as rank:
        came = rank.restore()
        assert (came.step, [step for step, _ in came.skipped]) == (1, ["1.2"])


def test_a_register_that_is_damaged_is_read_from_the_mirror(
    runtime: Path, store_url: str, mirror: Path
) -> None:
    mirrored_and_forgotten(runtime, store_url)
    spoil(Path(store_url.removeprefix("file://")), 1, 2, "commit")
    with Daemon(runtime) as daemon, Rank(runtime, store_url) as rank:
        came = rank.restore()
        assert (came.step, came.skipped) == (2, ())
        assert daemon.events("mirror_read")[0]["key"].startswith("commit/")
