"""The verbs for experiments: their cells as a table, and how far they are."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from reftune.cells import CELLS, Outcome, rows_of, run_cells, status_of
from reftune.errors import ReftConfigError, RunError
from reftune.experiment import Experiment, load_experiment
from reftune.peft_json import method_comparison
from reftune.records import read
from reftune.report import write_report
from reftune.run import write_text
from reftune_cli.console import ConsoleReporter, out


def open_experiment(
    path: Path,
    overrides: Sequence[str],
    seeds: str | None,
    data_dir: str | None,
    only: str | None = None,
) -> Experiment:
    """Read an experiment's YAML with what the command line changes. Raises ReftConfigError.

    Of its cells those stay whose names fit one of `only`'s patterns: "lora*,*-s42".
    """
    more = [f"data.data_dir={data_dir}"] if data_dir else []
    experiment = load_experiment(path, [*overrides, *more], _seeds(seeds))
    if only is None:
        return experiment
    patterns = [pattern.strip() for pattern in only.split(",")]
    kept = tuple(c for c in experiment.cells if any(fnmatchcase(c.name, p) for p in patterns))
    if not kept:
        names = ", ".join(cell.name for cell in experiment.cells)
        raise ReftConfigError(f"--only is {only!r}, which is none of the cells; there are {names}.")
    return dataclasses.replace(experiment, cells=kept)


def run_and_show(experiment: Experiment, jobs: int) -> bool:
    """Run an experiment's cells and print what became of them; return whether none failed."""
    with ConsoleReporter() as reporter:
        outcomes = run_cells(experiment, jobs=jobs, reporter=reporter)
    show_cells(experiment, outcomes)
    return all(outcome.status == "done" for outcome in outcomes)


def show_cells(experiment: Experiment, outcomes: Sequence[Outcome] | None = None) -> None:
    """Print the cells and their status; without outcomes, as they are in the directory."""
    found = outcomes or [status_of(cell) for cell in experiment.cells]
    rows = rows_of(experiment) if outcomes else {}
    tasks = list(dict.fromkeys(task for row in rows.values() for task in row.get("scores", ())))
    table = Table(box=box.SIMPLE_HEAD, title=escape(experiment.name), title_justify="left")
    for name in ("cell", "method", "status", *tasks):
        table.add_column(escape(name), overflow="fold")
    for cell, outcome in zip(experiment.cells, found, strict=True):
        status = outcome.status + (f": {outcome.error}" if outcome.error else "")
        scores = rows.get(cell.name, {}).get("scores", {})
        shown = [f"{scores[task]:.4f}" if task in scores else "" for task in tasks]
        table.add_row(cell.name, cell.config.method, escape(status), *shown)
    out.print(table)
    done = sum(outcome.status == "done" for outcome in found)
    out.print(f"{done} of {len(found)} cells are finished; see {experiment.directory / CELLS}")
    if done:
        out.print(f"Tables and pictures: reftune report {experiment.directory}")


def _seeds(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ReftConfigError(
            f"--seeds is {text!r}; accepted are numbers with commas between: 42,43,44."
        ) from error


def write_reports(directory: Path, target: Path | None, peft_json: Path | None) -> None:
    """Write a report, and what PEFT's method comparison reads, and say where they are."""
    markdown, page = write_report(directory, target)
    out.print(f"{markdown}\n{page}")
    if peft_json is not None:
        peft_json.mkdir(parents=True, exist_ok=True)
        refused = []
        for run in read(directory).runs:
            try:
                entry = method_comparison(run)
            except RunError as error:
                refused.append(str(error))
                continue
            name = entry["run_info"]["experiment_name"].replace("/", "--")
            write_text(peft_json / f"{name}.json", json.dumps(entry, indent=2) + "\n")
        for reason in refused:
            out.print(f"Not exported: {reason}", highlight=False)
        out.print(str(peft_json))
