"""The command that gives up old steps, and the options that say which."""

from __future__ import annotations

import logging
import re
from typing import Annotated, Any

import typer

from ckptmgr import present
from ckptmgr.commands.app import Json, Url, command, out, with_store
from ckptmgr.config import BUDGET_BYTES
from ckptmgr.errors import DamageError, UsageError
from ckptmgr.keep import Keep

Last = Annotated[
    str,
    typer.Option(
        "--keep",
        help="The newest so many, at least 2; or a whole policy, as last=3,every=1000,hourly=24.",
    ),
]
Every = Annotated[
    int, typer.Option("--keep-every", help="The first step from each multiple of this on; 0 off.")
]
Hourly = Annotated[
    int, typer.Option("--keep-hourly", help="The newest of each of so many hours with a step.")
]
Daily = Annotated[
    int, typer.Option("--keep-daily", help="The newest of each of so many days with a step.")
]
Best = Annotated[
    list[str] | None,
    typer.Option("--keep-best", help="loss:min:3 keeps the 3 of lowest loss; may be repeated."),
]


def policy_of(keep: str, every: int, hourly: int, daily: int, best: list[str] | None) -> Keep:
    """The policy that the options make together.

    Raises:
        UsageError: one of them is not allowed, or two say different things.
    """
    if re.fullmatch("-[0-9]+|0+", keep):
        hint = "Give at least 1; the newest two commits stay in any case."
        raise UsageError(f"{keep} is not allowed", subject="--keep", hint=hint)
    base = Keep.of(keep)
    if not (every or hourly or daily or best):
        return base
    if base != Keep(base.last):
        raise UsageError(
            "give a whole policy to --keep, or the other --keep options, not both",
            hint="Write --keep 3 beside --keep-every, --keep-hourly, --keep-daily, --keep-best.",
        )
    return Keep(base.last, every, hourly, daily, tuple(best or ()))


@command
def gc(
    url: Url,
    keep: Last = "3",
    keep_every: Every = 0,
    keep_hourly: Hourly = 0,
    keep_daily: Daily = 0,
    keep_best: Best = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only tell, of every step, what and why.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Give up old steps and delete what unfinished ones left behind.

    A step stays if one of the --keep options wants it, if it is held, or if a running attempt
    resumed from it. One is given up only behind two newer ones, one of which was read back whole.
    What does not hold then is told, and the exit status is 3.
    """
    from ckptmgr.daemon import log
    from ckptmgr.daemon.readback import ReadBack
    from ckptmgr.daemon.retain import collect
    from ckptmgr.repository.budget import BufferPool

    policy = policy_of(keep, keep_every, keep_hourly, keep_daily, keep_best)

    log.configure(level=logging.WARNING)
    readback = ReadBack()

    async def use(catalog: Any) -> list[dict[str, Any]]:
        pool = BufferPool(BUDGET_BYTES)
        done = await collect(catalog, pool, policy, readback=readback, dry_run=dry_run)
        return [{**g.step.document(), "action": g.action, "why": g.why} for g in done]

    done = with_store(url, use)
    out(done, as_json, lambda: present.collected(done, dry_run=dry_run))
    if readback.found_damaged:
        steps = ", ".join(map(str, sorted(readback.found_damaged, reverse=True)))
        raise DamageError(
            f"read back, these steps do not hold: {steps}",
            subject=url,
            hint="Run `ckptmgr verify URL --all`; docs/runbook.md tells what to do.",
        )
