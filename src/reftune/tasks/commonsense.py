"""Commonsense reasoning (the paper's Table 1): eight sets in LLM-Adapters' layout and prompts.

    data_dir/NAME/{train,test}.json: a list of {"instruction", "input", "output", "answer"}

    prompt      instruction + "\\n" (the template "commonsense")
    target      "the correct answer is " + answer
    extraction  what follows the first "the correct answer is ", stripped on the left; '' without it
    score       extraction.strip() == answer.strip()

The comparison takes *all* that follows the trigger, as the published code does: with
"the correct answer is true\\nBecause ..." the answer is wrong, and so is one that the 32 tokens
cut short. Therefore no stop string is exact here: stopping at a newline would turn such a
completion into a right one. Only the end of sequence ends generation early.

The published code searches prompt and completion together. No instruction of the eight sets holds
the trigger, and a prompt's newline cannot begin it, so searching the completion is the same; an
instruction that does hold it is refused.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Final, final

from reftune.data import Row, load_rows
from reftune.errors import DataError, ReftConfigError, did_you_mean
from reftune.generate import Sampling
from reftune.prompts import Example, TemplateName

NAMES: Final = (
    "boolq",
    "piqa",
    "social_i_qa",
    "hellaswag",
    "winogrande",
    "ARC-Easy",
    "ARC-Challenge",
    "openbookqa",
)
TRIGGER: Final = "the correct answer is "


@final
class CommonsenseTask:
    """One of the eight commonsense sets.

    Raises:
        DataError: the file is missing, or a row lacks its instruction or answer.
    """

    template: TemplateName = "commonsense"
    sampling = Sampling(max_new_tokens=32)

    def __init__(self, name: str, data_dir: Path, split: str, limit: int | None) -> None:
        self.name = name
        self._examples = load_examples(data_dir, name, split, limit)

    @property
    def num_examples(self) -> int:
        """Return how many examples there are."""
        return len(self._examples)

    def example(self, i: int) -> Example:
        """Return example `i`, in the file's order."""
        return self._examples[i]

    def gold(self, example: Example) -> str:
        """Return the row's answer, for instance "answer2"."""
        return str(example.fields["answer"]).strip()

    def extract(self, text: str) -> str:
        """Return all that follows the first trigger, stripped on the left; '' without a trigger."""
        _, _, answer = text.partition(TRIGGER)
        return answer.lstrip()

    def score(self, example: Example, completion: str) -> float:
        """Return 1.0 if the extracted text is the answer and nothing else but outer whitespace."""
        return float(self.extract(completion).strip() == self.gold(example))


def load_examples(data_dir: Path, name: str, split: str, limit: int | None = None) -> list[Example]:
    """Read the first `limit` examples of `data_dir/NAME/SPLIT.json`.

    Raises:
        DataError: the file is missing, or a row lacks its instruction or answer.
    """
    path = data_dir / name / f"{split}.json"
    if not path.is_file():
        raise DataError(
            f"{path} does not exist. Put LLM-Adapters' folder dataset/{name} under {data_dir}, "
            "or give another data_dir."
        )
    return [_example(row) for row in load_rows(path, limit=limit)]


def training_examples(
    data_dir: str | Path,
    names: Sequence[str] = NAMES,
    limit: int | None = None,
    seed: int = 42,
) -> list[Example]:
    """Mix the training splits of the named sets and keep the first `limit` of the mixture.

    Raises:
        ReftConfigError: a name is not one of the eight.
        DataError: a training file is missing or has a row that does not fit.
    """
    for name in names:
        if name not in NAMES:
            raise ReftConfigError(
                f"{name!r} is no commonsense set; there are {', '.join(NAMES)}."
                + did_you_mean(name, list(NAMES))
            )
    examples = [e for name in names for e in load_examples(Path(data_dir), name, "train")]
    random.Random(seed).shuffle(examples)
    return examples[:limit]


def _example(row: Row) -> Example:
    texts = {}
    for key in ("instruction", "answer"):
        text = row.fields.get(key)
        if not isinstance(text, str) or not text.strip():
            raise DataError(
                f"{row.where}: {key} is {text!r:.80}; a commonsense row needs a text there."
            )
        texts[key] = text
    if TRIGGER in texts["instruction"]:
        raise DataError(
            f"{row.where}: the instruction holds {TRIGGER!r}, which marks the answer; reword it."
        )
    return Example(texts["instruction"], TRIGGER + texts["answer"], row.fields, row.where)
