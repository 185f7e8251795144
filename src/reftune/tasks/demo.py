"""The demonstration: does a reply keep the manner that the adapter was trained on?"""

from pathlib import Path
from typing import ClassVar, final

from reftune.data import load_rows, to_examples
from reftune.demo import HELDOUT, TRAIN, behaviour
from reftune.generate import Sampling
from reftune.prompts import Example, TemplateName
from reftune.tasks.base import FamilyTask, Split
from reftune.tasks.leaks import hold_out


@final
class DemoTask(FamilyTask):
    """The prompts of `reftune.demo`; a reply scores 1 if `behaviour` says so."""

    template: ClassVar[TemplateName] = "auto"
    greedy: ClassVar[Sampling] = Sampling(max_new_tokens=64)

    def _load(self, data_dir: str | Path | None, split: Split, limit: int | None) -> list[Example]:
        examples = to_examples(load_rows(HELDOUT if split == "test" else TRAIN))
        if split in ("fit", "validation"):
            examples = hold_out(examples)[split == "validation"]
        return examples[:limit]

    def gold(self, example: Example) -> str:
        """Return the reply in the data set, one of many that are right."""
        return example.completion

    def extract(self, text: str) -> str:
        """Return the reply itself."""
        return text.strip()

    def score(self, example: Example, completion: str) -> float:
        """Return 1.0 if the reply keeps the manner."""
        return float(behaviour(completion))
