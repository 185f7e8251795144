"""Commonsense reasoning (the paper's Table 1): eight sets in LLM-Adapters' layout and prompts.

    data_dir/NAME/{train,test}.json: a list of {"instruction", "input", "output", "answer"}

    prompt      instruction + "\\n" (the template "commonsense")
    target      "the correct answer is " + answer
    extraction  what follows the first "the correct answer is ", stripped on the left; '' without it
    score       extraction.strip() == answer.strip()

The comparison takes *all* that follows the trigger, as the published code does: with
"the correct answer is true\\nBecause ..." the answer is wrong, and so is one that the 32 tokens
cut short. Therefore no stop string is exact here: stopping at a newline would turn such a
completion into a right one. What ends generation early is the end of sequence, or that the answer
is wrong however it goes on (`CommonsenseTask.is_decided`); a right one may always be spoilt.

The published code searches prompt and completion together. No instruction of the eight sets holds
the trigger, and a prompt's newline cannot begin it, so searching the completion is the same; an
instruction that does hold it is refused.

LLM-Adapters, whose figures are the paper's for LoRA, reads answers otherwise: `first_named`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Final, final

from reftune.data import Row
from reftune.errors import DataError
from reftune.generate import Sampling
from reftune.prompts import Example, TemplateName
from reftune.tasks.base import PAPER_SEED, FamilyTask, Split, load_examples
from reftune.tasks.hub import to_row

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
# LLM-Adapters' commonsense_evaluate.py looks for five answers everywhere.
_OPTIONS: Final[Mapping[str, str]] = {
    "boolq": "true|false",
    "piqa": "solution[12]",
    "hellaswag": "ending[1-4]",
    "winogrande": "option[12]",
}


def first_named(name: str, completion: str) -> str:
    """Return the first option of the set `name` in a completion, in any sentence; '' without one.

    LLM-Adapters' reading of an answer (`extract_answer` there). It is the published one's where
    that finds an option, and none is named before the trigger.
    """
    found = re.search(_OPTIONS.get(name, "answer[1-5]"), completion)
    return found[0] if found else ""


@final
class CommonsenseTask(FamilyTask):
    """One of the eight commonsense sets; a row needs an instruction and an answer."""

    template: ClassVar[TemplateName] = "commonsense"
    greedy: ClassVar[Sampling] = Sampling(max_new_tokens=32)
    sampled: ClassVar[Sampling | None] = Sampling(
        max_new_tokens=32, temperature=0.1, top_p=0.75, top_k=40, num_beams=4, seed=PAPER_SEED
    )

    def _load(self, data_dir: str | Path | None, split: Split, limit: int | None) -> list[Example]:
        return load_examples(
            self.name, data_dir, split, limit, lambda row: _example(to_row(self.name, row))
        )

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

    def is_decided(self, example: Example, text: str) -> bool:
        """Return whether the answer is wrong and `first_named` the same, however `text` goes on.

        An option stays the first: none is so long as to begin before it and end after it.
        """
        gold, answer = self.gold(example), self.extract(text)
        may_be_right = gold.startswith(answer) or answer.rstrip() == gold
        return not may_be_right and first_named(self.name, text) != ""


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
