"""Azurite, an emulator of Azure's blobs, from the PATH or from where `make stores` puts it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from email.utils import formatdate

import pytest

from servers.ceph import free_port

ACCOUNT = "devstoreaccount1"
# Not a secret: every emulator has this one.
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
START_SECONDS_MAX = 180.0


@contextlib.contextmanager
def start_or_skip() -> Iterator[dict[str, str]]:
    """A running emulator, as the environment that leads to it."""
    beside = f"{sys.prefix}/node/node_modules/.bin"
    program = shutil.which("azurite-blob") or shutil.which("azurite-blob", path=beside)
    if program is None:
        pytest.skip("NO AZURITE: az:// is not checked in this run (npm install -g azurite)")
    port = free_port()
    options = ["--blobPort", str(port), "--silent", "--skipApiVersionCheck"]
    process = subprocess.Popen(
        [program, *options, "--inMemoryPersistence", "--disableTelemetry"],
        stdin=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + START_SECONDS_MAX
        while not _listens(port):
            assert time.monotonic() < deadline, "azurite does not start"
            time.sleep(0.05)
        yield {
            "AZURE_STORAGE_ENDPOINT": f"http://127.0.0.1:{port}/{ACCOUNT}",
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": KEY,
            "AZURE_ALLOW_HTTP": "true",
        }
    finally:
        process.kill()
        process.wait()


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def make_container(endpoint: str, name: str) -> None:
    """By a request that is signed here: the client makes no containers."""
    fields = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    lines = [*("PUT" + "\n" * 11).split("\n"), *(f"{key}:{fields[key]}" for key in sorted(fields))]
    text = "\n".join([*lines, f"/{ACCOUNT}/{ACCOUNT}/{name}", "restype:container"])
    digest = hmac.new(base64.b64decode(KEY), text.encode(), hashlib.sha256).digest()
    fields["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
    fields["Content-Length"] = "0"
    url = f"{endpoint}/{name}?restype=container"
    with urllib.request.urlopen(urllib.request.Request(url, method="PUT", headers=fields)):
        pass
