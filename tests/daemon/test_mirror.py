"""The mirror: it follows commits, stands in for what the store does not give, delays nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from called import call, spoil
from ckptmgr.store.mirrored import place_of
from ckptmgr.types import Outcome
from driven import Daemon, Rank, until
from rigged import Rig


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mirror that every daemon started from here on keeps."""
    path = tmp_path / "mirror"
    monkeypatch.setenv("CKPTMGR_MIRROR", f"file://{path}")
    return path


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
    ],
)
def test_each_job_has_a_place_of_its_own(mirror: str, url: str, place: str) -> None:
    assert place_of(mirror, url).replace("%20", " ") == place


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
    rig = Rig(tmp_path / "rig")
    rig.obey(("*", "", "hang"))
    monkeypatch.setenv("PYTHONPATH", rig.python_path)
    monkeypatch.setenv("CKPTMGR_MIRROR", rig.url)
    place = Path(place_of(rig.url, store_url).removeprefix("rigged://"))
    place.parent.mkdir(parents=True)
    for name in ("rules", "log"):
        Path(f"{place}.{name}").symlink_to(f"{rig.path}.{name}")
    with Daemon(runtime) as daemon, Rank(runtime, store_url) as rank:
        save(rank, 1, 2, 3)
        assert rank.restore().step == 3
        assert not daemon.events("mirrored")
        assert daemon.status()["jobs"][0]["last_commit"] == "1.3"
    assert steps_at(store_url) == ["1.3", "1.2", "1.1"]


def test_a_mirror_of_another_incarnation_is_left_alone(
    runtime: Path, store_url: str, mirror: Path
) -> None:
    with Daemon(runtime) as daemon, Rank(runtime, store_url) as rank:
        save(rank, 1)
        until(lambda: follows(daemon, 1), "it follows")
    shutil.rmtree(store_url.removeprefix("file://"))
    shutil.rmtree(runtime / "buffers")
    with Daemon(runtime) as daemon, Rank(runtime, store_url) as rank:
        save(rank, 7)
        assert "another incarnation" in daemon.await_event("mirror_failed")["why"]
    assert steps_at(place_of(f"file://{mirror}", store_url)) == ["1.1"]
