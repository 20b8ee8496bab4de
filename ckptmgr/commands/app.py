"""The command line's application, and what its commands share."""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar

import typer

from ckptmgr import foreground, present
from ckptmgr.errors import NothingToRestoreError

STATUS = """EXIT STATUS: 0 done, 1 error, 2 usage, 3 damage found, 4 nothing to restore,
5 store unreachable, 6 superseded by a newer attempt, 7 fell back to an older step."""

app = typer.Typer(
    name="ckptmgr",
    help="Fault-tolerant checkpoint manager for PyTorch training.",
    epilog=STATUS,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Url = Annotated[
    str, typer.Argument(help="Where the job's steps are: file:///data/run7, or a path.")
]
Step = Annotated[
    str | None, typer.Argument(help="1200, or 3.1200 for attempt 3; the newest if left out.")
]
Mirror = Annotated[
    str,
    typer.Option(
        envvar="CKPTMGR_MIRROR", help="Mirror to read what the store does not give, as of daemon."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]

T = TypeVar("T")


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Register a command; every help text ends with the exit statuses."""
    return app.command(epilog=STATUS)(function)


def out(document: Any, as_json: bool, human: Callable[[], None]) -> None:
    """Print `document`, or what `human` shows of it."""
    if as_json:
        typer.echo(json.dumps(document, indent=2))
    else:
        human()


def _nothing() -> None:
    pass


def with_store(
    url: str,
    use: Callable[[Any], Awaitable[T]],
    leave_nothing: Callable[[], None] = _nothing,
    *,
    mirror: str = "",
    objects: bool = True,
) -> T:
    """Run `use` on a catalog of the store at `url`; nothing is created.

    `leave_nothing` deletes what `use` made, when an interrupt has to end the process without it.
    What the store does not give is read from its place below `mirror`, and told; single objects
    only with `objects`.
    """
    from ckptmgr.repository import keys
    from ckptmgr.repository.catalog import Catalog
    from ckptmgr.repository.commit import check_format, same_job
    from ckptmgr.repository.keyring import load_keyring
    from ckptmgr.store.mirrored import Terms, open_for_reading

    keyring = load_keyring(os.environ)
    terms = Terms(keys.FORMAT, same_job, present.read_mirror, present.refused_mirror)

    async def run() -> T:
        store = open_for_reading(url, mirror, terms, objects=objects)
        try:
            if not await check_format(store, create=False):
                hint = "Check the URL; the first trainer of a job makes its store."
                raise NothingToRestoreError("is not a ckptmgr store", subject=store.url, hint=hint)
            return await use(Catalog(store, keyring))
        finally:
            await store.aclose()

    return foreground.run(run(), leave_nothing)
