"""A trainer that is interrupted at one instant after the other; it exits with 1 if a try hangs.

`python interrupted_process.py traced FIRST STRIDE`: KeyboardInterrupt at every STRIDE-th
instruction of the training thread in the code that hands leaves over, from the FIRST-th on.
`python interrupted_process.py signals TRIES`: SystemExit out of a signal handler, again and again,
from a later instant in each try.
Prints one line of JSON: tries, tries that were interrupted, snapshots that were sealed, and faults.
"""

from __future__ import annotations

import copy
import dis
import faulthandler
import json
import secrets
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn

from ckptmgr.rank import capture as capture_module
from ckptmgr.rank import overlap
from ckptmgr.rank.capture import Capture, Copy
from ckptmgr.rank.place import rebuild
from ckptmgr.staging.hostbuffer import HostBuffer
from rank.shape import difference
from rank.slot import buffer_for, read

TRY_SECONDS_MAX = 30.0
OWN = {overlap.__file__, capture_module.__file__}
CALLS = {dis.opmap[name] for name in ("CALL", "CALL_FUNCTION_EX", "CALL_KW") if name in dis.opmap}
SIGNAL_STEP_SECONDS, SIGNAL_AGAIN_SECONDS = 0.00002, 0.003


class Trainer:
    """One small state, and what a training loop does with it."""

    def __init__(self, width: int) -> None:
        self.net = nn.Linear(width, width)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.5)
        self.counter = torch.zeros(3)
        self.state = {"net": self.net, "optimizer": self.optimizer, "counter": self.counter}
        self.step()
        self.capture = Capture(self.state, rng=False, overlap=True)

    def step(self) -> None:
        """Change every tensor."""
        for parameter in self.net.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        self.counter += 1

    def values(self) -> dict[str, Any]:
        """The state, cloned."""
        return copy.deepcopy(
            {
                "net": self.net.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "counter": self.counter,
            }
        )

    def snapshot(self, buffer: HostBuffer) -> Copy:
        """Start a snapshot in slot 0, which is sealed once it is whole."""
        prepared = self.capture.prepare()
        writer = buffer.begin(0)

        def done(error: BaseException | None) -> None:
            if error is None:
                writer.seal(
                    attempt=1,
                    nonce=secrets.token_hex(16),
                    rank=0,
                    world=1,
                    step=int(self.counter[0]),
                    layout=prepared.layout_bytes,
                    layout_hash=prepared.layout_hash,
                    values=prepared.values,
                    tags={},
                    data_bytes=prepared.data_bytes,
                    stall_seconds=0.0,
                )

        return self.capture.copy(prepared, writer.data, done)

    def block(self, buffer: HostBuffer) -> None:
        """What may be interrupted."""
        handle = self.snapshot(buffer)
        self.step()
        handle.wait()
        self.capture.close()


BLOCKS = {Trainer.block.__code__, Capture.close.__code__}
"""Only what runs in these is interrupted, and not the code that takes the interrupt."""

Interrupts = Callable[[int], Any]
"""A context manager that interrupts what is in it at the instant with this number."""


class Instants:
    """Raises at one instruction of the traced files, and remembers whether it came to that."""

    def __init__(self, number: int) -> None:
        self.left = number
        self.raised = False
        self.where = ""

    def enter(self, frame: FrameType, event: str, _: Any) -> Any:
        """Trace function of every call."""
        if frame.f_code.co_filename not in {*OWN, threading.__file__}:
            return None
        frame.f_trace_opcodes = True
        return self.instruction

    def instruction(self, frame: FrameType, event: str, _: Any) -> Any:
        """Trace function within the traced files."""
        if event == "opcode" and (frame.f_code.co_filename in OWN or after_a_call(frame)):
            self.left -= 1
            if self.left == 0:
                self.raised = True
                raise KeyboardInterrupt
        return self.instruction


