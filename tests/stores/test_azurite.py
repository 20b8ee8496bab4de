"""The whole product on Azure's blobs, as its emulator serves them.

The promises of the store itself are tested in tests/objectstore/test_azure.py.
"""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from servers.azurite import make_container, start_or_skip
from stores.product import pass_over
from stores.rows import row

pytestmark = row("az:// on Azurite")


def test_the_whole_product(runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with start_or_skip() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        container = f"test-{secrets.token_hex(6)}"
        make_container(environment["AZURE_STORAGE_ENDPOINT"], container)
        pass_over(f"az://{container}/run", runtime, tmp_path)
