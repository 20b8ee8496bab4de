"""Azurite, Microsoft's emulator of Azure Blob Storage, on loopback. npm: azurite."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path

import pytest

ACCOUNT = "ckptmgrtest"
ACCOUNT_KEY = base64.b64encode(b"a key for tests, of no use elsewhere").decode()
API = "2021-08-06"
READY_SECONDS_MAX = 180.0


@dataclass(frozen=True)
class Azurite:
    """A running emulator."""

    port: int

    def environment(self) -> dict[str, str]:
        """The standard variables for clients of Azure."""
        return {
            "AZURE_STORAGE_ENDPOINT": f"http://127.0.0.1:{self.port}/{ACCOUNT}",
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": ACCOUNT_KEY,
            "AZURE_ALLOW_HTTP": "true",
        }

    def make_container(self, name: str) -> None:
        """Make a container, by a request with a shared key: clients of objects can not."""
        now = formatdate(usegmt=True)
        signed = [f"x-ms-date:{now}", f"x-ms-version:{API}", f"/{ACCOUNT}/{ACCOUNT}/{name}"]
        text = "\n".join(["PUT", *[""] * 11, *signed, "restype:container"])
        digest = hmac.digest(base64.b64decode(ACCOUNT_KEY), text.encode(), hashlib.sha256)
        headers = {
            "x-ms-date": now,
            "x-ms-version": API,
            "Content-Length": "0",
            "Authorization": f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}",
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("PUT", f"/{ACCOUNT}/{name}?restype=container", headers=headers)
        answer = connection.getresponse()
        told = answer.read()
        connection.close()
        assert answer.status == http.client.CREATED, f"{answer.status} {told!r}"


def needs_azurite() -> str:
    """The program, or a skip that says how to install it."""
    beside = Path(sys.prefix) / "node/node_modules/.bin"
    path = os.pathsep.join([str(beside), os.environ.get("PATH", "")])
    found = shutil.which("azurite-blob", path=path)
    if found is None:
        pytest.skip(f"AZURE NOT CHECKED: run `npm install --prefix {sys.prefix}/node azurite`")
    return found


@contextmanager
def azurite(program: str, place: Path) -> Iterator[Azurite]:
    """A new emulator; its blobs lie below `place`."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = int(one.getsockname()[1])
    command = [program, "--silent", "--blobHost", "127.0.0.1", "--blobPort", str(port)]
    command += ["--location", str(place), "--skipApiVersionCheck", "--disableTelemetry"]
    environment = {**os.environ, "AZURITE_ACCOUNTS": f"{ACCOUNT}:{ACCOUNT_KEY}"}
    with ExitStack() as stack:
        log = stack.enter_context((place / "azurite.log").open("wb"))
        process = stack.enter_context(
            subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        )
        stack.callback(process.kill)
        _await_port(port, process)
        yield Azurite(port)


def _await_port(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + READY_SECONDS_MAX
    while True:
        assert process.poll() is None, f"azurite ended with status {process.returncode}"
        try:
            socket.create_connection(("127.0.0.1", port), 1.0).close()
        except OSError:
            assert time.monotonic() < deadline, "azurite does not answer"
            time.sleep(0.1)
        else:
            return
