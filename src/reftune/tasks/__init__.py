"""Benchmarks: each family in one file, each benchmark a `Task`, found by name in `TASKS`."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from reftune.errors import ReftConfigError, did_you_mean
from reftune.prompts import Example
from reftune.tasks.arithmetic import COT_NAME, AquaTask, ArithmeticTask, Gsm8kTask
from reftune.tasks.arithmetic import NAMES as ARITHMETIC
from reftune.tasks.base import Decoding as Decoding
from reftune.tasks.base import FamilyTask
from reftune.tasks.base import Split as Split
from reftune.tasks.base import Task as Task
from reftune.tasks.commonsense import NAMES as COMMONSENSE
from reftune.tasks.commonsense import CommonsenseTask
from reftune.tasks.demo import DemoTask
from reftune.tasks.instruct import NAMES as INSTRUCT
from reftune.tasks.instruct import InstructTask
from reftune.tasks.labels import SETS as LABELS
from reftune.tasks.labels import LabelTask
from reftune.tasks.procedural import NAMES as PROCEDURAL
from reftune.tasks.procedural import ProceduralTask

TASKS: Mapping[str, type[FamilyTask]] = MappingProxyType(
    {
        **dict.fromkeys(COMMONSENSE, CommonsenseTask),
        **dict.fromkeys(ARITHMETIC, ArithmeticTask),
        "AQuA": AquaTask,
        COT_NAME: Gsm8kTask,
        **dict.fromkeys(INSTRUCT, InstructTask),
        **dict.fromkeys(LABELS, LabelTask),
        **dict.fromkeys(PROCEDURAL, ProceduralTask),
        "demo": DemoTask,
    }
)


def get_task(
    name: str,
    data_dir: str | Path | None = None,
    split: Split = "test",
    limit: int | None = None,
    decoding: Decoding = "published",
    max_new_tokens: int | None = None,
) -> Task:
    """Return the task `name`, with the first `limit` rows of `split`.

    Rows are read below `data_dir`; without it, or "hub", from the Hub's original data set.
    `max_new_tokens` takes the place of the task's own.

    Raises:
        ReftConfigError: there is no such task, split or decoding.
        DataError: its file is missing or has a row that does not fit.
    """
    return _family(name)(name, data_dir, split, limit, decoding, max_new_tokens)


def training_examples(
    names: Sequence[str],
    data_dir: str | Path | None = None,
    limit: int | None = None,
    seed: int = 42,
    split: Split = "train",
) -> list[Example]:
    """Mix what the named tasks have to train on and keep the first `limit` of the mixture.

    `split` is "train", or "fit": the same without the rows of "validation", on which settings are
    tuned. Raises ReftConfigError and DataError as `get_task` does.
    """
    tasks = [get_task(name, data_dir, split) for name in names]
    examples = [task.example(i) for task in tasks for i in range(task.num_examples)]
    random.Random(seed).shuffle(examples)
    return examples[:limit]


def template_of(names: Sequence[str]) -> str:
    """Return the template that the named tasks share.

    Raises:
        ReftConfigError: there is no such task, or they have not one template.
    """
    templates = {name: _family(name).template for name in names}
    if len(set(templates.values())) > 1:
        listed = ", ".join(f"{name}: {template}" for name, template in templates.items())
        raise ReftConfigError(f"these tasks have prompts of several templates ({listed}).")
    return next(iter(templates.values()))


def _whose_last_part_is(name: str) -> str:
    """Return `" Did you mean 'words/sst2'?"` for "sst2"."""
    found = [repr(task) for task in TASKS if task.lower().endswith(f"/{name.lower()}")]
    return f" Did you mean {' or '.join(found)}?" if found else ""


def _family(name: str) -> type[FamilyTask]:
    if name not in TASKS:
        raise ReftConfigError(
            f"there is no task {name!r}; there are {', '.join(TASKS)}."
            + (did_you_mean(name, list(TASKS)) or _whose_last_part_is(name))
        )
    return TASKS[name]
