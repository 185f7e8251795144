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
import hashlib
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
import yaml

from reftune import evaluate
from reftune.callbacks import CHECKPOINTS, Reporter, last_checkpoint
from reftune.errors import RunError, RunInterrupted
from reftune.experiment import Cell, Experiment, Point
from reftune.generate import HFEngine
from reftune.models import load_model, own_device
from reftune.run import (
    CONFIG,
    MAY_DIFFER,
    RESULTS,
    Silent,
    execute,
    write_text,
)
from reftune.settings import RunConfig
from reftune.sources import choosing_data, tasks_of
from reftune.workers import seeing_one_gpu, usable_cpus

CELLS = "cells.jsonl"
BASE = "base"
Status = Literal["pending", "done", "failed", "interrupted"]
Scores = Mapping[str, Mapping[str, Any]]
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
    seconds: float = 0.0


def run_cells(
    experiment: Experiment, *, jobs: int = 1, reporter: Reporter | None = None
) -> list[Outcome]:
    """Run what is not finished, and return what became of each cell.

    Raises:
        RunError: a finished cell's directory was run with other settings.
        RunInterrupted: Ctrl-C; what runs has been saved, and the same command goes on.
    """
    reporter = reporter or Silent()
    earlier = rows_of(experiment)
    outcomes = {
        cell.name: replace(status_of(cell), seconds=earlier.get(cell.name, {}).get("seconds", 0.0))
        for cell in experiment.cells
    }
    write_cells(experiment, outcomes.values())
    todo = [cell for cell in experiment.cells if outcomes[cell.name].status != "done"]
    for cell in experiment.cells:
        if cell not in todo:
            reporter.say(f"{cell.name}: is finished")
            share_base_samples(experiment, cell.config)
    run = _one_after_another if jobs == 1 or len(todo) < 2 else _in_processes
    try:
        for outcome in run(experiment, todo, jobs, reporter):
            outcomes[outcome.cell] = outcome
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


def changed_keys(config: RunConfig) -> list[str]:
    """Return the keys whose values differ from those that a directory was run with."""
    if not (config.directory / CONFIG).is_file():
        return []
    before = dict(_flat(yaml.safe_load((config.directory / CONFIG).read_text(encoding="utf-8"))))
    now = dict(_flat(config.model_dump(mode="json")))
    ignored = _ANY | {f"{section}.{key}" for section, keys in MAY_DIFFER.items() for key in keys}
    return sorted(k for k in now if k not in ignored and before.get(k, now[k]) != now[k])


def rows_of(experiment: Experiment) -> dict[str, dict[str, Any]]:
    """Return what was last written of each cell, those of other seeds or grids too: {cell: row}."""
    path = experiment.directory / CELLS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {row["cell"]: row for row in map(json.loads, lines)}


def write_cells(experiment: Experiment, outcomes: Iterable[Outcome]) -> None:
    """Write the status of each cell, and the scores of what is finished.

    Finished cells of the same directory that the experiment does not ask for now stay listed.
    """
    rows = {}
    for outcome in outcomes:
        row = dataclasses.asdict(outcome)
        path = experiment.directory / outcome.cell / RESULTS
        if outcome.status == "done" and path.is_file():
            results = json.loads(path.read_text(encoding="utf-8"))
            tasks = results["tasks"].items()
            row["scores"] = {name: scores["adapter"]["value"] for name, scores in tasks}
            row["parameters"] = results["parameters"]
            row["train_seconds"] = results["train"]["seconds"]
        rows[outcome.cell] = row
    for cell, row in rows_of(experiment).items():
        if cell not in rows and (experiment.directory / cell / RESULTS).is_file():
            rows[cell] = row
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values()]
    experiment.directory.mkdir(parents=True, exist_ok=True)
    write_text(experiment.directory / CELLS, "".join(lines))


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
        resume = same and last_checkpoint(directory) is not None
        execute(
            cell.config,
            resume=resume,
            overwrite=not resume and directory.exists(),
            reporter=reporter,
            base_scores=base,
        )
    except (KeyboardInterrupt, RunInterrupted):
        return replace(outcome, status="interrupted")
    except Exception as error:  # one cell's failure is a result of the experiment
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / "error.txt", traceback.format_exc())
        text = f"{type(error).__name__}: {error}"
        return replace(outcome, status="failed", error=text, seconds=_since(start))
    (directory / "error.txt").unlink(missing_ok=True)
    if not keep_checkpoints:
        shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)
    return replace(outcome, seconds=_since(start))


