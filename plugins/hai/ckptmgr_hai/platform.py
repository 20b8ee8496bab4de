"""What a job tells the HAI platform, by hfai.client where that is installed."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any

ACKNOWLEDGE_MILLISECONDS = 500
"""hfai's own default for `receive_suspend_command`."""

STATE_MAX = (1 << 31) - 1
"""The whole-life state is an int of 32 bits."""


class Platform:
    """The client of the platform; without it the platform is heard, and not answered."""

    def __init__(self) -> None:
        try:
            self._client: Any = importlib.import_module("hfai.client")
        except ImportError:
            self._client = None

    def acknowledge(self) -> bool:
        """Say that the suspension was seen, which doubles the time; whether it was said."""
        if self._client is None:
            return False
        return bool(self._client.receive_suspend_command(timeout=ACKNOWLEDGE_MILLISECONDS))

    def carry(self, step: int) -> None:
        """Let the next task of this job know the last step; a hint, and no more."""
        if self._client is not None and step <= STATE_MAX:
            self._client.set_whole_life_state(step)

    def suspend(self) -> None:
        """Say that the job can be ended. On the platform this does not return."""
        if self._client is not None:
            self._client.go_suspend()


def carried_step(environment: Mapping[str, str] | None = None) -> int:
    """The step that the task before this one carried over, 0 where it carried none.

    Only a hint: what is restored is decided by the store and the memory of the hosts.
    """
    text = (os.environ if environment is None else environment).get("MARSV2_WHOLE_LIFE_STATE", "")
    return int(text) if text.isdecimal() and int(text) <= STATE_MAX else 0
