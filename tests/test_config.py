"""Limits are refused where they can not be meant."""

from __future__ import annotations

import pytest

from ckptmgr.config import GBPS_MIN, DaemonSettings, checked_limit, checked_port, env_limit
from ckptmgr.errors import UsageError


def test_a_limit_is_none_or_a_rate() -> None:
    assert [checked_limit(gbps, "x") for gbps in (0, GBPS_MIN, 80.0)] == [0, GBPS_MIN, 80.0]
    for gbps in (-1.0, GBPS_MIN / 2, float("inf"), float("nan")):
        with pytest.raises(UsageError, match="not a limit in gigabits"):
            checked_limit(gbps, "x")


def test_a_port_is_one_or_any_or_none() -> None:
    assert [checked_port(number, "x") for number in (-1, 0, 9464.0, 65535)] == [-1, 0, 9464, 65535]


def test_limits_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTMGR_MAX_STORE_GBPS", "2.5")
    monkeypatch.setenv("CKPTMGR_MAX_D2H_GBPS", "fast")
    assert DaemonSettings.from_env(auto=False).max_store_gbps == 2.5
    with pytest.raises(UsageError, match="CKPTMGR_MAX_D2H_GBPS"):
        env_limit("CKPTMGR_MAX_D2H_GBPS")
    monkeypatch.delenv("CKPTMGR_MAX_STORE_GBPS")
    assert DaemonSettings.from_env(auto=False).max_store_gbps == 0.0
