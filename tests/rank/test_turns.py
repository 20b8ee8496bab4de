"""Threads take turns; an exception out of a signal handler, wherever it lands, ends one."""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import Any

import pytest

from ckptmgr.rank import turns
from ckptmgr.rank.turns import Turns
from driven import PATIENCE_SECONDS, until
from rank.interrupted_process import after_a_call


def holding(line: Turns, said: list[str], name: str) -> tuple[threading.Thread, threading.Event]:
    """A thread that waits in line, and what ends its turn once that has begun."""
    end = threading.Event()

    def hold() -> None:
        said.append(name)
        assert end.wait(PATIENCE_SECONDS)

    before = len(line._line)
    thread = threading.Thread(target=line.take, args=(hold, PATIENCE_SECONDS))
    thread.start()
    until(lambda: len(line._line) > before, f"{name} waits")
    return thread, end


def test_turns_come_in_the_order_of_asking() -> None:
    line, said = Turns(), list[str]()
    started = [holding(line, said, name) for name in "abc"]
    for at, (thread, end) in enumerate(started):
        until(lambda at=at: said == list("abc"[: at + 1]), "the next one has its turn")
        end.set()
        thread.join()
    assert not line.is_taken


def test_one_that_is_waited_for_too_long_is_given_up() -> None:
    line, said = Turns(), list[str]()
    first, end = holding(line, said, "first")
    with pytest.raises(TimeoutError):
        line.take(lambda: said.append("second"), 0.05)
    assert not line.is_ours
    end.set()
    first.join()
    line.take(lambda: said.append("third"), 0.0)
    assert said == ["first", "third"]


def test_whoever_has_a_turn_is_known() -> None:
    line = Turns()
    assert line.take(lambda: (line.is_taken, line.is_ours), 0.0) == (True, True)
    assert (line.is_taken, line.is_ours) == (False, False)


class Interrupts:
    """Raises at one of the instants in turns.py at which Python handles signals."""

    def __init__(self, number: int) -> None:
        self.left = number

    def enter(self, frame: FrameType, event: str, _: Any) -> Any:
        """Trace function of every call."""
        if frame.f_code.co_filename != turns.__file__:
            return None
        frame.f_trace_opcodes = True
        return self.instruction

    def instruction(self, frame: FrameType, event: str, _: Any) -> Any:
        """Trace function in turns.py."""
        if event == "opcode" and after_a_call(frame):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self.instruction


@pytest.mark.parametrize("waits", [False, True])
def test_an_interrupt_at_any_instant_leaves_no_turn_behind(waits: bool) -> None:
    interrupted, number = 0, 0
    while interrupted == number:
        number += 1
        line, said = Turns(), list[str]()
        other = holding(line, said, "other") if waits else None
        interrupts, before = Interrupts(number), sys.gettrace()
        sys.settrace(interrupts.enter)
        try:
            line.take(lambda: None, 0.03)
        except KeyboardInterrupt:
            interrupted += 1
        except TimeoutError:
            assert waits
        finally:
            sys.settrace(before)
        assert len(line._line) == waits
        if other is not None:
            other[1].set()
            other[0].join()
    assert interrupted >= 4, "there are calls before, amid and after the turn"