def after_a_call(frame: FrameType) -> bool:
    """Whether signals are handled here: Python's own `with lock:` relies on that to be exact."""
    code = frame.f_code.co_code
    at = frame.f_lasti - 2
    while at > 0 and code[at] == dis.opmap["CACHE"]:
        at -= 2
    return code[at] in CALLS


@contextmanager
def traced(number: int) -> Iterator[Instants]:
    """One interrupt, at the instruction with this number."""
    instants = Instants(number)
    sys.settrace(instants.enter)
    try:
        yield instants
    finally:
        sys.settrace(None)


@contextmanager
def signalled(number: int) -> Iterator[Instants]:
    """A signal after so many steps of time, and then again and again."""
    instants = Instants(number)

    def interrupt(_: int, frame: FrameType | None) -> None:
        here = frame
        while frame is not None and frame.f_code not in BLOCKS:
            frame = frame.f_back
        if frame is None:
            return
        instants.raised = True
        instants.where = "".join(traceback.format_stack(here, 6))
        raise SystemExit(143)

    def ignored(unraisable: Any) -> None:
        """Python drops what is raised in a callback of a weak reference: nobody can hear of it."""
        assert unraisable.exc_type is SystemExit, unraisable
        instants.raised = False

    sys.unraisablehook = ignored
    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, number * SIGNAL_STEP_SECONDS, SIGNAL_AGAIN_SECONDS)
    try:
        yield instants
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class Story:
    """What all tries together have shown."""

    def __init__(self, interrupts: Interrupts, width: int) -> None:
        self.interrupts = interrupts
        self.width = width
        self.tries = self.interrupted = self.sealed = 0
        self.faults: list[str] = []

    def attempt(self, number: int) -> bool:
        """Interrupt one block, go on training, end; whether it was interrupted."""
        faulthandler.dump_traceback_later(TRY_SECONDS_MAX, exit=True)
        trainer = Trainer(self.width)
        before = trainer.values()
        with buffer_for(trainer.capture.prepare()) as buffer:
            raised = self._interrupted(lambda: trainer.block(buffer), number)
            self._interrupted(trainer.capture.close, 1 + number % 97)
            trainer.step()  # who catches the interrupt may go on
            trainer.capture.close()
            trainer.capture.close()
            self._check(buffer, before, f"{number}: the snapshot before the interrupt")
            before = trainer.values()
            handle = trainer.snapshot(buffer)
            trainer.step()
            handle.wait()
            if not self._check(buffer, before, f"{number}: the snapshot after it"):
                self.faults.append(f"{number}: no snapshot after it")
            trainer.capture.close()
        self.tries += 1
        self.interrupted += raised
        faulthandler.cancel_dump_traceback_later()
        return raised

    def _interrupted(self, block: Callable[[], None], number: int) -> bool:
        instants = None
        try:
            with self.interrupts(number) as instants:
                block()
        except (KeyboardInterrupt, SystemExit):
            return True
        except BaseException as error:
            self.faults.append(f"{number}: raised {error!r} instead of the interrupt")
        if instants is not None and instants.raised:
            self.faults.append(f"{number}: the interrupt was lost, raised in\n{instants.where}")
        return False

    def _check(self, buffer: HostBuffer, expected: Any, name: str) -> bool:
        if buffer.snapshot(0) is None:
            return False
        saved = read(buffer, 0)
        wrong = difference(dict(rebuild(saved)), expected)
        saved.data.release()
        if wrong:
            self.faults.append(f"{name} is torn: {wrong}")
        self.sealed += 1
        return True


def main() -> None:
    """Try instants; in traced mode until one comes after the end of the block."""
    kind, *numbers = sys.argv[1:]
    torch.set_num_threads(1)
    if kind == "traced":
        first, stride = map(int, numbers)
        story = Story(traced, width=4)
        while story.attempt(first):
            first += stride
    else:
        story = Story(signalled, width=700)  # the copy takes about as long as what is around it
        for number in range(1, int(numbers[0]) + 1):
            story.attempt(1 + number * 7919 % 300)
    print(json.dumps(vars(story) | {"interrupts": kind}))


if __name__ == "__main__":
    main()
