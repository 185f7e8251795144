"""`reftune push`: an adapter to the Hub."""

from __future__ import annotations

from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command()(push)


def push(
    adapter: Annotated[
        str, typer.Argument(help="run directory or adapter directory", metavar="ADAPTER")
    ],
    repo: Annotated[str, typer.Argument(help="its name on the Hub: USER/NAME or ORG/NAME")],
    private: Annotated[bool, typer.Option("--private", help="a private repository")] = False,
    revision: Annotated[str | None, typer.Option(help="branch; made if there is none")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="the base model's name on the Hub, if trained from a folder")
    ] = None,
    message: Annotated[str | None, typer.Option(help="of the commit")] = None,
) -> None:
    """Push an adapter with its card to the Hub; the token is HF_TOKEN's or `hf auth login`'s."""
    from reftune_cli import reported_errors

    with reported_errors():
        from reftune.publish import push as push_adapter

        typer.echo(
            push_adapter(
                adapter,
                repo,
                private=private,
                revision=revision,
                base_model=base_model,
                message=message,
            )
        )
