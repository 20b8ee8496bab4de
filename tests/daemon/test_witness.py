"""A copy of a commit that can not be put: the step is committed, and the log says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from driven import Daemon, Rank, until
from rigged import Rig


@pytest.mark.parametrize(
    ("rule", "why"), [("refuse", "is refused by the test"), ("hold", "was not done in 5 s")]
)
def test_a_commit_without_its_copy(runtime: Path, rig: Rig, rule: str, why: str) -> None:
    rig.obey(("put_new", "tags/", rule))
    with (
        Daemon(runtime, environment=rig.environment()) as daemon,
        Rank(runtime, rig.url) as rank,
    ):
        rank.save(1)
        rank.wait(1)
        (told,) = until(lambda: daemon.events("witness_failed"), "the copy is told of")
        rig.obey()
    assert (told["code"], told["step"]) == ("CKM1303", "1.1")
    assert why in told["why"]
