"""Benchmarks: each family in one file, each benchmark a `Task`, found by name in `TASKS`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, TypeAlias

from reftune.errors import ReftConfigError, did_you_mean
from reftune.generate import Sampling
from reftune.prompts import Example, TemplateName
from reftune.tasks.commonsense import NAMES as COMMONSENSE
from reftune.tasks.commonsense import CommonsenseTask
from reftune.tasks.demo import DemoTask


class Task(Protocol):
    """A set of prompts with known answers, and the rule by which a completion is right."""

    @property
    def name(self) -> str:
        """Return the name under which `get_task` finds the task."""

    @property
    def num_examples(self) -> int:
        """Return how many examples there are."""

    @property
    def sampling(self) -> Sampling:
        """Return how the benchmark generates."""

    @property
    def template(self) -> TemplateName:
        """Return the template that `encode_prompt` puts around a prompt."""

    def example(self, i: int) -> Example:
        """Return example `i`, 0 <= i < num_examples."""

    def gold(self, example: Example) -> str:
        """Return the answer that `extract` should find."""

    def extract(self, text: str) -> str:
        """Return the answer in a completion, '' if it has none."""

    def score(self, example: Example, completion: str) -> float:
        """Return 1.0 for a right completion and 0.0 for a wrong one."""


TaskFactory: TypeAlias = Callable[[str, Path, str, int | None], Task]

TASKS: Mapping[str, TaskFactory] = MappingProxyType(
    {**dict.fromkeys(COMMONSENSE, CommonsenseTask), "demo": DemoTask}
)


def get_task(
    name: str, data_dir: str | Path, split: str = "test", limit: int | None = None
) -> Task:
    """Return the task `name`, with the first `limit` rows of `split` under `data_dir`.

    Raises:
        ReftConfigError: there is no such task.
        DataError: its file is missing or has a row that does not fit.
    """
    if name not in TASKS:
        raise ReftConfigError(
            f"there is no task {name!r}; there are {', '.join(TASKS)}."
            + did_you_mean(name, list(TASKS))
        )
    return TASKS[name](name, Path(data_dir), split, limit)
