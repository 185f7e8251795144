"""What finished runs came to: read from their directories, averaged over seeds, compared.

read(DIR) -> Records: the runs of an experiment, or one run
arm: all runs that differ in the seed alone
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from reftune.cells import CELLS
from reftune.errors import RunError
from reftune.experiment import arm_name
from reftune.plots import read_log
from reftune.run import CONFIG, RESULTS
from reftune.samples import OverSeeds, PairedDifference, Sample, paired_difference, read_samples
from reftune.train import LOG

OURS = "adapter"  # who, in a run's results, was trained


@dataclass(frozen=True)
class Record:
    """A finished run: its arm, its config as plain values, and its results."""

    arm: str
    directory: Path
    config: Mapping[str, Any]
    results: Mapping[str, Any]

    @property
    def seed(self) -> int:
        """Return the run's seed."""
        return int(self.config["seed"])

    @property
    def method(self) -> str:
        """Return the method's name; LoRA with DoRA's decomposition is "dora"."""
        adapter = self.config["adapter"]
        return "dora" if adapter.get("use_dora") else str(adapter["method"])

    @property
    def rank(self) -> int | None:
        """Return the adapter's rank, `adapter.r`; None of methods without one."""
        found: int | None = self.config["adapter"].get("r")
        return found

    @property
    def tasks(self) -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
        """Return {task: {who: result}}."""
        found: Mapping[str, Mapping[str, Mapping[str, Any]]] = self.results["tasks"]
        return found

    def log(self) -> list[dict[str, float]]:
        """Return the logged losses, by step."""
        path = self.directory / LOG
        return [row for row in read_log(path) if "loss" in row] if path.is_file() else []

    def samples(self, who: str, task: str) -> list[Sample]:
        """Return the generations of an evaluation; none where they were not kept.

        What was generated before the evaluation was made smaller (`evaluate.limit`) is left out.
        """
        path = self.directory / "samples" / who / f"{task}.jsonl"
        n = self.tasks.get(task, {}).get(who, {}).get("n", math.inf)
        return [s for s in read_samples(path) if s.index < n] if path.is_file() else []


@dataclass(frozen=True)
class Records:
    """The runs below a directory, and the cells of an experiment that have none yet."""

    directory: Path
    runs: tuple[Record, ...]
    missing: tuple[Mapping[str, Any], ...] = ()

    @property
    def arms(self) -> dict[str, list[Record]]:
        """Return the runs of each arm, in the order of the experiment."""
        found: dict[str, list[Record]] = {}
        for run in self.runs:
            found.setdefault(run.arm, []).append(run)
        return found

    @property
    def task_names(self) -> list[str]:
        """Return the tasks that any run was evaluated on."""
        return list(dict.fromkeys(task for run in self.runs for task in run.tasks))

    def all_know(self, key: str) -> bool:
        """Return whether the training of each run has such a number; see `trained`."""
        return all(key in run.results["train"] for run in self.runs)


def read(directory: str | Path) -> Records:
    """Read a run's directory, an experiment's, or any whose subdirectories are runs.

    Raises RunError where no finished run is there.
    """
    directory = Path(directory)
    if is_finished(directory):
        return Records(directory, (_record(directory, None),))
    if (directory / CELLS).is_file():
        lines = (directory / CELLS).read_text(encoding="utf-8").splitlines()
        cells = [json.loads(line) for line in lines]
        done = [cell for cell in cells if is_finished(directory / cell["cell"])]
        missing = tuple(cell for cell in cells if cell not in done)
        runs = [
            _record(directory / cell["cell"], arm_name(cell["variant"], cell["point"]))
            for cell in done
        ]
    else:
        missing = ()
        folders = sorted(directory.iterdir()) if directory.is_dir() else []
        runs = [_record(path, None) for path in folders if is_finished(path)]
    if not runs:
        raise RunError(
            f"{directory} holds no finished run. Give a run's directory, or that of an experiment."
        )
    return Records(directory, tuple(runs), missing)


def is_finished(directory: Path) -> bool:
    """Return whether a directory is a run's that was trained and evaluated."""
    return (directory / RESULTS).is_file() and (directory / CONFIG).is_file()


def _record(directory: Path, arm: str | None) -> Record:
    results = json.loads((directory / RESULTS).read_text(encoding="utf-8"))
    config = yaml.safe_load((directory / CONFIG).read_text(encoding="utf-8"))
    return Record(arm or re.sub(r"-s\d+$", "", directory.name), directory, config, results)


# --- averages -------------------------------------------------------------------------------------


def mean_and_deviation(values: Sequence[float]) -> OverSeeds | None:
    """Return the mean over seeds and their standard deviation; None of no values."""
    if not values:
        return None
    sd = statistics.stdev(values) if len(values) > 1 else None
    return OverSeeds(statistics.fmean(values), sd, len(values))


