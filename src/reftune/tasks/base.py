"""What a task is, and what all of them share."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import ClassVar, Final, Literal, Protocol, TypeAlias, get_args

from reftune.data import Row
from reftune.errors import ReftConfigError, did_you_mean
from reftune.generate import Sampling
from reftune.prompts import Example, TemplateName
from reftune.tasks.leaks import hold_out
from reftune.tasks.rows import task_rows

# train: all training rows. validation: some of them, to tune settings on; fit: the others.
Split: TypeAlias = Literal["train", "fit", "validation", "test"]
# published: as the paper's commands decode the task, one of the other two.
Decoding: TypeAlias = Literal["published", "greedy", "sampling"]

PAPER_SEED: Final = 42


class Task(Protocol):
    """A set of prompts with known answers, and the rule by which a completion is right."""

    @property
    def name(self) -> str:
        """Return the name under which `get_task` finds the task."""

    @property
    def metric(self) -> str:
        """Return what the mean of the scores is, for instance "accuracy"."""

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


class FamilyTask(ABC):
    """One task of a family: its examples, and how the family prompts and decodes.

    Raises:
        ReftConfigError: there is no such split or decoding.
        DataError: its file is missing or has a row that does not fit.
    """

    metric: ClassVar[str] = "accuracy"
    template: ClassVar[TemplateName] = "none"
    greedy: ClassVar[Sampling]
    published: ClassVar[Sampling | None] = None  # where the paper's commands are not greedy
    sampled: ClassVar[Sampling | None] = None  # where there is a published way to sample

    def __init__(
        self,
        name: str,
        data_dir: str | Path | None,
        split: Split = "test",
        limit: int | None = None,
        decoding: Decoding = "published",
        max_new_tokens: int | None = None,
    ) -> None:
        _check("split", split, get_args(Split))
        _check("decoding", decoding, get_args(Decoding))
        self.name = name
        sampling = {
            "published": self.published or self.greedy,
            "greedy": self.greedy,
            "sampling": self.sampled or self.published or self.greedy,
        }[decoding]
        if max_new_tokens is not None:
            sampling = replace(sampling, max_new_tokens=max_new_tokens)
        self.sampling = sampling
        self._examples = self._load(data_dir, split, limit)

    @property
    def num_examples(self) -> int:
        """Return how many examples there are."""
        return len(self._examples)

    def example(self, i: int) -> Example:
        """Return example `i`, in the file's order."""
        return self._examples[i]

    @abstractmethod
    def _load(self, data_dir: str | Path | None, split: Split, limit: int | None) -> list[Example]:
        """Return the first `limit` examples of a split."""

    @abstractmethod
    def gold(self, example: Example) -> str:
        """Return the answer that `extract` should find."""

    @abstractmethod
    def extract(self, text: str) -> str:
        """Return the answer in a completion, '' if it has none."""

    @abstractmethod
    def score(self, example: Example, completion: str) -> float:
        """Return 1.0 for a right completion and 0.0 for a wrong one."""


def load_examples(
    name: str,
    data_dir: str | Path | None,
    split: Split,
    limit: int | None,
    to_example: Callable[[Row], Example],
    last: int | None = None,
) -> list[Example]:
    """Read the first `limit` examples of a split; `last` as in `hold_out`. Raises DataError."""
    if split in ("train", "test"):
        return [to_example(row) for row in islice(task_rows(name, data_dir, split), limit)]
    everything = [to_example(row) for row in task_rows(name, data_dir, "train")]
    fit, validation = hold_out(everything, last)
    return (fit if split == "fit" else validation)[:limit]


def _check(what: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ReftConfigError(
            f"{what} is {value!r}; accepted: {', '.join(accepted)}."
            + did_you_mean(value, list(accepted))
        )
