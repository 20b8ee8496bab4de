"""The keys that a process was given: from files, systemd credentials or a command, never an URL."""

from __future__ import annotations

import os
import re
import shlex
import stat
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ckptmgr.errors import LockedError, UsageError, WrongKeyError
from ckptmgr.repository.envelope import Envelope, Key, check_library
from ckptmgr.repository.signature import Signer, Trusted, parse_signer, parse_trusted

KEY_FILE, KEY_COMMAND = "CKPTMGR_KEY_FILE", "CKPTMGR_KEY_COMMAND"
SIGN_KEY_FILE, VERIFY_KEYS = "CKPTMGR_SIGN_KEY_FILE", "CKPTMGR_VERIFY_KEYS"
TAKE_CLEAR = "CKPTMGR_TAKE_CLEAR"
CREDENTIALS = {
    KEY_FILE: "ckptmgr.key",
    SIGN_KEY_FILE: "ckptmgr.sign",
    VERIFY_KEYS: "ckptmgr.verify",
}
"""Names of systemd credentials that are used where the variable is not set."""

COMMAND_SECONDS_MAX = 60.0
"""A vault answers in a second; a command that asks a person has no business in a daemon."""

FILE_BYTES_MAX = 64 << 10
"""A key is a line of 64 digits, a public one three lines."""


@dataclass(frozen=True, slots=True)
class Keyring:
    """What a process was given: `encrypting` seals what it writes, `known` opens what it reads.

    `trusted` are public keys, one of which must have signed a commit; None trusts every commit.
    Without `take_clear`, whoever has keys takes no part that is not encrypted.
    """

    encrypting: Key | None = None
    known: Mapping[str, Key] = field(default_factory=dict)
    signer: Signer | None = None
    trusted: Trusted | None = None
    take_clear: bool = False

    @property
    def refuses_clear(self) -> bool:
        """Whether what is not encrypted is not taken: anybody could have put it."""
        return bool(self.known) and not self.take_clear

    @property
    def vouching(self) -> Trusted | None:
        """Public keys, one of which must have signed a part that no commit names yet; None takes
        every part. Who signs a COMMIT vouches for all that it names, trusted keys given or not.
        """
        if self.trusted is None and self.signer is not None:
            return {self.signer.id: self.signer.public}
        return self.trusted

    def key_of(self, envelope: Envelope, *, subject: str) -> Key:
        """The key that opens an envelope.

        Raises:
            LockedError: no key was given.
            WrongKeyError: only others were.
        """
        found = self.known.get(envelope.key)
        if found is not None:
            return found
        if not self.known:
            raise LockedError(
                f"was encrypted with key {envelope.key}, and no key is given", subject=subject
            )
        given = ", ".join(self.known)
        raise WrongKeyError(
            f"was encrypted with key {envelope.key}, given {given}", subject=subject
        )


NO_KEYS = Keyring()

CLEAR = "is not encrypted, though a key is given"
CLEAR_HINT = f"Set {TAKE_CLEAR}=1 if it is from before the job was encrypted."


def keyring_of(*keys: Key) -> Keyring:
    """A keyring whose first key encrypts."""
    return Keyring(keys[0], {key.id: key for key in keys})


def load_keyring(environment: Mapping[str, str]) -> Keyring:
    """What the environment of a daemon or of a command names.

    Raises:
        UsageError: it can not be read, others can read it, or it holds no keys. No message has
            anything of what it holds.
    """
    sources = {name: _path_of(environment, name) for name in CREDENTIALS}
    command = environment.get(KEY_COMMAND)
    if command and environment.get(KEY_FILE):
        raise UsageError(f"and {KEY_FILE} are both set", subject=KEY_COMMAND)
    if not command and not any(sources.values()):
        return NO_KEYS
    check_library()
    keys: tuple[Key, ...] = ()
    if command:
        keys = parse_keys(_told_by(command), subject=KEY_COMMAND)
    elif (path := sources[KEY_FILE]) is not None:
        keys = parse_keys(read_secret(path), subject=str(path))
    signer = None
    if (path := sources[SIGN_KEY_FILE]) is not None:
        signer = parse_signer(read_secret(path), subject=str(path))
    trusted = None
    if (path := sources[VERIFY_KEYS]) is not None:
        trusted = parse_trusted(_read(path), subject=str(path))
        if signer is not None:
            trusted = {**trusted, signer.id: signer.public}
    return Keyring(
        keys[0] if keys else None,
        {key.id: key for key in keys},
        signer,
        trusted,
        environment.get(TAKE_CLEAR) == "1",
    )