def score(runs: Sequence[Record], task: str, who: str = OURS) -> OverSeeds | None:
    """Return an arm's score on a task over its seeds, in per cent."""
    found = [run.tasks.get(task, {}).get(who) for run in runs]
    return mean_and_deviation([100 * result["value"] for result in found if result])


def read_otherwise(
    runs: Sequence[Record], task: str, read: Callable[[str], str], who: str = OURS
) -> OverSeeds | None:
    """Return an arm's score where the answer is what `read` finds in a completion, in per cent.

    None where generations were not kept.
    """
    kept = [run.samples(who, task) for run in runs]
    if not all(kept):
        return None
    right = [[read(s.completion) == s.gold for s in samples] for samples in kept]
    return mean_and_deviation([100 * statistics.fmean(r) for r in right])


def average(runs: Sequence[Record], tasks: Sequence[str], who: str = OURS) -> OverSeeds | None:
    """Return an arm's mean over tasks, over its seeds; None where a task is missing."""
    per_run = [
        [100 * run.tasks[t][who]["value"] for t in tasks if who in run.tasks.get(t, {})]
        for run in runs
    ]
    return mean_and_deviation(
        [statistics.fmean(values) for values in per_run if values and len(values) == len(tasks)]
    )


def standard_error(runs: Sequence[Record], task: str, who: str = OURS) -> float | None:
    """Return the standard error that the choice of examples gives one run's score, in per cent."""
    found = [run.tasks.get(task, {}).get(who) for run in runs]
    errors = [r["stderr"] for r in found if r and r.get("stderr") is not None]
    return 100 * statistics.fmean(errors) if errors else None


def average_error(runs: Sequence[Record], tasks: Sequence[str]) -> float | None:
    """Return the standard error over examples of the mean over tasks, in per cent."""
    errors = [standard_error(runs, task) for task in tasks]
    if not tasks or None in errors:
        return None
    return math.hypot(*(e for e in errors if e is not None)) / len(tasks)


def trained(runs: Sequence[Record], key: str) -> OverSeeds | None:
    """Return "seconds", "cpu_seconds", ... of an arm's training, over its seeds."""
    return mean_and_deviation([float(run.results["train"][key]) for run in runs])


# --- differences ----------------------------------------------------------------------------------


def compare(ours: Sequence[Record], other: Sequence[Record] | None, task: str) -> Comparison | None:
    """Compare an arm with another, or with the base model (None), example by example.

    An example's score is its mean over the seeds. None where generations were not kept.
    """
    a = mean_samples([run.samples(OURS, task) for run in ours])
    if other is None:
        b = mean_samples([run.samples("base", task) for run in ours])
    else:
        b = mean_samples([run.samples(OURS, task) for run in other])
    if not a or not b:
        return None
    try:
        difference = paired_difference(a, b)
    except RunError:  # evaluated on other examples
        return None
    return Comparison(task, difference, sign_test(difference.wins, difference.losses))


def lora_references(arms: Mapping[str, Sequence[Record]]) -> dict[str, list[str]]:
    """Return which arms are compared with which LoRA: {LoRA's arm: arms}.

    One LoRA is compared with all. Of several, the largest is, and each of the others with the arms
    of its rank; LoRAs are compared with the largest alone.
    """
    loras = {arm: runs[0] for arm, runs in arms.items() if runs[0].method == "lora"}
    if not loras:
        return {}
    largest = max(loras, key=lambda arm: int(loras[arm].results["parameters"]))
    found = {}
    for lora, run in loras.items():
        same = [a for a, r in arms.items() if a not in loras and r[0].rank == run.rank]
        found[lora] = [a for a in arms if a != lora] if lora == largest else same
    return found


@dataclass(frozen=True)
class Comparison:
    """How an arm differs from another on a task; `p` is of the exact sign test.

    For scores of 0 and 1 of one run each that is McNemar's exact test.
    """

    task: str
    difference: PairedDifference
    p: float


def mean_samples(runs: Sequence[Sequence[Sample]]) -> list[Sample]:
    """Return one sample for each example with its mean score over runs; [] where any lacks it."""
    if not runs or not all(runs):
        return []
    scores: dict[int, list[float]] = {}
    for samples in runs:
        for sample in samples:
            scores.setdefault(sample.index, []).append(sample.score)
    if any(len(found) != len(runs) for found in scores.values()):
        return []
    return [replace(s, score=statistics.fmean(scores[s.index])) for s in runs[0]]


def sign_test(wins: int, losses: int) -> float:
    """Return the two-sided p value of so many wins and losses if both were equally likely."""
    n, fewer = wins + losses, min(wins, losses)
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / (1 << n))


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the names of points (cost, score) that none beats in both, the cheapest first."""
    front: list[str] = []
    best = -math.inf
    for name, (_, value) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if value > best:
            front.append(name)
            best = value
    return front
