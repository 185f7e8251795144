"""Running an experiment's cells, one after another or in several processes.

OUTPUT_DIR/NAME/
  cells.jsonl     a line for each cell: its status, error, scores
  base/           scores and generations of the base model
  CELL/           an ordinary run
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import gc
import json
import multiprocessing
import shutil
import time
import traceback
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from reftune.base_model import Scores, base_scores, share_base_samples
from reftune.callbacks import CHECKPOINTS, Reporter, last_checkpoint
from reftune.errors import ReftuneError, RunError, RunInterrupted
from reftune.experiment import Cell, Experiment, Point
from reftune.run import (
    CONFIG,
    ERROR,
    MAY_DIFFER,
    RESULTS,
    Silent,
    execute,
    same_training,
    settings_of,
    write_text,
)
from reftune.settings import RunConfig
from reftune.sources import check_data, choosing_data
from reftune.workers import end_with_parent, seeing_one_gpu, usable_cpus

CELLS = "cells.jsonl"
Status = Literal["pending", "done", "failed", "interrupted"]
# Keys that change no number of a run.
_ANY = {"output_dir", "evaluate.show", "evaluate.batch_size", "evaluate.base"}


@dataclass(frozen=True)
class Outcome:
    """What became of a cell."""

    cell: str
    variant: str
    point: Point
    seed: int
    status: Status
    error: str | None = None
    seconds: float = 0.0  # of all its attempts, in what `run_cells` returns


def run_cells(
    experiment: Experiment, *, jobs: int = 1, reporter: Reporter | None = None
) -> list[Outcome]:
    """Run what is not finished, and return what became of each cell.

    Raises:
        RunError: a finished cell's directory was run with other settings.
        DataError, ReftConfigError: no cell's data can be read, or trained on as is asked.
        RunInterrupted: Ctrl-C; what runs has been saved, and the same command goes on.
    """
    reporter = reporter or Silent()
    earlier = rows_of(experiment)
    _check_other_seeds(experiment, earlier)
    outcomes = {
        cell.name: _after(status_of(cell), earlier.get(cell.name, {})) for cell in experiment.cells
    }
    write_cells(experiment, outcomes.values())
    todo = [cell for cell in experiment.cells if outcomes[cell.name].status != "done"]
    _check_data(todo)
    for cell in experiment.cells:
        if cell not in todo:
            reporter.say(f"{cell.name}: is finished")
            share_base_samples(experiment, cell.config)
    run = _one_after_another if jobs == 1 or len(todo) < 2 else _in_processes
    try:
        for outcome in run(experiment, todo, jobs, reporter):
            seconds = outcomes[outcome.cell].seconds + outcome.seconds
            outcomes[outcome.cell] = replace(outcome, seconds=round(seconds, 1))
            write_cells(experiment, outcomes.values())
            if outcome.status == "failed":
                reporter.say(f"{outcome.cell} failed: {outcome.error}")
            if outcome.status == "interrupted":
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        done = sum(outcome.status == "done" for outcome in outcomes.values())
        raise RunInterrupted(
            f"Interrupted; {done} of {len(outcomes)} cells are finished. The same command goes on "
            "from there."
        ) from None
    return [outcomes[cell.name] for cell in experiment.cells]


def _check_data(cells: Sequence[Cell]) -> None:
    """Raise what is wrong with the data of every cell, before the base model is evaluated.

    Where some cells can be run, the others' errors are theirs.
    """
    configs = {}
    for cell in cells:
        values = cell.config.model_dump(mode="json")
        configs[json.dumps([values["data"], values["evaluate"]])] = cell.config
    errors: list[ReftuneError] = []
    for config in configs.values():
        try:
            check_data(config)
        except ReftuneError as error:
            errors.append(error)
    if errors and len(errors) == len(configs):
        raise errors[0]


def status_of(cell: Cell) -> Outcome:
    """Return whether a cell is finished. Raises RunError where it is, with other settings."""
    directory = cell.config.directory
    plain = Outcome(cell.name, cell.variant, cell.point, cell.seed, "pending")
    if not (directory / RESULTS).is_file():
        return plain
    if changed := changed_keys(cell.config):
        raise RunError(
            f"{directory} was run with other settings ({', '.join(changed)}). Give the experiment "
            "another name (name=...), or remove that directory."
        )
    return replace(plain, status="done")


def _after(outcome: Outcome, row: Mapping[str, Any]) -> Outcome:
    """Count the seconds of earlier attempts; where a finished cell was removed, there are none."""
    removed = row.get("status") == "done" and outcome.status != "done"
    return outcome if removed else replace(outcome, seconds=row.get("seconds", 0.0))


def changed_keys(config: RunConfig) -> list[str]:
    """Return the keys whose values differ from those that a directory was run with."""
    path = config.directory / CONFIG
    if not path.is_file():
        return []
    before = dict(_flat(settings_of(path)))
    now = dict(_flat(config.model_dump(mode="json")))
    ignored = _ANY | {f"{section}.{key}" for section, keys in MAY_DIFFER.items() for key in keys}
    return sorted(
        k for k in now if k not in ignored and not same_training(k, before.get(k, now[k]), now[k])
    )


def _check_other_seeds(experiment: Experiment, earlier: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise RunError where a mean over seeds would be one over settings, too."""
    asked = {cell.name for cell in experiment.cells}
    for name, row in earlier.items():
        arm = row["variant"], row["point"]
        same = [c for c in experiment.cells if (c.variant, json.loads(json.dumps(c.point))) == arm]
        directory = experiment.directory / name
        if name in asked or not same or not (directory / RESULTS).is_file():
            continue
        cell = same[0]
        as_it_was = cell.config.model_copy(update={"name": name, "seed": row["seed"]})
        if changed := changed_keys(as_it_was):
            raise RunError(
                f"{directory}, another seed of {cell.name}, was run with other settings "
                f"({', '.join(changed)}): a mean over both would say nothing. Give the experiment "
                "another name (name=...), or remove that directory."
            )


