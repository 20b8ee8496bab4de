"""Whatever a daemon or a command says, to whomever and however it fails: no secret is in it."""

from __future__ import annotations

import base64
import os
import urllib.request
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from called import Called, call
from ckptmgr.config import DaemonSettings
from ckptmgr.errors import CkptmgrError
from ckptmgr.repository.envelope import DataKey, Key
from ckptmgr.repository.keyring import KEY_COMMAND, KEY_FILE, SIGN_KEY_FILE, VERIFY_KEYS
from ckptmgr.repository.keyring import load_keyring as loaded
from ckptmgr.types import Outcome
from driven import Daemon, Rank
from rigged import Rig

TOKEN = "hunter2hunter2hunter2"
ENVIRONMENT = {
    "AWS_SECRET_ACCESS_KEY": f"aws-{TOKEN}",
    "AWS_SESSION_TOKEN": f"session-{TOKEN}",
    "AZURE_STORAGE_ACCOUNT_KEY": f"azure-{TOKEN}",
    "GOOGLE_SERVICE_ACCOUNT_KEY": f"google-{TOKEN}",
}


class Hoard:
    """Secrets, in every form in which they might come out again."""

    def __init__(self, directory: Path) -> None:
        self.key = Key.of(os.urandom(32))
        self.private = Ed25519PrivateKey.generate()
        pem = self.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        public = self.private.public_key().public_bytes(
            Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
        )
        files = {"key": self.key.secret.hex().encode(), "sign": pem, "verify": public}
        for name, text in files.items():
            path = directory / name
            path.touch(mode=0o600)
            path.write_bytes(text)
        self.environment = {
            **ENVIRONMENT,
            KEY_FILE: str(directory / "key"),
            SIGN_KEY_FILE: str(directory / "sign"),
            VERIFY_KEYS: str(directory / "verify"),
        }
        self._forms = [TOKEN, *pem.decode().splitlines()[1:-1]]
        for secret in (self.key.secret, self.private.private_bytes_raw()):
            encoded = base64.b64encode(secret).decode().rstrip("=")
            self._forms += [secret.hex(), secret.hex().upper(), encoded, repr(secret)[2:-1]]

    def found_in(self, text: str) -> list[str]:
        return [form for form in self._forms if form in text]


@pytest.fixture
def hoard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hoard:
    found = Hoard(tmp_path)
    for name, value in found.environment.items():
        monkeypatch.setenv(name, value)
    return found


def said(called: Called) -> str:
    return called.out + called.err


def test_the_hoard_would_be_found(hoard: Hoard) -> None:
    for text in (str(hoard.key.secret), hoard.key.secret.hex(), f"url?sig={TOKEN}"):
        assert hoard.found_in(text)


def test_nothing_that_a_daemon_says_has_a_secret(
    hoard: Hoard, runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logs, status, metrics, failures of the store, a traceback of a fault, what it stores."""
    rig = Rig(tmp_path)
    monkeypatch.setenv("PYTHONPATH", rig.python_path)
    with Daemon(runtime, "--metrics-port=0") as daemon, Rank(runtime, rig.url) as rank:
        rank.save(1)
        assert rank.wait(1).outcome == Outcome.COMMITTED
        rig.obey(("put_new", "data/", "fault once"))
        rank.save(2)
        assert "ZeroDivisionError" in daemon.await_event("fault")["traceback"]
        rank.wait(2)
        with pytest.raises(CkptmgrError) as refused:
            Rank(runtime, f"s3://user:{TOKEN}@bucket/run")
        status = call("status", "--json", runtime=runtime)
        port = status.document["metrics_port"]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as reply:
            metrics = reply.read().decode()
        assert "ckptmgr_commits_total" in metrics
        cmdline = Path(f"/proc/{daemon.process.pid}/cmdline").read_text()
        everything = [
            daemon.log.read_text(),
            said(status),
            said(call("status", runtime=runtime)),
            metrics,
            cmdline,
            str(refused.value),
            repr(refused.value),
        ]
        assert daemon.end() == 0
    everything.append(daemon.log.read_text())
    assert [hoard.found_in(text) for text in everything] == [[]] * len(everything)
    stored = [path.read_bytes().decode("latin-1") for path in rig.path.rglob("*") if path.is_file()]
    assert len(stored) > 5
    assert not any(hoard.found_in(text) for text in stored)


def test_nothing_that_a_command_says_has_a_secret(
    hoard: Hoard, runtime: Path, store_url: str, tmp_path: Path
) -> None:
    """With --debug, too, where a traceback shows lines of code, and may show what they work on."""
    with Daemon(runtime), Rank(runtime, store_url) as rank:
        rank.save(1)
        assert rank.wait(1).outcome == Outcome.COMMITTED
    other = tmp_path / "other"
    other.touch(mode=0o600)
    other.write_text(os.urandom(32).hex())
    bad = tmp_path / "bad"
    bad.touch(mode=0o600)
    bad.write_text(f"{TOKEN}\n{hoard.key.secret.hex()}\n")
    calls = [
        call("show", store_url),
        call("--debug", "restore", store_url, "--to", tmp_path / "a", **{KEY_FILE: str(other)}),
        call("--debug", "verify", store_url, **{KEY_FILE: str(bad)}),
        call("--debug", "verify", store_url, **{KEY_FILE: "", KEY_COMMAND: f"sh -c {TOKEN}"}),
        call("--debug", "verify", store_url, **{KEY_FILE: "", KEY_COMMAND: f"echo {TOKEN}"}),
        call("--debug", "ls", f"s3://bucket/run?X-Amz-Signature={TOKEN}"),
        call("--debug", "daemon", runtime=tmp_path / "r", **{SIGN_KEY_FILE: str(bad)}),
    ]
    assert [one.status != 0 for one in calls] == [False, *[True] * 6]
    assert all("Traceback" in one.err for one in calls[1:])
    for one in calls:
        assert hoard.found_in(said(one)) == [], one


def test_no_text_of_anything_that_holds_a_secret_has_it(hoard: Hoard) -> None:
    keyring = loaded(os.environ)
    settings = DaemonSettings.from_env(auto=False)
    data_key = DataKey(hoard.key.secret)
    for one in (keyring, settings, keyring.encrypting, keyring.signer, data_key):
        assert hoard.found_in(f"{one} {one!r} {[one]}") == []
