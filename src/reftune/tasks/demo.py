"""The demonstration: does a reply keep the manner that the adapter was trained on?"""

from pathlib import Path
from typing import final

from reftune.data import load_rows, to_examples
from reftune.demo import HELDOUT, TRAIN, behaviour
from reftune.generate import Sampling
from reftune.prompts import Example, TemplateName


@final
class DemoTask:
    """The prompts of `reftune.demo`; a reply scores 1 if `behaviour` says so."""

    template: TemplateName = "auto"
    sampling = Sampling(max_new_tokens=64)

    def __init__(self, name: str, data_dir: Path, split: str, limit: int | None) -> None:
        self.name = name
        path = TRAIN if split == "train" else HELDOUT
        self._examples = to_examples(load_rows(path, limit=limit))

    @property
    def num_examples(self) -> int:
        """Return how many examples there are."""
        return len(self._examples)

    def example(self, i: int) -> Example:
        """Return example `i`, in the file's order."""
        return self._examples[i]

    def gold(self, example: Example) -> str:
        """Return the reply in the data set, one of many that are right."""
        return example.completion

    def extract(self, text: str) -> str:
        """Return the reply itself."""
        return text.strip()

    def score(self, example: Example, completion: str) -> float:
        """Return 1.0 if the reply keeps the manner."""
        return float(behaviour(completion))
