"""Marks of what only `make stores` runs."""

from __future__ import annotations

import pytest

from scale import STORES


def row(place: str) -> list[pytest.MarkDecorator]:
    """Counted below `place` in the table of docs/stores.md, and skipped by `make test`."""
    return [
        pytest.mark.stores(place=place),
        pytest.mark.skipif(not STORES, reason="runs under `make stores`"),
    ]
