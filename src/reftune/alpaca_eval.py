"""Replies for a judge: a samples file of `alpaca_eval`, written as Alpaca-Eval reads it."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from reftune.errors import RunError
from reftune.evaluate import read_samples
from reftune.prompts import Instruction
from reftune.saving import write_text
from reftune.tasks import Task

NAME = "alpaca_eval"


def write_outputs(
    tasks: Iterable[Task],
    scores: Mapping[str, Iterable[str]],
    samples: Path,
    generators: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write the replies to `alpaca_eval` for a judge, if that is one of the tasks.

    `scores` has each WHO by task, whose samples are `samples`/WHO/alpaca_eval.jsonl; `generators`
    names a WHO as the judge's leaderboard will. Files: alpaca_eval/WHO.json beside `samples`.
    """
    folder = samples.parent / NAME
    for task in (task for task in tasks if task.name == NAME):
        folder.mkdir(parents=True, exist_ok=True)
        for who in scores[NAME]:
            path = samples / who / f"{NAME}.jsonl"
            write_alpaca_eval(path, task, folder / f"{who}.json", generators.get(who, who))


def write_alpaca_eval(
    samples: str | Path, task: Task, path: str | Path, generator: str
) -> list[dict[str, str]]:
    """Write {instruction, output, generator, dataset} of each sample, in the task's order.

    The file is what `alpaca_eval --model_outputs` takes. `dataset` is the row's own (helpful_base,
    koala, ...), else the task's name. Samples of an earlier, larger `limit` are left out.

    Raises:
        RunError: there is no such samples file, or it is not of this task.
    """
    rows = []
    for sample in read_samples(samples):
        if sample.index >= task.num_examples:
            continue
        example = task.example(sample.index)
        if task.gold(example) != sample.gold:
            raise RunError(
                f"{samples}: sample {sample.index} is not of {task.name}'s example "
                f"{example.where}; give the task and data that were evaluated."
            )
        prompt = example.prompt
        rows.append(
            {
                "instruction": prompt.text if isinstance(prompt, Instruction) else sample.prompt,
                "output": sample.extracted,
                "generator": generator,
                "dataset": str(example.fields.get("dataset", task.name)),
            }
        )
    write_text(Path(path), json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    return rows
