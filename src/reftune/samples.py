"""What an evaluation leaves behind: samples, results, and how they compare.

A samples file is JSON lines: first a header (what was run, with which settings), then one `Sample`
per example, in the order in which the engine finishes them. A killed evaluation goes on from its
samples file: what is there is not generated again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, final

from reftune.errors import RunError

FORMAT = 1
START = b'{"reftune_samples": '  # every samples file begins so


@final
@dataclass(frozen=True)
class Sample:
    """One scored generation.

    `seconds` is the time since the sample before it, so a batch's time is on its first sample and
    the sum over all samples is the time the evaluation took.
    """

    index: int
    where: str
    adapter: str | None
    prompt: str
    gold: str
    completion: str
    extracted: str
    score: float
    tokens: int
    finish_reason: str
    seconds: float


@final
@dataclass(frozen=True)
class Result:
    """The mean score of a task.

    `stderr` is sqrt(p(1-p)/(n-1)) for scores of 0 and 1, lm-eval's; None for a single example.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    seconds: float
    generated_tokens: int

    def to_json(self) -> str:
        """Return the result as one line of JSON."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False)


@final
@dataclass(frozen=True)
class PairedDifference:
    """How much better a is than b on the same examples: the mean of score_a - score_b.

    `wins` and `losses` count the examples on which a scores higher and lower.
    """

    mean: float
    stderr: float | None
    wins: int
    losses: int
    n: int


class OverSeeds(NamedTuple):
    """The mean over runs that differ in their seed, their standard deviation (n - 1), and n.

    The deviation of a single run is None. It says how much seeds matter; the standard error of a
    `Result` says how much the choice of examples does.
    """

    mean: float
    sd: float | None
    n: int


def result_of(task: str, metric: str, samples: Sequence[Sample]) -> Result:
    """Return the result that samples of a task come to: their mean score is the `metric`."""
    scores = [sample.score for sample in samples]
    return Result(
        task=task,
        metric=metric,
        value=statistics.fmean(scores),
        stderr=_stderr(scores),
        n=len(scores),
        seconds=round(math.fsum(sample.seconds for sample in samples), 3),
        generated_tokens=sum(sample.tokens for sample in samples),
    )


def read_samples(path: str | Path) -> list[Sample]:
    """Read a samples file, ordered by example; a torn last line is left out.

    Raises:
        RunError: there is no such file, or it is not a samples file.
    """
    path = Path(path)
    if not path.is_file():
        raise RunError(f"{path} does not exist: give the samples file of an evaluation.")
    header, samples, _ = _read(path)
    if header is None:
        raise RunError(f"{path} is empty: the evaluation stopped before its first example.")
    return sorted(samples, key=lambda sample: sample.index)


def paired_difference(a: Sequence[Sample], b: Sequence[Sample]) -> PairedDifference:
    """Compare two evaluations example by example; far sharper than comparing two means.

    Raises:
        RunError: they were not made from the same examples.
    """
    by_index = {sample.index: sample for sample in b}
    same = len(a) == len(b) == len(by_index) and all(
        s.index in by_index
        and (s.prompt, s.gold) == (by_index[s.index].prompt, by_index[s.index].gold)
        for s in a
    )
    if not a or not same:
        raise RunError(
            f"the two evaluations do not pair: {len(a)} and {len(b)} samples, which must be of the "
            "same examples; evaluate both with the same task, data and limit."
        )
    differences = [sample.score - by_index[sample.index].score for sample in a]
    return PairedDifference(
        mean=statistics.fmean(differences),
        stderr=_stderr(differences),
        wins=sum(d > 0 for d in differences),
        losses=sum(d < 0 for d in differences),
        n=len(differences),
    )


def _stderr(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean; for 0 and 1 it is sqrt(p(1-p)/(n-1))."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def write_row(file: IO[str], row: Mapping[str, Any]) -> None:
    """Append a row to a samples file, so that a killed process loses at most the row at hand."""
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    file.flush()


def earlier_samples(path: Path, header: Mapping[str, Any]) -> list[Sample]:
    """Return the samples of an earlier evaluation and cut a torn last line off its file.

    The file's folder is made. Raises RunError where the file has another header, or is damaged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return []
    found, samples, whole = _read(path)
    if found is not None:
        _check_header(path, found, header)
    with path.open("r+b") as file:
        file.truncate(whole)
    return samples


def _read(path: Path) -> tuple[dict[str, Any] | None, list[Sample], int]:
    """Return a samples file's header, its samples and the length in bytes of its whole lines."""
    data = path.read_bytes()
    if not data.startswith(START[: len(data)]):  # before a torn line is cut off someone else's file
        raise RunError(
            f"{path} is not a samples file of reftune: it begins with {data[:40]!r}. "
            "Give another folder."
        )
    whole = data.rfind(b"\n") + 1
    header: dict[str, Any] | None = None
    samples: list[Sample] = []
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            row = json.loads(line)
            if number == 1:
                header = row
            else:
                samples.append(Sample(**row))
        except (ValueError, TypeError) as error:
            raise RunError(
                f"{path}, line {number} is not a {'header' if number == 1 else 'sample'} of "
                f"reftune: {line[:60]!r}. Give another folder, or remove the file."
            ) from error
    return header, samples, whole


def model_of(path: Path) -> str | None:
    """Return which model and adapter wrote a samples file; None where there is none."""
    if not path.is_file() or not path.stat().st_size:
        return None
    with path.open(encoding="utf-8") as file:
        header = json.loads(file.readline())
    return str(header["model"])


def _check_header(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    keys = [key for key in wanted if found.get(key) != wanted[key]]
    if keys:
        differences = "; ".join(f"{k}: {found.get(k)!r}, now {wanted[k]!r}" for k in keys)
        raise RunError(
            f"{path} belongs to another evaluation ({differences}). Give another folder, "
            "or remove the file."
        )
