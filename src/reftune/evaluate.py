"""Evaluation: run(task, engine) -> Result, with every generation kept, resumable and comparable.

A samples file is JSON lines: first a header (what was run, with which settings), then one `Sample`
per example, in the order in which the engine finishes them. A killed evaluation goes on from its
samples file: what is there is not generated again.
"""

import dataclasses
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, final

from reftune.errors import ReftConfigError, RunError
from reftune.generate import Completion, Engine, HFEngine
from reftune.prompts import Example, encode_prompt, render_prompt
from reftune.tasks import Task

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


def run(
    task: Task,
    engine: Engine,
    *,
    limit: int | None = None,
    adapters: str | Sequence[str | None] | None = None,
    samples_path: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Generate and score the first `limit` examples of a task.

    `adapters` is one name for all examples or one per example (None: the base model); without it,
    the engine's active adapter acts. `progress(done, total)` is called after every example.
    With `samples_path`, samples are written as they finish and an earlier file is continued; greedy
    and beam search then give what an uninterrupted run gives, sampling another draw.

    Raises:
        RunError: the file belongs to another task, model, adapter or settings, or is damaged.
        ReftConfigError: `limit` is below 1, or `adapters` has another length than the examples.
    """
    if limit is not None and limit < 1:
        raise ReftConfigError(f"limit={limit} is not accepted: it must be 1 or more, or None.")
    n = task.num_examples if limit is None else min(limit, task.num_examples)
    if n == 0:
        raise RunError(f"task {task.name!r} has no examples: there is nothing to evaluate.")
    names = _adapter_per_example(adapters, n)
    if samples_path is None:
        samples = _evaluate(task, engine, n, names, {}, None, progress)
    else:
        path = Path(samples_path)
        header = _header(task, engine)
        done = _resume(path, header, task, engine, n, names)
        with path.open("a", encoding="utf-8") as file:
            if path.stat().st_size == 0:
                _write(file, header)
            samples = _evaluate(task, engine, n, names, done, file, progress)
    return _result(task.name, samples)


def run_all(
    tasks: Sequence[Task],
    engine: HFEngine,
    *,
    base: bool,
    samples: Path | None,
    progress: Callable[[str, int, int], None],
) -> dict[str, dict[str, Any]]:
    """Evaluate tasks with the active adapter, and with the `base` model: {task: {who: result}}.

    Generations go to `samples`/WHO/TASK.jsonl, from which a killed evaluation goes on;
    `progress(what, done, total)` is called after every example.
    """
    model: Any = engine.model  # a PeftModel: a plain one has no adapter to switch off
    results: dict[str, dict[str, Any]] = {task.name: {} for task in tasks}
    for task in tasks:
        for who in (["base"] if base else []) + ["adapter"]:
            path = samples / who / f"{task.name}.jsonl" if samples else None
            tell = functools.partial(progress, f"{task.name}, {who}")
            with model.disable_adapter() if who == "base" else nullcontext():
                result = run(task, engine, samples_path=path, progress=tell)
            results[task.name][who] = dataclasses.asdict(result)
    return results


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


def _evaluate(
    task: Task,
    engine: Engine,
    n: int,
    names: list[str | None] | None,
    done: Mapping[int, Sample],
    file: IO[str] | None,
    progress: Callable[[int, int], None] | None,
) -> list[Sample]:
    """Generate what is not `done`, writing each sample as it finishes, and return all samples."""
    samples = dict(done)
    todo = [i for i in range(n) if i not in done]
    examples = [task.example(i) for i in todo]
    prompts = [encode_prompt(e.prompt, engine.tokenizer, task.template) for e in examples]
    last = time.perf_counter()

    def finish(k: int, completion: Completion) -> None:
        nonlocal last
        now = time.perf_counter()
        adapter = None if names is None else names[todo[k]]
        sample = _sample(task, engine, todo[k], examples[k], completion, adapter, now - last)
        last = now
        samples[sample.index] = sample
        if file is not None:
            _write(file, dataclasses.asdict(sample))
        if progress is not None:
            progress(len(samples), n)

    row_adapters = None if names is None else [names[i] for i in todo]
    engine.generate(prompts, task.sampling, row_adapters, finish)
    return [samples[i] for i in range(n)]


def _sample(
    task: Task,
    engine: Engine,
    index: int,
    example: Example,
    completion: Completion,
    adapter: str | None,
    seconds: float,
) -> Sample:
    return Sample(
        index=index,
        where=example.where,
        adapter=adapter,
        prompt=_prompt_text(example, engine, task),
        gold=task.gold(example),
        completion=completion.text,
        extracted=task.extract(completion.text),
        score=task.score(example, completion.text),
        tokens=len(completion.token_ids),
        finish_reason=completion.finish_reason,
        seconds=round(seconds, 6),
    )


def _prompt_text(example: Example, engine: Engine, task: Task) -> str:
    return render_prompt(example.prompt, engine.tokenizer, task.template)


def _result(task: str, samples: Sequence[Sample]) -> Result:
    scores = [sample.score for sample in samples]
    return Result(
        task=task,
        metric="accuracy",
        value=statistics.fmean(scores),
        stderr=_stderr(scores),
        n=len(scores),
        seconds=round(math.fsum(sample.seconds for sample in samples), 3),
        generated_tokens=sum(sample.tokens for sample in samples),
    )


def _stderr(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean; for 0 and 1 it is sqrt(p(1-p)/(n-1))."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _adapter_per_example(
    adapters: str | Sequence[str | None] | None, n: int
) -> list[str | None] | None:
    if adapters is None:
        return None
    names: list[str | None] = [*[adapters] * n] if isinstance(adapters, str) else [*adapters]
    if len(names) != n:
        raise ReftConfigError(
            f"got {len(names)} adapters for {n} examples: give one name for all, or one per "
            "example (None: the base model)."
        )
    return names


# --- the samples file -----------------------------------------------------------------------------


def _header(task: Task, engine: Engine) -> dict[str, Any]:
    """Return all that decides a generation besides its prompt and its row's adapter."""
    header = {
        "reftune_samples": FORMAT,
        "task": task.name,
        "template": task.template,
        "sampling": dataclasses.asdict(task.sampling),
        "model": engine.identity,
    }
    plain: dict[str, Any] = json.loads(json.dumps(header))  # tuples become lists, as in the file
    return plain


def _write(file: IO[str], row: Mapping[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    file.flush()  # so that a killed process loses at most the line it is writing


def _read(path: Path) -> tuple[dict[str, Any] | None, list[Sample], int]:
    """Return a samples file's header, its samples and the length in bytes of its whole lines."""
    data = path.read_bytes()
    if not data.startswith(START[: len(data)]):  # before a torn line is cut off someone else's file
        raise RunError(
            f"{path} is not a samples file of reftune: it begins with {data[:40]!r}. "
            "Give another samples path."
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
                f"reftune: {line[:60]!r}. Give another samples path, or remove the file."
            ) from error
    return header, samples, whole


def _resume(
    path: Path,
    header: dict[str, Any],
    task: Task,
    engine: Engine,
    n: int,
    names: list[str | None] | None,
) -> dict[int, Sample]:
    """Return the samples of an earlier run and cut a torn last line off the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return {}
    found, samples, whole = _read(path)
    if found is not None:
        _check_header(path, found, header)
    done = {sample.index: sample for sample in samples if sample.index < n}
    for index, sample in done.items():
        adapter = None if names is None else names[index]
        if sample.adapter != adapter:
            raise RunError(
                f"{path}: example {index} was generated with adapter {sample.adapter!r}, now it is "
                f"{adapter!r}. Give another samples path, or remove the file."
            )
        if sample.prompt != _prompt_text(task.example(index), engine, task):
            raise RunError(
                f"{path}: example {index} had another prompt ({sample.where}); the data changed. "
                "Give another samples path, or remove the file."
            )
    with path.open("r+b") as file:
        file.truncate(whole)
    return done


def _check_header(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    keys = [key for key in wanted if found.get(key) != wanted[key]]
    if keys:
        differences = "; ".join(f"{k}: {found.get(k)!r}, now {wanted[k]!r}" for k in keys)
        raise RunError(
            f"{path} belongs to another evaluation ({differences}). Give another samples path, "
            "or remove the file."
        )
