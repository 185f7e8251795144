"""The command line: verbs over reftune's public API, nothing else.

A package of its own, as `import reftune` loads torch and PEFT (it registers the method there), and
`reftune --help` should answer at once: each verb imports what it needs when it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from reftune_cli.convert import register as register_convert
from reftune_cli.hub import register as register_hub
from reftune_cli.serve import register as register_serve
from reftune_cli.workers import (
    end_with_launcher,
    is_first,
    is_worker,
    let_the_first_speak,
    run_workers,
)

app = typer.Typer(
    name="reftune",
    help="Representation finetuning (ReFT) of language models: train, evaluate, generate, chat.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

AdapterArgument = Annotated[
    str,
    typer.Argument(
        help="directory of an adapter or a run, or NAME[@REVISION] of the Hub", metavar="ADAPTER"
    ),
]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="base model, if not the one the adapter names")
]
DtypeOption = Annotated[str, typer.Option(help="of the base model: auto, float32, bfloat16, ...")]
TemplateOption = Annotated[
    str | None, typer.Option(help="prompt template; default: the one the run was trained with")
]
MaxNewTokens = Annotated[int, typer.Option(help="most tokens to generate", min=1)]
Temperature = Annotated[float, typer.Option(help="0 is greedy", min=0.0)]


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="the run's YAML; `reftune config` lists its keys")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="keys to change: train.learning_rate=1e-3 adapter.r=4 name=second"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with an interrupted run")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier run")] = False,
    nproc: Annotated[int, typer.Option(help="processes, one on each GPU (or CPU)", min=1)] = 1,
) -> None:
    """Train an adapter, evaluate it, and keep everything in runs/NAME."""
    if nproc > 1 and not is_worker():
        flags = [*["--resume"] * resume, *["--overwrite"] * overwrite]
        command = ["train", str(config), *(overrides or []), *flags]
        raise typer.Exit(run_workers(nproc, [sys.executable, "-m", "reftune_cli", *command]))
    end_with_launcher()
    with reported_errors():
        from reftune.run import execute
        from reftune.settings import load_config
        from reftune_cli.console import ConsoleReporter, show_results

        run = load_config(config, overrides or [])
        with ConsoleReporter() as reporter:
            results = execute(run, resume=resume, overwrite=overwrite, reporter=reporter)
        if is_first():
            show_results(run, results)


@app.command()
def experiment(
    config: Annotated[Path, typer.Argument(help="the experiment's YAML: a run's, and more")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="keys to change in every cell: data.limit=64 name=second"),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="seeds of each cell: 42,43,44")] = None,
    data_dir: Annotated[
        str | None, typer.Option(help="folder of task data, or hub; default: as in the YAML")
    ] = None,
    jobs: Annotated[
        int,
        typer.Option(help="cells at a time, each on a GPU of its own if there are so many", min=1),
    ] = 1,
    only: Annotated[
        str | None, typer.Option(help="names or patterns of cells: 'lora*,*-s42'")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only list the cells")] = False,
) -> None:
    """Train and evaluate methods, settings and seeds; finished cells are not run again."""
    with reported_errors():
        from reftune_cli.experiments import open_experiment, run_and_show, show_cells

        found = open_experiment(config, overrides or [], seeds, data_dir, only)
        if dry_run:
            show_cells(found)
        elif not run_and_show(found, jobs):
            raise typer.Exit(1)


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="a run's directory, or an experiment's")],
    out: Annotated[Path | None, typer.Option(help="folder to write to; default: there")] = None,
    peft_json: Annotated[
        Path | None,
        typer.Option(help="also write each run in the schema of PEFT's comparison, to this folder"),
    ] = None,
) -> None:
    """Write tables and pictures of finished runs: report.md, and report.html in one file."""
    with reported_errors():
        from reftune_cli.experiments import write_reports

        write_reports(directory, out, peft_json)


@app.command()
def evaluate(
    adapters: Annotated[
        list[str],
        typer.Argument(help="one, or several for one pass: ADAPTER or NAME=ADAPTER"),
    ],
    tasks: Annotated[
        str | None, typer.Option(help="task names with commas between: boolq,ARC-Easy")
    ] = None,
    data_dir: Annotated[
        str | None, typer.Option(help="folder of task data, or hub; default: the run's, or here")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="first so many examples", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="prompts per batch", min=1)] = 16,
    base: Annotated[bool, typer.Option(help="also evaluate the base model")] = True,
    out: Annotated[
        Path | None, typer.Option(help="folder for samples and results; resumed if it exists")
    ] = None,
    model: ModelOption = None,
    dtype: DtypeOption = "auto",
    engine: Annotated[
        str, typer.Option(help="what generates: hf or vllm (docs/serving.md)")
    ] = "hf",
    split: Annotated[str, typer.Option(help="test, validation or train (--tasks)")] = "test",
    decoding: Annotated[
        str, typer.Option(help="published, greedy, or the paper's sampling (--tasks)")
    ] = "published",
    max_new_tokens: Annotated[
        int | None, typer.Option(help="instead of the task's own (--tasks)", min=1)
    ] = None,
    lm_eval: Annotated[str | None, typer.Option(help="tasks of lm-eval, instead of ours")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="examples in a prompt (lm-eval)")] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="the model's own (lm-eval)")
    ] = False,
    include_path: Annotated[str | None, typer.Option(help="folder of task YAMLs (lm-eval)")] = None,
) -> None:
    """Evaluate adapters, and their base model, on tasks."""
    with reported_errors():
        from reftune_cli.console import ConsoleReporter, show_scores
        from reftune_cli.evaluation import (
            Request,
            evaluate_lm_eval,
            evaluate_with_hf,
            evaluate_with_vllm,
            show_lm_eval,
            task_names,
        )

        how = {"split": split, "decoding": decoding, "max_new_tokens": max_new_tokens}
        harness = (num_fewshot, chat_template, include_path)
        names = task_names(tasks, lm_eval, engine, how, harness)
        asked = Request(adapters, names, data_dir, limit, batch_size, base, out, model, dtype, how)
        with ConsoleReporter() as reporter:
            if lm_eval is not None:
                found, notes = evaluate_lm_eval(asked, reporter, *harness), list[str]()
            elif engine == "vllm":
                found, notes = evaluate_with_vllm(asked, reporter)
            else:
                found, notes = evaluate_with_hf(asked, reporter)
        show_scores(found, notes) if lm_eval is None else show_lm_eval(found)


@app.command()
def generate(
    adapter: AdapterArgument,
    prompts: Annotated[
        list[str], typer.Argument(help="one reply for each; - reads lines of stdin")
    ],
    compare: Annotated[bool, typer.Option("--compare", help="show the base model's, too")] = False,
    template: TemplateOption = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: Annotated[float, typer.Option(help="nucleus; 1 is off")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="of sampling")] = None,
    model: ModelOption = None,
    dtype: DtypeOption = "auto",
) -> None:
    """Generate with an adapter."""
    with reported_errors():
        from reftune.generate import Sampling
        from reftune_cli.console import generate_replies

        sampling = Sampling(
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
        )
        if prompts == ["-"]:
            prompts = [line.rstrip("\n") for line in sys.stdin if line.strip()]
        generate_replies(adapter, prompts, sampling, template, compare, model, dtype)


@app.command()
def chat(
    adapters: Annotated[
        list[str], typer.Argument(help="adapters to switch between: DIRECTORY or NAME=DIRECTORY")
    ],
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    system: Annotated[str | None, typer.Option(help="system message")] = None,
    template: TemplateOption = None,
    model: ModelOption = None,
    dtype: DtypeOption = "auto",
) -> None:
    """Chat with adapters; /adapter, /strength and /base switch between them while you do."""
    with reported_errors():
        from reftune.generate import Sampling
        from reftune_cli.chat import Chat, load_chat

        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature)
        loaded, names, found = load_chat(adapters, model, dtype)
        Chat(loaded, names, template or found, sampling, system).loop()


@app.command()
def info(adapter: AdapterArgument) -> None:
    """Say what an adapter is: method, layers, positions, size, base model."""
    with reported_errors():
        from reftune_cli.console import show_info

        show_info(adapter)


@app.command()
def config(
    schema: Annotated[bool, typer.Option("--schema", help="print a JSON schema instead")] = False,
) -> None:
    """Print every key of a run's YAML with its type, default and meaning."""
    with reported_errors():
        from reftune_cli.console import show_config_keys, show_schema

        show_schema() if schema else show_config_keys()


@app.command()
def version() -> None:
    """Print the versions of reftune and of what it stands on."""
    from reftune.run import versions

    for name, known in versions().items():
        typer.echo(f"{name} {known}")


@contextmanager
def reported_errors() -> Iterator[None]:
    """Print reftune's own errors as a sentence; what we broke keeps its traceback."""
    quieten()
    from reftune.errors import ReftuneError, RunInterrupted

    try:
        yield
    except RunInterrupted as error:
        if is_first():
            typer.secho(str(error), err=True)
        raise typer.Exit(130) from error
    except ReftuneError as error:
        let_the_first_speak()
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        if is_first():
            typer.secho("interrupted", err=True)
        raise typer.Exit(130) from None


def quieten() -> None:
    """Keep what other libraries deprecate among themselves off the terminal."""
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\b")
    # Prompt tuning: ours are those of a prompt without padding, which it takes for granted.
    warnings.filterwarnings("ignore", "Position ids are not supported", module=r"peft\b")
    warnings.filterwarnings("ignore", "(Unsupported layer type|.*no bias term)", module=r"peft\b")
    # Ours, whose deprecation by torch accelerate has yet to follow.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


register_serve(app)
register_convert(app)
register_hub(app)


def main() -> None:
    """Run the command line."""
    app()
