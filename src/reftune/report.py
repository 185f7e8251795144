"""A report on a run or an experiment: tables and pictures, as Markdown and as one HTML page.

sections(Records) -> [Section] -> Markdown with PNG files beside it, or a self-contained page
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from reftune import figures
from reftune.pages import PICTURES, Picture, Section, Table, to_html, to_markdown
from reftune.paper import TABLE_17, TABLES, PaperTable
from reftune.records import (
    OURS,
    Record,
    Records,
    average,
    average_error,
    compare,
    lora_references,
    mean_and_deviation,
    read,
    read_otherwise,
    score,
    standard_error,
    trained,
)
from reftune.run import write_text
from reftune.samples import OverSeeds
from reftune.tasks.commonsense import NAMES as COMMONSENSE
from reftune.tasks.commonsense import first_named

MARKDOWN, PAGE = "report.md", "report.html"
SHOWN, REPLIES = 4, 20
"""How many generations of a task are shown; more where only a reader can tell how good they are."""
_DASH = "–"


def write_report(directory: str | Path, out: str | Path | None = None) -> tuple[Path, Path]:
    """Write report.md (its pictures in report/) and report.html; return both files.

    Raises RunError where no finished run is in the directory.
    """
    records = read(directory)
    target = Path(out) if out is not None else Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    title = records.directory.resolve().name
    parts = list(sections(records))
    for picture in (p for part in parts for p in part.pictures):
        (target / PICTURES).mkdir(exist_ok=True)
        part = target / PICTURES / f".{picture.name}.part"
        part.write_bytes(picture.png)
        part.replace(target / PICTURES / picture.name)
    write_text(target / MARKDOWN, to_markdown(title, parts))
    write_text(target / PAGE, to_html(title, parts))
    return target / MARKDOWN, target / PAGE


def sections(records: Records) -> Iterator[Section]:
    """Yield the parts of a report for which there is something to show."""
    yield _scores(records)
    yield from _standard_errors(records)
    yield from _first_named(records)
    yield from _heldout(records)
    if importlib.util.find_spec("matplotlib") is not None:
        yield from _pictures(records)
    yield from _differences(records)
    yield from _beside_the_paper(records)
    yield from _table_17(records)
    yield from _generations(records)
    yield _conditions(records)


# --- sections -------------------------------------------------------------------------------------


def _scores(records: Records) -> Section:
    tasks, arms = records.task_names, records.arms
    several = len(tasks) > 1
    costs = {"seconds": "training, s", "cpu_seconds": "CPU-s", "tokens_per_second": "tokens/s"}
    costs = {key: name for key, name in costs.items() if records.all_know(key)}
    columns = [*(_column(records, t) for t in tasks), *(["average"] if several else [])]
    header = ("method", "parameters", "% of base", *columns, *costs.values(), "seeds")
    rows, values = [], []
    for who in _others(records):
        numbers = [score(records.runs[:1], task, who) for task in tasks]
        numbers += [average(records.runs[:1], tasks, who)] if several else []
        dashes = [_DASH] * (len(costs) + 1)
        rows.append((who, "0", "0", *(_number(v, False) for v in numbers), *dashes))
    skipped = len(rows)
    for arm, runs in arms.items():
        numbers = [score(runs, task) for task in tasks]
        numbers += [average(runs, tasks)] if several else []
        values.append(numbers)
        rows.append(
            (
                arm,
                f"{runs[0].results['parameters']:,}",
                f"{runs[0].results['percent']:.4f}",
                *(_number(v) for v in numbers),
                *(f"{_mean(trained(runs, key)):,.0f}" for key in costs),
                str(len(runs)),
            )
        )
    notes = ["Per cent. ± is the standard deviation over seeds; bold is the best trained mean."]
    for cell in records.missing:
        error = f": {cell['error']}" if cell.get("error") else ""
        notes.append(f"Missing: {cell['cell']} ({cell['status']}{error}).")
    return Section("Scores", tuple(notes), (Table(header, rows, _best(values, skipped)),))


def _best(values: Sequence[Sequence[OverSeeds | None]], skipped: int) -> frozenset[tuple[int, int]]:
    """Return the cell of each column of scores with the highest mean, of several rows."""
    found = set()
    for column in range(len(values[0]) if len(values) > 1 else 0):
        numbers = [row[column] for row in values]
        means = [round(v.mean, 1) for v in numbers if v is not None]
        found |= {
            (skipped + row, 3 + column)
            for row, v in enumerate(numbers)
            if v is not None and round(v.mean, 1) == max(means)
        }
    return frozenset(found)


def _standard_errors(records: Records) -> Iterator[Section]:
    tasks = records.task_names
    rows = []
    for arm, runs in records.arms.items():
        errors = [standard_error(runs, task) for task in tasks]
        errors += [average_error(runs, tasks)] if len(tasks) > 1 else []
        rows.append((arm, *(_DASH if e is None else f"{e:.1f}" for e in errors)))
    if tasks and any(cell != _DASH for row in rows for cell in row[1:]):
        columns = [f"{task} ({_examples(records, task)})" for task in tasks]
        header = ("method", *columns, *(["average"] if len(tasks) > 1 else []))
        note = "Of one run's score, by the choice of examples, in per cent; examples in brackets."
        yield Section("Standard errors", (note,), (Table(header, rows),))


def _first_named(records: Records) -> Iterator[Section]:
    """Show commonsense as LLM-Adapters scores it, where that makes a difference."""
    tasks = [task for task in records.task_names if task in COMMONSENSE]
    if not tasks:
        return
    whose = [(who, who, list(records.runs[:1])) for who in _others(records)]
    whose += [(arm, OURS, runs) for arm, runs in records.arms.items()]
    rows, differ = [], False
    for name, who, runs in whose:
        found = [read_otherwise(runs, t, partial(first_named, t), who) for t in tasks]
        strict = [score(runs, task, who) for task in tasks]
        differ |= any(f and _number(f) != _number(s) for f, s in zip(found, strict, strict=True))
        mean = _DASH if None in found else f"{fmean(map(_mean, found)):.1f}"
        rows.append((name, *(_number(v, who == OURS) for v in found), mean))
    if differ:
        note = (
            "The first option that a completion names, in any sentence: LLM-Adapters' reading, by "
            "which the LoRA of the paper's Table 1 was scored. Elsewhere here, as the paper's "
            'LoReFT was, all that follows "the correct answer is " has to be the answer.'
        )
        table = Table(("method", *tasks, "average of these"), rows)
        yield Section("Commonsense by the first option named", (note,), (table,))


def _heldout(records: Records) -> Iterator[Section]:
    rows = []
    for arm, runs in records.arms.items():
        found = [run.results["heldout"] for run in runs if "heldout" in run.results]
        if found:
            ours = mean_and_deviation([one["adapter"] for one in found])
            sd = "" if ours is None or ours.sd is None else f" ± {ours.sd:.4f}"
            loss = f"{_mean(ours):.4f}{sd}"
            rows.append((arm, f"{found[0]['base']:.4f}", loss, str(found[0]["n"])))
    if rows:
        note = "Nats per completion token; ± is the standard deviation over seeds."
        header = ("method", "base", "trained", "examples")
        yield Section("Held-out loss", (note,), (Table(header, rows),))


def _pictures(records: Records) -> Iterator[Section]:
    arms, tasks = records.arms, records.task_names
    logs = {arm: [run.log() for run in runs] for arm, runs in arms.items()}
    logs = {arm: found for arm, found in logs.items() if all(found)}
    if logs:
        picture = Picture("loss.png", "training loss over the steps", figures.losses(logs))
        note = "The mean over seeds; the band is from the lowest to the highest."
        yield Section("Training loss", (note,), pictures=(picture,))
    scores = {arm: average(runs, tasks) for arm, runs in arms.items()}
    base = average(records.runs[:1], tasks, "base") if tasks else None
    line = None if base is None else ("base model", base.mean)
    what = "score, %" if len(tasks) == 1 else f"mean score on {len(tasks)} tasks, %"
    costs: Mapping[str, tuple[str, Callable[[Sequence[Record]], float]]] = {
        "parameters": ("trained parameters", lambda runs: float(runs[0].results["parameters"])),
        "seconds": ("training, seconds", lambda runs: _mean(trained(runs, "seconds"))),
    }
    if records.all_know("cpu_seconds"):  # which hardly depend on load
        cpu_seconds = ("training, CPU-seconds", lambda runs: _mean(trained(runs, "cpu_seconds")))
        costs = {**costs, "seconds": cpu_seconds}
    pictures = []
    for name, (cost, of) in costs.items():
        points = {
            arm: figures.Point(of(runs), found, _group(arm, runs[0]))
            for arm, runs in arms.items()
            if (found := scores[arm]) is not None
        }
        if points:
            png = figures.against_cost(points, cost, line, what)
            pictures.append(Picture(f"score-{name}.png", f"{what} against {cost}", png))
    if pictures:
        note = "Bars are the deviation over seeds; no point above the dashed line costs less."
        yield Section("Score against cost", (note,), pictures=tuple(pictures))


def _differences(records: Records) -> Iterator[Section]:
    arms = records.arms
    references = {"the base model": list(arms), **lora_references(arms)}
    for name, compared in references.items():
        rows = []
        for arm in compared:
            for task in records.task_names:
                found = compare(arms[arm], arms.get(name), task)
                if found is not None:
                    d = found.difference
                    error = "" if d.stderr is None else f" ± {100 * d.stderr:.1f}"
                    mean = f"{100 * d.mean:+.1f}{error}"
                    rows.append(
                        (arm, task, str(d.wins), str(d.losses), str(d.n), mean, _p(found.p))
                    )
        if rows:
            header = ("method", "task", "won", "lost", "of", "difference, %", "p")
            notes = (
                f"Examples on which a method scores higher (won) and lower than {name}; an "
                "example's score is its mean over seeds. ± is the standard error of the paired "
                "difference, p of the exact sign test (for one seed McNemar's).",
            )
            yield Section(f"Against {name}", notes, (Table(header, rows),))


def _beside_the_paper(records: Records) -> Iterator[Section]:
    tables: list[Table] = []
    notes = ["Ours / the paper's, in per cent. The models differ: compare orders, not numbers."]
    for paper in TABLES:
        tasks = [t for t in records.task_names if any(t in row for row in paper.scores.values())]
        shared = {arm: runs for arm, runs in records.arms.items() if runs[0].method in paper.scores}
        if tasks and shared:
            tables.append(_paper_table(paper, shared, tasks))
    if tables:
        yield Section("Beside the paper", tuple(notes), tuple(tables))


def _paper_table(
    paper: PaperTable, arms: Mapping[str, Sequence[Record]], tasks: Sequence[str]
) -> Table:
    header = (f"{paper.model} ({paper.source})", "% of base", *tasks, "average of these")
    rows = []
    for arm, runs in arms.items():
        method = runs[0].method
        theirs = [paper.scores[method][task] for task in tasks]
        own = [*(score(runs, task) for task in tasks), average(runs, tasks)]
        theirs.append(sum(theirs) / len(theirs))
        cells = [f"{_number(a, False)} / {b:.1f}" for a, b in zip(own, theirs, strict=True)]
        percent = f"{runs[0].results['percent']:.3f} / {paper.percent[method]:g}"
        rows.append((arm, percent, *cells))
    return Table(header, rows)


def _table_17(records: Records) -> Iterator[Section]:
    """Show the order of the interventions where at least three were run."""
    tasks = records.task_names
    found = [
        (arm, runs[0].method, value)
        for arm, runs in records.arms.items()
        if runs[0].method in TABLE_17 and (value := average(runs, tasks)) is not None
    ]
    methods = {method for _, method, _ in found}
    if len(methods) < 3:
        return
    theirs = sorted(methods, key=lambda m: -TABLE_17[m].llama_7b)
    rows = [
        (
            arm,
            TABLE_17[m].text,
            _number(value),
            str(place),
            f"{TABLE_17[m].llama_7b:.1f}",
            f"{TABLE_17[m].llama_13b:.1f}",
            str(theirs.index(m) + 1),
        )
        for place, (arm, m, value) in enumerate(sorted(found, key=lambda f: -f[2].mean), 1)
    ]
    header = ("method", "edit", "ours", "rank", "LLaMA-7B", "LLaMA-13B", "rank (7B)")
    note = "The paper's are means over four arithmetic sets (Table 17), on other models than ours."
    yield Section("The order of the interventions", (note,), (Table(header, rows),))


def _generations(records: Records) -> Iterator[Section]:
    tables, names = [], []
    for task in records.task_names:
        columns = {arm: runs[0].samples(OURS, task) for arm, runs in records.arms.items()}
        base = records.runs[0].samples("base", task)
        columns = {arm: found for arm, found in columns.items() if found}
        if not columns:
            continue
        judged = _result(records, task).get("metric") != "answered"
        shown, length, marks = (SHOWN, 400, ("✗ ", "✓ ")) if judged else (REPLIES, 1000, ("", ""))
        first = next(iter(columns.values()))[:shown]
        header = ("prompt", "answer", *(["base"] if base else []), *columns)
        rows = []
        for number, sample in enumerate(first):
            replies = [found[number] for found in ([base] if base else []) if number < len(found)]
            replies += [found[number] for found in columns.values() if number < len(found)]
            if len(replies) == len(header) - 2 and {r.index for r in replies} == {sample.index}:
                marked = (marks[r.score > 0.5] + _cut(r.completion, length) for r in replies)
                rows.append((_cut(sample.prompt), _cut(sample.gold), *marked))
        tables.append(Table(header, rows, long=True))
        names.append(f"{len(rows)} examples of {task}")
    if tables:
        note = f"The first {', the first '.join(names)}; each arm's first seed."
        yield Section("Generations", (note,), tuple(tables))


def _conditions(records: Records) -> Section:
    run = records.runs[0]
    c = run.config
    facts = {
        "base model": c["model"],
        "dtype": run.results.get("dtype", c["dtype"]),
        "training data": ", ".join(t) if isinstance(t := c["data"]["train"], list) else t,
        "examples": run.results["examples"],
        "optimizer steps": run.results["train"]["steps"],
        "batch": f"{c['train']['batch_size']} x {c['train']['gradient_accumulation_steps']}",
        "seeds": ", ".join(map(str, sorted({r.seed for r in records.runs}))),
        "learning rates": ", ".join(_learning_rates(records)),
        "versions": ", ".join(f"{k} {v}" for k, v in run.results["versions"].items()),
    }
    rows = [(name, str(value)) for name, value in facts.items()]
    note = "Of the first run; each run's config.yaml and results.json have all of it."
    return Section("Conditions", (note,), (Table(("what", "value"), rows),))


# --- cells ----------------------------------------------------------------------------------------


def _learning_rates(records: Records) -> list[str]:
    found = {a: runs[0].config["train"]["learning_rate"] for a, runs in records.arms.items()}
    return [f"{arm} {rate:g}" for arm, rate in found.items()]


def _others(records: Records) -> list[str]:
    """Return who was scored without training, such as the base model."""
    return list(
        dict.fromkeys(
            who
            for scores in records.runs[0].tasks.values()
            for who in scores
            if who != OURS
        )
    )  # fmt: skip


def _column(records: Records, task: str) -> str:
    metric = _result(records, task).get("metric", "accuracy")
    return task if metric == "accuracy" else f"{task} ({metric})"


def _examples(records: Records, task: str) -> int:
    return int(_result(records, task)["n"])


def _result(records: Records, task: str) -> Mapping[str, Any]:
    return next(run.tasks[task][OURS] for run in records.runs if task in run.tasks)


def _group(arm: str, run: Record) -> str:
    """Return what arms of one variant have in common: what is before the grid's values."""
    return arm.partition("-")[0] if "-" in arm else arm


def _mean(value: OverSeeds | None) -> float:
    return value.mean if value is not None else 0.0


def _number(value: OverSeeds | None, deviation: bool = True) -> str:
    if value is None:
        return _DASH
    sd = "" if value.sd is None or not deviation else f" ± {value.sd:.1f}"
    return f"{value.mean:.1f}{sd}"


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}" if value < 0.1 else f"{value:.2f}"


def _cut(text: str, length: int = 400) -> str:
    text = text.strip()
    return text if len(text) <= length else f"{text[: length // 2]} … {text[-length // 2 :]}"
