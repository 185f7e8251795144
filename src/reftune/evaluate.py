"""Evaluation: run(task, engine) -> Result, with every generation kept, resumable and comparable.

Several adapters and the base are evaluated in one pass (`run_adapters`): rows of different
adapters share batches. What is kept, and how evaluations compare, is in `reftune.samples`.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol, final, runtime_checkable

from peft import PeftModel

from reftune.errors import ReftConfigError, RunError
from reftune.generate import AdapterEngine, Completion, Engine, HFEngine
from reftune.methods import as_base
from reftune.prompts import Example, encode_prompt, render_prompt
from reftune.samples import (
    FORMAT,
    PairedDifference,
    Result,
    Sample,
    earlier_samples,
    paired_difference,
    read_samples,
    result_of,
    write_row,
)
from reftune.tasks import Task

__all__ = [
    "Decides",
    "PairedDifference",
    "Result",
    "Sample",
    "paired_difference",
    "read_samples",
    "run",
    "run_adapters",
    "run_all",
]


@runtime_checkable
class Decides(Protocol):
    """A task that can tell before a completion ends what its score will be."""

    def is_decided(self, example: Example, text: str) -> bool:
        """Return True only if `score(example, text + more)` is the same for every `more`.

        '' is one, and other readings of the answer that reports have do not change either. `text`
        is a completion so far, and may end within a word. An engine that can stop there does;
        samples then hold the completion up to there.
        """


def run(
    task: Task,
    engine: Engine,
    *,
    limit: int | None = None,
    adapters: str | Sequence[str | None] | None = None,
    samples_path: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    identity: str | None = None,
) -> Result:
    """Generate and score the first `limit` examples of a task.

    `adapters` is one name for all examples or one per example (None: the base model); without it,
    the engine's active adapter acts. `progress(done, total)` is called after every example.
    With `samples_path`, samples are written as they finish and an earlier file is continued; greedy
    and beam search then give what an uninterrupted run gives, sampling another draw. `identity` is
    what the file is said to be of, where that is not the engine's.

    Raises:
        RunError: the file belongs to another task, model, adapter or settings, or is damaged.
        ReftConfigError: `limit` is below 1, or `adapters` has another length than the examples.
    """
    n = _count(task, limit)
    names = _adapter_per_example(adapters, n)
    path = None if samples_path is None else Path(samples_path)
    with _opened(task, engine, n, {"": (names, identity or engine.identity, path)}) as jobs:
        _evaluate(task, engine, n, jobs, progress)
    return result_of(task.name, task.metric, jobs[0].in_order(n))


def run_adapters(
    task: Task,
    engine: AdapterEngine,
    adapters: Mapping[str, str | None],
    *,
    limit: int | None = None,
    samples: Mapping[str, Path] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Result]:
    """Generate and score a task with several adapters in one pass: {who: result}.

    `adapters` says for each who which loaded adapter acts (None: the base model). Greedy
    completions are those of one evaluation after another, up to the rounding of the model's dtype.
    `samples` names a samples file for each; the other arguments are those of `run`. Rows of all
    share batches, so the `seconds` of each are an equal share of the time that it took part in.

    Raises:
        RunError: a file belongs to another task, model, adapter or settings, or is damaged.
        ReftConfigError: `limit` is below 1, or the model has no such adapter.
    """
    n = _count(task, limit)
    parts = {
        who: ([name] * n, engine.identity_of(name), samples[who] if samples else None)
        for who, name in adapters.items()
    }
    with _opened(task, engine, n, parts) as jobs:
        _evaluate(task, engine, n, jobs, progress)
    return {job.who: result_of(task.name, task.metric, job.in_order(n)) for job in jobs}


def run_all(
    tasks: Sequence[Task],
    engine: HFEngine | AdapterEngine,
    *,
    base: bool,
    samples: Path | None,
    progress: Callable[[str, int, int], None],
    adapters: Sequence[str] = (),
    active: str = "adapter",
) -> dict[str, dict[str, Any]]:
    """Evaluate tasks with adapters, and with the `base` model: {task: {who: result}}.

    Without names in `adapters` the active one of an HFEngine acts, and its who is `active`. Named
    ones are evaluated in one pass, and each is its own who. Generations go to
    `samples`/WHO/TASK.jsonl, from which a killed evaluation goes on; those of the base do so beside
    any adapter. `progress(what, done, total)` is called after every example.
    """
    if "base" in [*adapters, active]:
        raise ReftConfigError("an adapter named 'base' would be taken for the base: rename it.")
    results: dict[str, dict[str, Any]] = {task.name: {} for task in tasks}
    for task in tasks:
        whos: dict[str, str | None] = ({"base": None} if base else {}) | {a: a for a in adapters}
        if adapters:
            paths = {w: samples / w / f"{task.name}.jsonl" for w in whos} if samples else None
            tell = functools.partial(progress, task.name)
            found = run_adapters(task, engine, whos, samples=paths, progress=tell)
            results[task.name] = {who: dataclasses.asdict(r) for who, r in found.items()}
            continue
        assert isinstance(engine, HFEngine), "name the adapters of another engine"
        for who in [*whos, active]:
            path = samples / who / f"{task.name}.jsonl" if samples else None
            tell = functools.partial(progress, f"{task.name}, {who}")
            with as_base(engine.model) if who == "base" else nullcontext():
                # A PeftModel whose adapters are off still has them among its weights.
                switched_off = who == "base" and isinstance(engine.model, PeftModel)
                identity = engine.identity_of(None) if switched_off else None
                result = run(task, engine, samples_path=path, progress=tell, identity=identity)
            results[task.name][who] = dataclasses.asdict(result)
    return results


@final
@dataclass
class _Job:
    """One evaluation of a pass: which adapter acts on each example, and where samples go."""

    who: str
    names: list[str | None] | None
    samples: dict[int, Sample] = field(default_factory=dict)
    file: IO[str] | None = None
    seconds: float = 0.0  # that its next sample gets

    def adapter(self, i: int) -> str | None:
        return None if self.names is None else self.names[i]

    def add(self, sample: Sample) -> None:
        self.samples[sample.index] = sample
        if self.file is not None:
            write_row(self.file, dataclasses.asdict(sample))

    def in_order(self, n: int) -> list[Sample]:
        return [self.samples[i] for i in range(n)]


@contextmanager
def _opened(
    task: Task,
    engine: Engine,
    n: int,
    parts: Mapping[str, tuple[list[str | None] | None, str, Path | None]],
) -> Iterator[list[_Job]]:
    """Give a job for each who: (adapter per example, identity, samples file), its file open."""
    with ExitStack() as stack:
        jobs = []
        for who, (names, identity, path) in parts.items():
            job = _Job(who, names)
            if path is not None:
                header = _header(task, identity)
                found = [s for s in earlier_samples(path, header) if s.index < n]
                _check_samples(path, found, job, task, engine)
                job.samples = {s.index: s for s in found}
                job.file = stack.enter_context(path.open("a", encoding="utf-8"))
                if path.stat().st_size == 0:
                    write_row(job.file, header)
            jobs.append(job)
        yield jobs


def _evaluate(
    task: Task,
    engine: Engine,
    n: int,
    jobs: Sequence[_Job],
    progress: Callable[[int, int], None] | None,
) -> None:
    """Generate what the jobs do not have yet, keeping each sample as it finishes."""
    todo = [(i, job) for i in range(n) for job in jobs if i not in job.samples]
    examples = {i: task.example(i) for i, _ in todo}
    encoded = {
        i: encode_prompt(e.prompt, engine.tokenizer, task.template) for i, e in examples.items()
    }
    last = time.perf_counter()

    def finish(k: int, completion: Completion) -> None:
        nonlocal last
        i, job = todo[k]
        now = time.perf_counter()
        going_on = [each for each in jobs if len(each.samples) < n]
        for each in going_on:
            each.seconds += (now - last) / len(going_on)
        seconds, job.seconds, last = job.seconds, 0.0, now
        job.add(_sample(task, engine, i, examples[i], completion, job.adapter(i), seconds))
        if progress is not None:
            progress(sum(len(job.samples) for job in jobs), n * len(jobs))

    prompts = [encoded[i] for i, _ in todo]
    named = any(job.names is not None for job in jobs)
    adapters = [job.adapter(i) for i, job in todo] if named else None
    if isinstance(engine, AdapterEngine) and isinstance(task, Decides):
        decided = task.is_decided
        engine.generate(
            prompts,
            task.sampling,
            adapters,
            finish,
            is_decided=lambda k, text: decided(examples[todo[k][0]], text),
        )
    else:
        engine.generate(prompts, task.sampling, adapters, finish)


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


def _count(task: Task, limit: int | None) -> int:
    """Return how many examples are evaluated."""
    if limit is not None and limit < 1:
        raise ReftConfigError(f"limit={limit} is not accepted: it must be 1 or more, or None.")
    n = task.num_examples if limit is None else min(limit, task.num_examples)
    if n == 0:
        raise RunError(f"task {task.name!r} has no examples: there is nothing to evaluate.")
    return n


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


def _header(task: Task, identity: str) -> dict[str, Any]:
    """Return all that decides a generation besides its prompt and its row's adapter."""
    header = {
        "reftune_samples": FORMAT,
        "task": task.name,
        "template": task.template,
        "sampling": task.sampling.recorded(),
        "model": identity,
    }
    plain: dict[str, Any] = json.loads(json.dumps(header))  # tuples become lists, as in the file
    return plain


def _check_samples(
    path: Path, samples: Sequence[Sample], job: _Job, task: Task, engine: Engine
) -> None:
    """Raise RunError where an earlier sample had another adapter or prompt than it would now."""
    for sample in samples:
        if sample.adapter != job.adapter(sample.index):
            raise RunError(
                f"{path}: example {sample.index} was generated with adapter {sample.adapter!r}, "
                f"now it is {job.adapter(sample.index)!r}. Give another folder, or remove "
                "the file."
            )
        if sample.prompt != _prompt_text(task.example(sample.index), engine, task):
            raise RunError(
                f"{path}: example {sample.index} had another prompt ({sample.where}); the data "
                "changed. Give another folder, or remove the file."
            )