def base_scores(experiment: Experiment, config: RunConfig, reporter: Reporter) -> Scores | None:
    """Evaluate the base model of a cell on what is not evaluated yet: {task: result}.

    None where the cell does not ask for it; a classifier's base has no head.
    """
    if not config.evaluate.base or config.task_type != "causal_lm":
        return None
    folder = experiment.directory / BASE / _digest(config)
    scores: dict[str, Any] = {}
    engine: HFEngine | None = None
    for task in tasks_of(config):
        path = folder / f"{task.name}.json"
        if not path.is_file():
            if engine is None:
                reporter.say(f"Evaluating the base model {config.model}")
                engine = _base_engine(config)

            def tell(done: int, total: int, name: str = task.name) -> None:
                reporter.evaluating(f"{name}, base", done, total)

            samples = folder / f"{task.name}.jsonl"
            result = evaluate.run(task, engine, samples_path=samples, progress=tell)
            write_text(path, json.dumps(dataclasses.asdict(result)) + "\n")
        scores[task.name] = json.loads(path.read_text(encoding="utf-8"))
    return scores


def share_base_samples(experiment: Experiment, config: RunConfig) -> None:
    """Put the base model's generations beside a cell's own, as a run has them."""
    folder = experiment.directory / BASE / _digest(config)
    target = config.directory / "samples" / "base"
    for path in sorted(folder.rglob("*.jsonl")):  # words/sst2 is a task, and so a folder
        copy = target / path.relative_to(folder)
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def _base_engine(config: RunConfig) -> HFEngine:
    model, tokenizer = load_model(
        config.model,
        config.dtype,
        "cpu" if config.train.device == "cpu" else own_device(),
        attn_implementation=config.attn_implementation,
        quantization=config.quantization,
    )
    return HFEngine(model, tokenizer, config.evaluate.batch_size)


def _digest(config: RunConfig) -> str:
    """Return a name for what decides the base model's generations."""
    asked = config.evaluate.model_dump(mode="json")
    how = {key: asked[key] for key in asked if key not in ("tasks", "batch_size", "base", "show")}
    model = [config.model, config.dtype, config.attn_implementation, config.data.data_dir]
    if config.quantization is not None:
        model.append(config.quantization)
    text = json.dumps([model, how], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# --- all of them ----------------------------------------------------------------------------------


def _one_after_another(
    experiment: Experiment, todo: Sequence[Cell], jobs: int, reporter: Reporter
) -> Iterator[Outcome]:
    for number, cell in enumerate(todo, 1):
        reporter.say(f"[{number}/{len(todo)}] {cell.name}")
        yield _with_base(experiment, cell, reporter)
        _let_go()


def _with_base(experiment: Experiment, cell: Cell, reporter: Reporter) -> Outcome:
    try:
        base = base_scores(experiment, cell.config, reporter)
    except KeyboardInterrupt:
        raise
    except Exception as error:
        text = f"the base model's evaluation: {type(error).__name__}: {error}"
        return Outcome(cell.name, cell.variant, cell.point, cell.seed, "failed", text)
    outcome = run_cell(cell, base, experiment.keep_checkpoints, reporter)
    if outcome.status == "done":
        share_base_samples(experiment, cell.config)
    return outcome


def _in_processes(
    experiment: Experiment, todo: Sequence[Cell], jobs: int, reporter: Reporter
) -> Iterator[Outcome]:
    """Run cells in processes of their own; the base model is evaluated before, and once."""
    for cell in todo:
        with suppress(Exception):  # the cell's own process meets it again, and records it
            base_scores(experiment, cell.config, reporter)
        _let_go()
    killed = yield from _in_pool(experiment, todo, jobs, reporter)
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
    try:
        while waiting or running:
            for place in sorted(set(pools) - {place for _, place in running.values()}):
                if waiting:
                    cell = waiting.popleft()
                    with seeing_one_gpu(place):
                        future = pools[place].submit(_in_process, experiment, cell, threads)
                    running[future] = cell, place
            done, _ = concurrent.futures.wait(running, return_when="FIRST_COMPLETED")
            for future in done:
                cell, place = running.pop(future)
                try:
                    outcome = future.result()
                except BrokenProcessPool:
                    killed.append(cell)
                    pools[place].shutdown()
                    pools[place] = _one_process()
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
