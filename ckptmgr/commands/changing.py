"""Commands that change a store."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ckptmgr import present
from ckptmgr.commands.app import Json, Url, command, out, with_store
from ckptmgr.config import BUDGET_BYTES
from ckptmgr.errors import UsageError


@command
def gc(
    url: Url,
    keep: Annotated[int, typer.Option(help="Committed steps to keep, at least 2.")] = 3,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell.")] = False,
    as_json: Json = False,
) -> None:
    """Give up old steps and delete what unfinished ones left behind."""
    from ckptmgr.daemon.retain import collect
    from ckptmgr.repository.budget import BufferPool

    if keep < 1:
        hint = "Give at least 1; the newest two commits stay in any case."
        raise UsageError(f"{keep} is not allowed", subject="--keep", hint=hint)

    async def use(catalog: Any) -> list[dict[str, Any]]:
        done = await collect(catalog, BufferPool(BUDGET_BYTES), keep, dry_run=dry_run)
        return [{**g.step.document(), "action": g.action, "why": g.why} for g in done]

    done = with_store(url, use)
    out(done, as_json, lambda: present.collected(done, dry_run=dry_run))


@command
def hold(
    url: Url,
    step: Annotated[str, typer.Argument(help="1200, or 3.1200 for attempt 3.")],
    why: Annotated[str, typer.Option(help="A note for people.")] = "",
    as_json: Json = False,
) -> None:
    """Keep retention away from a step; prints the id to release it by."""
    import secrets

    from ckptmgr.repository.hold import put_hold
    from ckptmgr.restore.choose import find

    async def use(catalog: Any) -> dict[str, Any]:
        decision = await find(catalog, step)
        hold_id = secrets.token_hex(8)
        await put_hold(catalog.store, decision.id, hold_id, why)
        return {**decision.id.document(), "hold": hold_id}

    document = with_store(url, use)
    out(document, as_json, lambda: typer.echo(document["hold"]))


@command
def release(
    url: Url,
    step: Annotated[str, typer.Argument(help="1200, or 3.1200 for attempt 3.")],
    hold_id: Annotated[str, typer.Argument(help="As printed by hold.")],
    as_json: Json = False,
) -> None:
    """Release a hold."""
    from ckptmgr.repository.catalog import list_steps
    from ckptmgr.repository.hold import release_hold
    from ckptmgr.restore.choose import find

    async def use(catalog: Any) -> dict[str, Any]:
        decision = await find(catalog, step)
        if hold_id not in (await list_steps(catalog.store)).holds.get(decision.id, ()):
            raise UsageError(f"has no hold {hold_id}", subject=f"step {decision.id}")
        await release_hold(catalog.store, decision.id, hold_id)
        return {**decision.id.document(), "released": hold_id}

    document = with_store(url, use)
    out(document, as_json, lambda: typer.echo(f"released {hold_id}"))
