"""Stores over a network, for the suites that run on each of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from stores.places import Places


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    """Servers that are started when they are first needed, and run until the end."""
    with Places(tmp_path_factory.mktemp("places")) as made:
        yield made
