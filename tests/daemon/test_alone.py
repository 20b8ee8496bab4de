"""One daemon on a runtime directory, and what it learns of those before it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptmgr.daemon.alone import Before, only_one
from ckptmgr.errors import DaemonError


@pytest.mark.parametrize(
    ("content", "before"),
    [
        (b"", Before(0, killed=False)),
        (b"1", Before(0, killed=True)),
        (b"runs 3\n", Before(3, killed=True)),
        (b"ended 3\n", Before(3, killed=False)),
        (b"runs 10\n\n", Before(10, killed=True)),
        (b"ended", Before(0, killed=True)),
    ],
)
def test_what_the_one_before_has_left(tmp_path: Path, content: bytes, before: Before) -> None:
    path = tmp_path / "lock"
    path.write_bytes(content)
    with only_one(path) as found:
        assert found == before
        after = Before(before.count + 1, killed=True)
        path.with_name("copy").write_bytes(path.read_bytes())
    with only_one(path.with_name("copy")) as found:
        assert found == after, "it was killed"
    with only_one(path) as found:
        assert found == Before(before.count + 1, killed=False)


def test_only_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with only_one(path), pytest.raises(DaemonError, match="another daemon"), only_one(path):
        pass
    with only_one(path) as found:
        assert found == Before(1, killed=False), "who was refused has left no note"
