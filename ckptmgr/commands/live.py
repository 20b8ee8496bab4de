"""`status --watch`: the state of the daemon on a whole terminal, anew every second."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from typing import Any

from ckptmgr import foreground, present
from ckptmgr.errors import DaemonError, UsageError

LOOK_SECONDS = 1.0

State = dict[str, Any]


def watch_status(ask: Callable[[], State], *, as_json: bool) -> None:
    """Show what `ask` tells until Ctrl-C, whose exit status is 130 as with every command.

    A daemon that ends meanwhile is waited for: another one may be started in its place.

    Raises:
        UsageError: nobody looks at a terminal.
        DaemonError: there is no daemon at the start.
    """
    if as_json or not present.is_terminal(sys.stdout):
        raise UsageError(
            "needs a terminal, and no --json",
            subject="--watch",
            hint="A script calls `ckptmgr status --json` as often as it likes.",
        )
    foreground.run(_watch(ask, ask()), lambda: None)


async def _watch(ask: Callable[[], State], state: State) -> None:
    from rich.console import Console
    from rich.live import Live

    seen_at, why = time.time(), ""
    console = Console(markup=False, highlight=False, emoji=False)
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(_shown(state, seen_at, why, console.size.height), refresh=True)
            await asyncio.sleep(LOOK_SECONDS)
            try:
                state, seen_at, why = await asyncio.to_thread(ask), time.time(), ""
            except DaemonError as error:
                why = error.message


def _shown(state: State, seen_at: float, why: str, height: int) -> Any:
    """One screen: each line cut at the width of the terminal, and what is too much is counted."""
    from rich.text import Text

    clock = time.strftime("%H:%M:%S", time.localtime(seen_at))
    head = f"{clock}  {why}; this is what it said last" if why else clock
    lines = [head, *present.status_lines(state)]
    if len(lines) > height:
        more = len(lines) - height + 1
        lines = [*lines[: height - 1], f"... {more} more lines: see `ckptmgr status`"]
    text = Text(no_wrap=True, overflow="ellipsis")
    for number, line in enumerate(lines):
        text.append("\n" if number else "")
        text.append(present.printable(line), style=_style(line, lost=not number and bool(why)))
    return text


def _style(line: str, *, lost: bool) -> str:
    """Colour only where something is wrong."""
    wrong = ("failing: ", "SUPERSEDED", ", FULL")
    return "red" if lost or any(word in line for word in wrong) else ""