def _path_of(environment: Mapping[str, str], name: str) -> Path | None:
    if text := environment.get(name):
        if not text.startswith("/"):
            raise UsageError(f"{text!r} is not an absolute path", subject=name)
        return Path(text)
    directory = environment.get("CREDENTIALS_DIRECTORY")
    path = Path(directory) / CREDENTIALS[name] if directory else None
    try:
        return path if path is not None and path.exists() else None
    except PermissionError as error:  # one may be there: nothing is written in clear by mistake
        raise UsageError(f"can not be read: {error.strerror}", subject=str(path)) from error


def parse_keys(text: bytes, *, subject: str) -> tuple[Key, ...]:
    """Keys, one a line of 64 hex digits; empty lines and lines that start with # are left out.

    Raises:
        UsageError: a line is something else, or there is none.
    """
    keys = []
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip()
        if not stripped or stripped.startswith(b"#"):
            continue
        if not re.fullmatch(rb"[0-9A-Fa-f]{64}", stripped):
            raise UsageError(
                f"has no key of 64 hex digits in line {number}",
                subject=subject,
                hint="Make one with `openssl rand -hex 32`.",
            )
        keys.append(Key.of(bytes.fromhex(stripped.decode())))
    if not keys:
        raise UsageError(
            "holds no key", subject=subject, hint="Make one with `openssl rand -hex 32`."
        )
    return tuple(keys)


def read_secret(path: Path) -> bytes:
    """What a file holds that only its owner (and perhaps his group) can read.

    Raises:
        UsageError: others can read it, or anybody else can write it, or it can not be read.
    """
    return _read(path, private=True)


def _read(path: Path, *, private: bool = False) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise UsageError("is not a file", subject=str(path))
            _check_writers(found, path, private=private)
            text = os.read(fd, FILE_BYTES_MAX + 1)
        finally:
            os.close(fd)
    except OSError as error:
        raise UsageError(f"can not be read: {error.strerror}", subject=str(path)) from error
    if len(text) > FILE_BYTES_MAX:
        raise UsageError("is too long to hold keys", subject=str(path))
    return text


def _check_writers(found: os.stat_result, path: Path, *, private: bool) -> None:
    """Who can write a file of public keys decides who is trusted; who can read a secret has it."""
    forbidden = stat.S_IRWXO | stat.S_IWGRP if private else stat.S_IWOTH | stat.S_IWGRP
    if found.st_uid not in (0, os.getuid()):
        raise UsageError("belongs to another user", subject=str(path))
    if found.st_mode & forbidden:
        can = "read or write" if private else "write"
        raise UsageError(
            f"can be {'read or ' if private else ''}written by others",
            subject=str(path),
            hint=f"Let nobody else {can} it: chmod {600 if private else 644}.",
        )


def _told_by(command: str) -> bytes:
    """What a command prints. Nothing of it, nor of its complaints, goes anywhere else."""
    hint = "Run it by hand: it must print keys as a key file has them."
    try:
        done = subprocess.run(
            shlex.split(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=COMMAND_SECONDS_MAX,
            check=False,
        )
    except subprocess.TimeoutExpired:
        why = f"did not end in {COMMAND_SECONDS_MAX:g} s"
    except (OSError, ValueError):  # the text of either may hold the command, and so its arguments
        why = "can not be run"
    else:
        if done.returncode == 0:
            return done.stdout
        why = f"ended with status {done.returncode}"
    raise UsageError(why, subject=KEY_COMMAND, hint=hint)
