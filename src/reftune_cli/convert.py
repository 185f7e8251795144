"""`reftune convert`: adapters of other ReFT libraries in, pyreft and EasySteer out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command()(convert)


def convert(
    source: Annotated[
        Path, typer.Argument(help="checkpoint of pyreft, adapters, ms-swift, EasySteer or reftune")
    ],
    out: Annotated[Path, typer.Argument(help="directory to write; it must not exist")],
    to: Annotated[str, typer.Option(help="reftune, pyreft or easysteer")] = "reftune",
    base: Annotated[str | None, typer.Option(help="the base model, directory or Hub name")] = None,
    positions: Annotated[
        str | None, typer.Option(help="prompt tokens that were edited: f7+l7, f3, l1, all")
    ] = None,
    act_fn: Annotated[
        str | None, typer.Option(help="activation of the interventions; linear for none")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="where the tensors of two methods look alike")
    ] = None,
    dropout: Annotated[
        float | None, typer.Option(help="probability, for training on", min=0.0, max=1.0)
    ] = None,
    layers_path: Annotated[
        str | None,
        typer.Option(help="path of the list of layers, where the base's config cannot be read"),
    ] = None,
    task_type: Annotated[
        str | None, typer.Option(help="PEFT's, if not that of the base's own class: SEQ_CLS, ...")
    ] = None,
    lora_alpha: Annotated[
        int | None, typer.Option(help="of a LoRA saved beside the interventions", min=1)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the directory")] = False,
) -> None:
    """Convert an adapter from another library's format, or to one; says what it has to be told."""
    from reftune_cli import reported_errors

    with reported_errors():
        from reftune.convert import Answers
        from reftune.convert import convert as run

        answers = Answers(
            base=base, positions=positions, act_fn=act_fn, method=method, dropout=dropout,
            layers_path=layers_path, task_type=task_type, lora_alpha=lora_alpha,
        )  # fmt: skip
        done = run(source, out, to=to, answers=answers, overwrite=overwrite)
        config = done.adapter.config
        where = "layers" if config.target_modules is None else "modules"
        typer.echo(
            f"{done.directory}: {config.method}, rank {config.r}, {len(done.adapter.phis)} "
            f"{where}, positions {config.positions}, tied {config.tied}; read from {done.source}"
        )
        for note in done.notes:
            typer.echo(f"note: {note}")
