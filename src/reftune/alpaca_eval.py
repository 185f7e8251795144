"""Replies for a judge: a samples file of `alpaca_eval`, written as Alpaca-Eval reads it."""

import json
import os
from pathlib import Path

from reftune.errors import RunError
from reftune.evaluate import read_samples
from reftune.prompts import Instruction
from reftune.tasks import Task


def write_alpaca_eval(
    samples: str | Path, task: Task, path: str | Path, generator: str
) -> list[dict[str, str]]:
    """Write {instruction, output, generator, dataset} of each sample, in the task's order.

    The file is what `alpaca_eval --model_outputs` takes. `dataset` is the row's own (helpful_base,
    koala, ...), else the task's name.

    Raises:
        RunError: there is no such samples file, or it is not of this task.
    """
    rows = []
    for sample in read_samples(samples):
        if sample.index >= task.num_examples:
            raise RunError(f"{samples} has a sample {sample.index}, {task.name} no such example.")
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
