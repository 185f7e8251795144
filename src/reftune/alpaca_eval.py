"""Replies for a judge: a samples file of `alpaca_eval`, written as Alpaca-Eval reads it."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from reftune.errors import RunError
from reftune.evaluate import read_samples
from reftune.prompts import Instruction
from reftune.tasks import Task

NAME = "alpaca_eval"


def write_outputs(tasks: Iterable[Task], samples: Path, generators: Mapping[str, str]) -> None:
    """Write what is in `samples`/WHO of the task `alpaca_eval` for a judge, if that is a task.

    `generators` names each WHO, as the judge's leaderboard will. The files are
    alpaca_eval/WHO.json beside `samples`.
    """
    folder = samples.parent / NAME
    for task in tasks:
        for who, generator in generators.items() if task.name == NAME else ():
            folder.mkdir(parents=True, exist_ok=True)
            path = samples / who / f"{task.name}.jsonl"
            write_alpaca_eval(path, task, folder / f"{who}.json", generator)


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
    part = Path(f"{path}.part")
    part.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)
    return rows