def rows_of(experiment: Experiment) -> dict[str, dict[str, Any]]:
    """Return what was last written of each cell, those of other seeds or grids too: {cell: row}."""
    path = experiment.directory / CELLS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {row["cell"]: row for row in map(json.loads, lines)}


def write_cells(experiment: Experiment, outcomes: Iterable[Outcome]) -> None:
    """Write the status of each cell, and the scores of what is finished.

    Cells of the same directory that the experiment does not ask for now stay listed, where they
    are finished or have failed.
    """
    rows = {}
    for outcome in outcomes:
        row = dataclasses.asdict(outcome)
        path = experiment.directory / outcome.cell / RESULTS
        if outcome.status == "done" and path.is_file():
            row |= _measured(json.loads(path.read_text(encoding="utf-8")), outcome.seconds)
        rows[outcome.cell] = row
    for cell, row in rows_of(experiment).items():
        ended = RESULTS if row["status"] == "done" else ERROR
        if cell not in rows and (experiment.directory / cell / ended).is_file():
            rows[cell] = row
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values()]
    experiment.directory.mkdir(parents=True, exist_ok=True)
    write_text(experiment.directory / CELLS, "".join(lines))


def _measured(results: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Return what a finished cell's results say; of the seconds, what no attempt has noted, too.

    Attempts that were killed note none, and a cell may have been run by itself.
    """
    train = results["train"]
    scores = {name: found["adapter"] for name, found in results["tasks"].items()}
    known = train["seconds"] + sum(score["seconds"] for score in scores.values())
    row = {
        "seconds": max(seconds, round(known, 1)),
        "scores": {name: score["value"] for name, score in scores.items()},
        "parameters": results["parameters"],
        "train_seconds": train["seconds"],
    }
    if "cpu_seconds" in train:
        row["train_cpu_seconds"] = train["cpu_seconds"]
    return row


# --- one cell -------------------------------------------------------------------------------------


def run_cell(
    cell: Cell, base: Scores | None, keep_checkpoints: bool, reporter: Reporter
) -> Outcome:
    """Run a cell, from its checkpoint where there is one; whatever goes wrong is in the outcome."""
    directory, start = cell.config.directory, time.perf_counter()
    outcome = Outcome(cell.name, cell.variant, cell.point, cell.seed, "done")
    try:
        # What was begun with other settings begins anew.
        rows = {f"evaluate.{key}" for key in choosing_data(cell.config)}
        changed = changed_keys(cell.config)
        same = all(key.startswith("evaluate.") and key not in rows for key in changed)
        known = (directory / CONFIG).is_file()
        resume = same and known and last_checkpoint(directory) is not None
        execute(
            cell.config,
            resume=resume,
            overwrite=not resume and directory.exists(),
            reporter=reporter,
            base_scores=base,
        )
    except (KeyboardInterrupt, RunInterrupted):
        return replace(outcome, status="interrupted", seconds=_since(start))
    except Exception as error:  # one cell's failure is a result of the experiment
        with suppress(OSError):  # the disk may be full, which is what has failed
            directory.mkdir(parents=True, exist_ok=True)
            write_text(directory / ERROR, traceback.format_exc())
        text = f"{type(error).__name__}: {error}"
        return replace(outcome, status="failed", error=text, seconds=_since(start))
    (directory / ERROR).unlink(missing_ok=True)
    if not keep_checkpoints:
        shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)
    return replace(outcome, seconds=_since(start))


# --- all of them ----------------------------------------------------------------------------------


def _one_after_another(
    experiment: Experiment, todo: Sequence[Cell], jobs: int, reporter: Reporter
) -> Iterator[Outcome]:
    for number, cell in enumerate(todo, 1):
        reporter.say(f"[{number}/{len(todo)}] {cell.name}")
        yield _with_base(experiment, cell, reporter)
        _let_go()


def _with_base(experiment: Experiment, cell: Cell, reporter: Reporter) -> Outcome:
    base = _base_or_failure(experiment, cell, reporter)
    if isinstance(base, Outcome):
        return base
    outcome = run_cell(cell, base, experiment.keep_checkpoints, reporter)
    if outcome.status == "done":
        share_base_samples(experiment, cell.config)
    return outcome


def _base_or_failure(
    experiment: Experiment, cell: Cell, reporter: Reporter
) -> Scores | Outcome | None:
    try:
        return base_scores(experiment, cell.config, reporter)
    except KeyboardInterrupt:
        raise
    except Exception as error:
        text = f"the base model's evaluation: {type(error).__name__}: {error}"
        return Outcome(cell.name, cell.variant, cell.point, cell.seed, "failed", text)


def _in_processes(
    experiment: Experiment, todo: Sequence[Cell], jobs: int, reporter: Reporter
) -> Iterator[Outcome]:
    """Run cells in processes of their own; the base model is evaluated before, and once."""
    ready = []
    for cell in todo:
        base = _base_or_failure(experiment, cell, reporter)
        _let_go()
        if isinstance(base, Outcome):  # several processes would write the same files at once
            yield base
        else:
            ready.append(cell)
    killed = yield from _in_pool(experiment, ready, jobs, reporter)
    if killed:
        reporter.say("A process was killed. Its cell is tried once more, and alone.")
    for cell in killed:
        if (yield from _in_pool(experiment, [cell], 1, reporter)):
            text = "its process was killed, perhaps for lack of memory"
            yield Outcome(cell.name, cell.variant, cell.point, cell.seed, "failed", text)


def _in_pool(
    experiment: Experiment, todo: Sequence[Cell], jobs: int, reporter: Reporter
) -> Generator[Outcome, None, list[Cell]]:
    """Run cells in processes, each with a GPU if there are any; return those that were killed."""
    threads = max(1, usable_cpus() // jobs)
    waiting, killed = deque(todo), list[Cell]()
    pools = {place: _one_process() for place in range(jobs)}
    running: dict[Future[Outcome], tuple[Cell, int]] = {}

    def submit(place: int, cell: Cell) -> Future[Outcome]:
        with seeing_one_gpu(place):
            try:
                return pools[place].submit(_in_process, experiment, cell, threads)
            except BrokenProcessPool:  # its process was killed, with a cell or after it
                pools[place].shutdown()
                pools[place] = _one_process()
                return pools[place].submit(_in_process, experiment, cell, threads)

    try:
        while waiting or running:
            for place in sorted(set(pools) - {place for _, place in running.values()}):
                if waiting:
                    cell = waiting.popleft()
                    running[submit(place, cell)] = cell, place
            done, _ = concurrent.futures.wait(running, return_when="FIRST_COMPLETED")
            for future in done:
                cell, place = running.pop(future)
                try:
                    outcome = future.result()
                except BrokenProcessPool:
                    killed.append(cell)
                    continue
                reporter.say(f"{outcome.cell}: {outcome.status}")
                yield outcome
    finally:
        for pool in pools.values():
            pool.shutdown(cancel_futures=True)
    return killed


def _one_process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def _in_process(experiment: Experiment, cell: Cell, threads: int) -> Outcome:
    end_with_parent()
    torch.set_num_threads(threads)
    return _with_base(experiment, cell, Silent())


def _let_go() -> None:
    """Free a model and its optimizer, before the next ones are loaded, here or by others."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _since(start: float) -> float:
    return round(time.perf_counter() - start, 1)


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and key in ("adapter", "data", "train", "evaluate"):
            yield from ((f"{key}.{inner}", found) for inner, found in value.items())
        else:
            yield key, value
