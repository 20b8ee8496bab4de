"""Daemons and commands with keys: everything is as without, and nothing stored can be read."""

from __future__ import annotations

import os
import shutil
import signal
import struct
from pathlib import Path

import pytest

from asking import load
from called import call
from ckptmgr.errors import WrongKeyError
from ckptmgr.present import status_lines
from ckptmgr.repository.keyring import KEY_FILE, SIGN_KEY_FILE, VERIFY_KEYS
from ckptmgr.staging.control import Load
from ckptmgr.staging.launch import connect
from ckptmgr.store.mirrored import place_of
from ckptmgr.types import Outcome
from crash.content import MARK
from driven import PATIENCE_SECONDS, Daemon, Rank, ranks, until
from rigged import Rig
from security.forged import OTHER, OURS

SEEN = struct.pack("<Q", MARK)
"""In every block of what these ranks save."""


def key_file(directory: Path, *secrets: bytes) -> str:
    path = directory / f"key.{secrets[0][:2].hex()}"
    path.touch(mode=0o600)
    path.write_text("".join(f"{secret.hex()}\n" for secret in secrets))
    return str(path)


@pytest.fixture
def keyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A key that every daemon and command started from here on has."""
    path = key_file(tmp_path, OURS.secret)
    monkeypatch.setenv(KEY_FILE, path)
    return path


def blocks_in(root: Path) -> int:
    """Blocks of a state that can be seen below a directory."""
    return sum(path.read_bytes().count(SEEN) for path in root.rglob("*") if path.is_file())


def save(rank: Rank, *steps: int) -> None:
    for step in steps:
        rank.save(step)
        assert rank.wait(step).outcome == Outcome.COMMITTED


def steps_of(daemon: Daemon, event: str) -> list[str]:
    return [one["step"] for one in daemon.events(event)]


@pytest.mark.timeout(900)  # a dozen processes, on a machine that may be busy
def test_save_mirror_retire_restore_load_and_the_commands(
    runtime: Path, store_url: str, keyed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, mirror = Path(store_url.removeprefix("file://")), tmp_path / "mirror"
    monkeypatch.setenv("CKPTMGR_MIRROR", f"file://{mirror}")
    place = Path(place_of(f"file://{mirror}", store_url).removeprefix("file://"))
    with Daemon(runtime) as daemon, Rank(runtime, store_url, keep=2) as rank:
        save(rank, 1, 2, 3)
        assert daemon.await_event("retired")["step"] == "1.1"
        for step in (2, 3):  # the newest goes first
            until((place / f"commit/00000001/{step:012d}").exists, "the mirror follows")
        state = daemon.status()
    assert state["jobs"][0]["key"] == OURS.id
    assert any(f"encrypted with key {OURS.id}" in line for line in status_lines(state))
    assert daemon.events("verified")
    packs = sorted(path.relative_to(store) for path in (store / "data").rglob("*.pack"))
    assert all((place / one).read_bytes() == (store / one).read_bytes() for one in packs)
    assert blocks_in(store) == blocks_in(mirror) == 0
    shutil.rmtree(runtime / "buffers")
    with Daemon(runtime) as daemon, Rank(runtime, store_url) as rank:
        daemon.await_event("prefetched")
        came = rank.restore()
        assert (came.step, came.source, came.skipped) == (3, "store", ())
        with connect(runtime) as client:
            assert load(client, Load(store_url, step=2), PATIENCE_SECONDS).step == 2
    monkeypatch.delenv("CKPTMGR_MIRROR")
    found = call("verify", store_url, "--all")
    assert found.status == 0
    assert "not checked" not in found.out
    assert call("ls", store_url, "--json").document[0]["tags"] == {"attempt": 1, "step": 3}
    assert call("restore", store_url, "--to", tmp_path / "out").status == 0
    assert blocks_in(tmp_path / "out") > 0
    without_a_key(store_url, tmp_path, monkeypatch)


def without_a_key(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs none works; everything else says which one it wants."""
    refused = call("restore", url, "--to", tmp_path / "none", CKPTMGR_KEY_FILE="")
    assert refused.status == 2
    assert f"was encrypted with key {OURS.id}, and no key is given" in refused.err
    assert not (tmp_path / "none").exists()
    other = key_file(tmp_path, OTHER.secret)
    refused = call("restore", url, "--to", tmp_path / "none", CKPTMGR_KEY_FILE=other)
    assert refused.status == 2
    assert f"was encrypted with key {OURS.id}, given {OTHER.id}" in refused.err
    monkeypatch.delenv(KEY_FILE)
    found = call("verify", url, "--all")
    assert found.status == 0
    assert found.out.count("not checked") == 1, "once for all steps"
    assert f"not checked in what key {OURS.id} encrypts: that they were encrypted" in found.out
    assert call("ls", url, "--json").document[0]["tags"] == {}
    assert call("gc", url, "--keep", "2", "--json").status == 0


