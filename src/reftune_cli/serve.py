"""`reftune serve`: vLLM's OpenAI server with ReFT adapters."""

from __future__ import annotations

from typing import Annotated

import typer

_CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command(context_settings=_CONTEXT)(serve)


def serve(
    context: typer.Context,
    base: Annotated[
        str, typer.Argument(help="base model, or a run or an adapter with its base", metavar="BASE")
    ],
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            help="[NAME=]DIRECTORY: an adapter, a run, a folder of them; or a Hub name. Repeat it "
            "for several"
        ),
    ] = None,
    adapter_roots: Annotated[
        list[str] | None,
        typer.Option(
            help="a folder from which adapters may be loaded at run time; or: hub. Repeat it for "
            "several"
        ),
    ] = None,
    pin: Annotated[
        list[str] | None,
        typer.Option(help="an adapter that is never evicted; repeat it for several"),
    ] = None,
    adapter_memory: Annotated[
        float, typer.Option(help="MiB of adapters on each device", min=0)
    ] = 256.0,
    adapter_host_memory: Annotated[
        float, typer.Option(help="MiB of adapters in host memory beside an accelerator", min=0)
    ] = 1024.0,
) -> None:
    """Serve a model and its adapters with vLLM; its own flags may follow (--port, --api-key)."""
    from reftune.errors import ReftConfigError
    from reftune_cli import reported_errors

    with reported_errors():
        from reftune.serve.catalog import CatalogSettings
        from reftune.serve.launch import serve as run_server
        from reftune.serve.launch import what_to_serve
        from reftune.serve.settings import ServeSettings

        if context.args and not context.args[0].startswith("-"):
            raise ReftConfigError(
                f"{context.args[0]!r} follows an option that takes one value. Repeat the option: "
                "--adapters A --adapters B."
            )
        catalog = CatalogSettings(
            tuple(adapters or ()), tuple(adapter_roots or ()), tuple(pin or ())
        )
        settings = ServeSettings(memory=adapter_memory, host_memory=adapter_host_memory)
        run_server(what_to_serve(base, catalog), settings, context.args)
