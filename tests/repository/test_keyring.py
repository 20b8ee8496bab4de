"""Keys come from files, credentials and commands, and leave by no message."""

from __future__ import annotations

import builtins
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from ckptmgr.errors import UsageError
from ckptmgr.repository import keyring
from ckptmgr.repository.envelope import Key
from ckptmgr.repository.keyring import (
    CREDENTIALS,
    KEY_COMMAND,
    KEY_FILE,
    NO_KEYS,
    SIGN_KEY_FILE,
    TAKE_CLEAR,
    VERIFY_KEYS,
    load_keyring,
    parse_keys,
)
from processes import needs_root

SECRET, FORMER = bytes(range(32)).hex(), bytes(range(1, 33)).hex()


def written(path: Path, text: str, mode: int = 0o600) -> str:
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_without_a_source_there_are_no_keys() -> None:
    assert load_keyring({}) is NO_KEYS
    assert load_keyring({"CREDENTIALS_DIRECTORY": "/nowhere"}) is NO_KEYS


def test_the_first_key_encrypts_and_all_read(tmp_path: Path) -> None:
    path = written(tmp_path / "key", f"# since May\n{SECRET}\n\n  {FORMER.upper()}  \n")
    found = load_keyring({KEY_FILE: path})
    assert found.encrypting == Key.of(bytes.fromhex(SECRET))
    assert list(found.known) == [Key.of(bytes.fromhex(one)).id for one in (SECRET, FORMER)]
    assert not found.take_clear
    assert load_keyring({KEY_FILE: path, TAKE_CLEAR: "1"}).take_clear


def test_a_systemd_credential_is_a_key_file(tmp_path: Path) -> None:
    written(tmp_path / CREDENTIALS[KEY_FILE], SECRET, 0o400)
    found = load_keyring({"CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert found.encrypting == Key.of(bytes.fromhex(SECRET))


def test_credentials_that_can_not_be_looked_at_are_not_taken_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container where systemd can not hand them to the user of the unit."""

    def denied(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", denied)
    with pytest.raises(UsageError, match=r"ckptmgr\.key: can not be read: Permission denied"):
        load_keyring({"CREDENTIALS_DIRECTORY": str(tmp_path)})


def test_a_command_prints_what_a_key_file_holds(tmp_path: Path) -> None:
    script = tmp_path / "vault.py"
    script.write_text(f"print({SECRET!r})")
    found = load_keyring({KEY_COMMAND: f"{sys.executable} '{script}'"})
    assert found.encrypting == Key.of(bytes.fromhex(SECRET))


def test_ids_are_stable_and_tell_nothing() -> None:
    key = Key.of(bytes.fromhex(SECRET))
    assert key.id == "4fdc8309342fec62"
    assert SECRET not in repr(key)
    assert repr(key.secret) not in repr(key)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "holds no key"),
        ("# nothing\n", "holds no key"),
        (f"{SECRET}\nhunter2\n", "line 2"),
        (SECRET[:-1], "line 1"),
        (SECRET + "00", "line 1"),
    ],
)
def test_a_file_of_something_else_is_refused_without_a_word_of_it(text: str, wrong: str) -> None:
    with pytest.raises(UsageError, match=wrong) as refused:
        parse_keys(text.encode(), subject="file")
    assert "hunter2" not in str(refused.value)
    assert SECRET[:16] not in str(refused.value)


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o620, 0o666])
@pytest.mark.parametrize("name", [KEY_FILE, SIGN_KEY_FILE])
def test_a_secret_that_others_reach_is_refused(tmp_path: Path, mode: int, name: str) -> None:
    path = written(tmp_path / "key", SECRET, mode)
    with pytest.raises(UsageError, match="read or written by others"):
        load_keyring({name: path})


def test_public_keys_may_be_read_but_not_written_by_others(tmp_path: Path) -> None:
    path = written(tmp_path / "public", "nothing", 0o664)
    with pytest.raises(UsageError, match="can be written by others"):
        load_keyring({VERIFY_KEYS: path})
    Path(path).chmod(0o644)
    with pytest.raises(UsageError, match="no public key"):
        load_keyring({VERIFY_KEYS: path})


@pytest.mark.root
def test_a_secret_of_another_user_is_refused(tmp_path: Path) -> None:
    needs_root()
    path = written(tmp_path / "key", SECRET)
    os.chown(path, 65534, -1)
    with pytest.raises(UsageError, match="belongs to another user"):
        load_keyring({KEY_FILE: path})


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, wrong in (
        (tmp_path / "pipe", "is not a file"),
        (tmp_path, "is not a file"),
        (tmp_path / "none", "can not be read"),
    ):
        with pytest.raises(UsageError, match=wrong):
            load_keyring({KEY_FILE: str(path)})
    with pytest.raises(UsageError, match="absolute"):
        load_keyring({KEY_FILE: "key"})
    with pytest.raises(UsageError, match="too long"):
        load_keyring({KEY_FILE: written(tmp_path / "long", SECRET * 2000)})


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("false --token hunter2", "status 1"),
        ("/does/not/exist --token hunter2", "can not be run"),
        ("sh 'hunter2", "can not be run"),
        ("echo hunter2", "line 1"),
        ("sh -c 'echo hunter2 >&2; exit 3'", "status 3"),
    ],
)
def test_a_command_that_fails_says_nothing_of_itself(
    command: str, wrong: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match=wrong) as refused:
        load_keyring({KEY_COMMAND: command})
    assert "hunter2" not in str(refused.value)
    assert "hunter2" not in "".join(capfd.readouterr())


def test_a_command_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyring, "COMMAND_SECONDS_MAX", 0.2)
    with pytest.raises(UsageError, match="did not end"):
        load_keyring({KEY_COMMAND: "sleep 600"})


def test_two_sources_are_one_too_many(tmp_path: Path) -> None:
    path = written(tmp_path / "key", SECRET)
    with pytest.raises(UsageError, match="both set"):
        load_keyring({KEY_FILE: path, KEY_COMMAND: "true"})


def test_keys_without_the_library_are_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "cryptography":
            raise ImportError(name)
        return really(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError) as refused:
        load_keyring({KEY_FILE: written(tmp_path / "key", SECRET)})
    assert "ckptmgr[encryption]" in refused.value.hint
    assert load_keyring({}) is NO_KEYS
