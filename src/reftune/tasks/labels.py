"""Classification by writing the class: SST-2 and TREC as tasks for a generating model.

    prompt      the text, a question that lists the classes, "Answer:"
    target      a space and the class
    extraction  the first line of the completion, stripped
    score       equal to the class

What follows the first line changes nothing, so generation stops at a newline: that is exact.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Final, final

from reftune.data import Row
from reftune.errors import DataError
from reftune.generate import Sampling
from reftune.prompts import Example
from reftune.tasks.base import FamilyTask, Split, load_examples


@final
@dataclass(frozen=True)
class Classes:
    """How a set's texts become prompts, and the words for its labels 0, 1, ..."""

    place: str  # the name of its files
    prompt: str
    labels: tuple[str, ...]


SETS: Final[Mapping[str, Classes]] = MappingProxyType(
    {
        "words/sst2": Classes(
            "sst2",
            "Review: {text}\nIs the review positive or negative?\nAnswer:",
            ("negative", "positive"),
        ),
        "words/trec": Classes(
            "trec",
            "Question: {text}\nDoes it ask for a description, an entity, an abbreviation, a "
            "person, a place or a number?\nAnswer:",
            ("description", "entity", "abbreviation", "person", "place", "number"),
        ),
    }
)
# TREC's classes by the letters that the original set has, where a row has no number of ours.
_TREC: Final = ("DESC", "ENTY", "ABBR", "HUM", "LOC", "NUM")


@final
class LabelTask(FamilyTask):
    """A set of texts with classes; a row has text (or sentence) and label."""

    greedy: ClassVar[Sampling] = Sampling(max_new_tokens=8, stop=("\n",))

    def _load(self, data_dir: str | Path | None, split: Split, limit: int | None) -> list[Example]:
        classes = SETS[self.name]
        return load_examples(
            classes.place, data_dir, split, limit, lambda row: _example(classes, row)
        )

    def gold(self, example: Example) -> str:
        """Return the class."""
        return example.completion.strip()

    def extract(self, text: str) -> str:
        """Return the first line, stripped."""
        return first_line(text)

    def score(self, example: Example, completion: str) -> float:
        """Return 1.0 if the first line is the class."""
        return float(self.extract(completion) == self.gold(example))


def first_line(text: str) -> str:
    """Return what stands before the first newline, stripped."""
    return text.partition("\n")[0].strip()


def _example(classes: Classes, row: Row) -> Example:
    text = row.fields.get("text", row.fields.get("sentence"))
    label = row.fields.get("label_coarse_original", row.fields.get("label"))
    if classes.place == "trec" and label in _TREC:
        label = _TREC.index(label)
    label = int(label) if isinstance(label, str) and label.isdecimal() else label
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{row.where}: text is {text!r:.80}, not a text to classify.")
    if not isinstance(label, int) or not 0 <= label < len(classes.labels):
        raise DataError(
            f"{row.where}: label is {label!r:.80}; accepted: 0 to {len(classes.labels) - 1} "
            f"({', '.join(classes.labels)})."
        )
    prompt = classes.prompt.replace("{text}", text.strip())
    return Example(prompt, f" {classes.labels[label]}", row.fields, row.where)
