"""Commands that hold a step, and release it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ckptmgr.commands.app import Json, Url, command, out, with_store


@command
def hold(
    url: Url,
    step: Annotated[str, typer.Argument(help="1200, or 3.1200 for attempt 3.")],
    why: Annotated[str, typer.Option(help="A note for people.")] = "",
    as_json: Json = False,
) -> None:
    """Keep retention away from a step; prints the id to release it by."""
    import secrets

    from ckptmgr.repository.hold import put_hold, release_hold
    from ckptmgr.restore.choose import find

    hold_id = secrets.token_hex(8)

    async def use(catalog: Any) -> Any:
        decision = await find(catalog, step)
        await put_hold(catalog.store, decision.id, hold_id, why)
        return decision.id

    async def take_back(catalog: Any) -> None:
        await release_hold(catalog.store, held, hold_id)

    held = with_store(url, use)
    try:
        out({**held.document(), "hold": hold_id}, as_json, lambda: typer.echo(hold_id))
    except OSError:  # nobody was told the id: whoever asks again would have two
        with_store(url, take_back)
        raise


@command
def release(
    url: Url,
    step: Annotated[str, typer.Argument(help="1200, or 3.1200 for attempt 3.")],
    hold_id: Annotated[str, typer.Argument(help="As printed by hold.")],
    as_json: Json = False,
) -> None:
    """Release a hold."""
    from ckptmgr.repository.hold import release_hold
    from ckptmgr.restore.choose import find_held

    async def use(catalog: Any) -> dict[str, Any]:
        held = await find_held(catalog, step, hold_id)
        await release_hold(catalog.store, held, hold_id)
        return {**held.document(), "released": hold_id}

    document = with_store(url, use)
    out(document, as_json, lambda: typer.echo(f"released {hold_id}"))