def test_a_daemon_with_another_key_says_so_and_gives_nothing_up(
    runtime: Path, store_url: str, keyed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Daemon(runtime), Rank(runtime, store_url) as rank:
        save(rank, 1)
    shutil.rmtree(runtime / "buffers")
    rotated = key_file(tmp_path, OTHER.secret)
    monkeypatch.setenv(KEY_FILE, rotated)
    with (
        Daemon(runtime),
        Rank(runtime, store_url) as rank,
        pytest.raises(WrongKeyError, match=f"key {OURS.id}, given {OTHER.id}"),
    ):
        rank.restore()
    (tmp_path / "both").mkdir()
    both = key_file(tmp_path / "both", OTHER.secret, OURS.secret)
    monkeypatch.setenv(KEY_FILE, both)
    with Daemon(runtime), Rank(runtime, store_url) as rank:
        assert rank.restore().step == 1, "the former key reads"
        save(rank, 2)
    listed = call("ls", store_url, "--json", CKPTMGR_KEY_FILE=rotated)
    assert listed.document[0]["tags"] == {"attempt": 3, "step": 2}, "the first key encrypts"


def test_a_spool_is_encrypted_and_drained_by_the_next_daemon(
    runtime: Path, tmp_path: Path, keyed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path)
    monkeypatch.setenv("PYTHONPATH", rig.python_path)
    monkeypatch.setenv("CKPTMGR_SPOOL", str(tmp_path / "spool"))
    monkeypatch.setenv("CKPTMGR_SPOOL_SECONDS", "1")
    with Daemon(runtime) as daemon:
        with Rank(runtime, rig.url) as rank:
            save(rank, 1)
            rig.obey(("*", "", "dead"))
            rank.save(2)
            # On a busy machine the first one may have taken this way, too.
            until(lambda: "1.2" in steps_of(daemon, "spooled"), "the second one is in the spool")
        daemon.end(signal.SIGKILL)
    assert list((tmp_path / "spool").rglob("*.pack"))
    assert blocks_in(tmp_path / "spool") == 0
    shutil.rmtree(runtime / "buffers")
    rig.obey()
    with Daemon(runtime) as daemon:
        until(lambda: "1.2" in steps_of(daemon, "drained_step"), "it is drained")
        with Rank(runtime, rig.url) as rank:
            assert rank.restore().step == 2


def test_ranks_whose_hosts_have_different_keys_commit_nothing(
    runtime: Path, store_url: str, keyed: str, tmp_path: Path
) -> None:
    """A step that nobody could read whole is given up, and says why."""
    hosts = runtime / "h0", runtime / "h1"
    for host in hosts:
        host.mkdir(mode=0o700)
    other = {**os.environ, KEY_FILE: key_file(tmp_path, OTHER.secret)}
    with Daemon(hosts[0]), Daemon(hosts[1], environment=other), ranks(store_url, *hosts) as found:
        for rank in found:
            rank.save(1)
        waited = found[0].wait(1)
        assert waited.outcome == Outcome.ABORTED
        assert "was encrypted with key" in waited.why
    with Daemon(hosts[0]), Daemon(hosts[1]), ranks(store_url, *hosts) as found:
        for rank in found:
            rank.save(2)
        assert [rank.wait(2).outcome for rank in found] == [Outcome.COMMITTED] * 2


def test_signed_commits_of_a_daemon_are_read_by_who_trusts_it(
    runtime: Path, store_url: str, keyed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
    )

    private = Ed25519PrivateKey.generate()
    sign, trusted = tmp_path / "sign", tmp_path / "trusted"
    sign.touch(mode=0o600)
    sign.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    pem = Ed25519PrivateKey.generate().public_key().public_bytes
    trusted.write_bytes(pem(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    trusted.chmod(0o644)
    with Daemon(runtime), Rank(runtime, store_url) as rank:
        save(rank, 1)
    monkeypatch.setenv(SIGN_KEY_FILE, str(sign))
    with Daemon(runtime), Rank(runtime, store_url) as rank:
        assert rank.restore().step == 1
        save(rank, 2)
    monkeypatch.delenv(SIGN_KEY_FILE)
    monkeypatch.setenv(VERIFY_KEYS, str(trusted))
    refused = call("restore", store_url, "--to", tmp_path / "a")
    assert (refused.status, "is not signed" in refused.err) == (3, True)
    with trusted.open("ab") as file:
        public = private.public_key().public_bytes
        file.write(public(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    shutil.rmtree(runtime / "buffers")
    with Daemon(runtime), Rank(runtime, store_url) as rank:
        assert rank.restore().step == 2
        rank.save(3)
        waited = rank.wait(3)
        assert (waited.outcome, "is not signed" in waited.why) == (Outcome.ABORTED, True)
    taken = call("restore", store_url, "--to", tmp_path / "b", "--json")
    assert (taken.status, taken.document["id"]) == (0, "2.2")
