"""What hfai.client promises to a job; whatever it says to the platform is a line in a file."""

from __future__ import annotations

import json
import os
import time


def _say(event: str, **what: object) -> None:
    line = json.dumps({"event": event, **what}).encode() + b"\n"
    said = os.open(os.environ["HFAI_SAID"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(said, line)
    os.close(said)


def receive_suspend_command(timeout: int = 500) -> bool:
    _say("acknowledged")
    return True


def set_whole_life_state(state: int) -> None:
    assert 0 <= state < 1 << 31
    _say("carried", step=state)


def go_suspend() -> None:
    _say("suspended")
    if os.environ.get("MARSV2_TASK_TYPE") == "training":
        while True:
            time.sleep(10)
