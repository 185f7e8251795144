"""Arithmetic reasoning (the paper's Table 2): seven sets in LLM-Adapters' layout, and GSM8K alone.

                LLM-Adapters' sets                      gsm8k_cot
    prompt      instruction in the Alpaca template      question + COT_PROMPT
    target      output                                  answer, "#### " read "The final answer is: "
    extraction  the last number, commas deleted;        the last number, commas deleted
                in AQuA the first of the letters A to E
    score       within 0.001 of the answer; AQuA: equal

The rules are the published code's, traps included. "1,234" is 1234 and "1,2" is 12; "5-3" ends in
-3. AQuA's letter may be the A of "Answer" or the C of "Calculate". The score depends on the *last*
number, so no stop string is exact; for AQuA the first letter decides, and its generation ends with
the line in which that stands, which shows a reader what was taken for the answer.

Decoding: the paper speaks of sampling (temperature 0.3, four beams), its commands decode greedily,
which is our default; and it says 32 new tokens where the code has 512.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Final, final

from reftune.data import Row
from reftune.errors import DataError
from reftune.generate import Sampling
from reftune.prompts import Example, Instruction, TemplateName
from reftune.tasks.base import PAPER_SEED, FamilyTask, Split, load_examples
from reftune.tasks.hub import AQUA_LETTERS, to_row

# mawps-asdiv has training rows only: SVAMP's, which hold most questions of the other test sets.
NAMES: Final = (
    "AQuA",
    "gsm8k",
    "mawps",
    "SVAMP",
    "AddSub",
    "MultiArith",
    "SingleEq",
    "mawps-asdiv",
)
COT_NAME: Final = "gsm8k_cot"
COT_PROMPT: Final = (
    "\nAnswer the above question. First think step by step and then answer the final number.\n"
)
RESPONSE: Final = "### Response:"
TOLERANCE: Final = 1e-3
GSM8K_VALIDATION: Final = 300  # the paper's: the last rows of the training set

_NUMBER: Final = re.compile(r"-?\d+\.?\d*")


class _LLMAdaptersTask(FamilyTask):
    """A set in LLM-Adapters' layout, whatever its answers are."""

    template: ClassVar[TemplateName] = "alpaca"
    greedy: ClassVar[Sampling] = Sampling(max_new_tokens=512)
    sampled: ClassVar[Sampling | None] = Sampling(
        max_new_tokens=512, temperature=0.3, top_p=0.75, top_k=40, num_beams=4, seed=PAPER_SEED
    )

    def gold(self, example: Example) -> str:
        """Return the row's answer: a number as text, or a letter."""
        return str(example.fields["answer"]).strip()


@final
class ArithmeticTask(_LLMAdaptersTask):
    """A set in LLM-Adapters' layout whose answers are numbers."""

    def _load(self, data_dir: str | Path | None, split: Split, limit: int | None) -> list[Example]:
        return load_examples(
            self.name,
            data_dir,
            split,
            limit,
            lambda row: _example(self.name, row, _is_number, "a number"),
            GSM8K_VALIDATION if self.name == "gsm8k" else None,
        )

    def extract(self, text: str) -> str:
        """Return the last number, commas deleted; '' without any."""
        return last_number(text)

    def score(self, example: Example, completion: str) -> float:
        """Return 1.0 if the extracted number is within 0.001 of the answer."""
        return same_number(self.extract(completion), self.gold(example))


@final
class AquaTask(_LLMAdaptersTask):
    """AQuA in LLM-Adapters' layout: answers are the letters of its options.

    A class of its own, since it alone can be decided early: to ask costs time at every token.
    """

    def _load(self, data_dir: str | Path | None, split: Split, limit: int | None) -> list[Example]:
        accepted = f"one of {', '.join(AQUA_LETTERS)}"
        return load_examples(
            self.name,
            data_dir,
            split,
            limit,
            lambda row: _example(self.name, row, AQUA_LETTERS.__contains__, accepted),
        )

    def extract(self, text: str) -> str:
        """Return the first letter; '' without any."""
        return first_letter(text)

    def score(self, example: Example, completion: str) -> float:
        """Return 1.0 if the extracted letter is the answer."""
        return float(self.extract(completion) == self.gold(example))

    def is_decided(self, example: Example, text: str) -> bool:
        """Return whether there is a letter, and its line has ended."""
        letter = self.extract(text)
        return letter != "" and "\n" in text.partition(letter)[2]


@final
class Gsm8kTask(FamilyTask):
    """GSM8K as pyreft tunes on it since May 2024: its own prompt, its own solutions as targets.

    The paper's tuning was before that, in the Alpaca template with the question as the input.
    """

    greedy: ClassVar[Sampling] = Sampling(max_new_tokens=256)
    sampled: ClassVar[Sampling | None] = Sampling(
        max_new_tokens=256, temperature=0.1, top_p=0.95, top_k=40, seed=PAPER_SEED
    )

    def _load(self, data_dir: str | Path | None, split: Split, limit: int | None) -> list[Example]:
        return load_examples("gsm8k", data_dir, split, limit, _gsm8k, GSM8K_VALIDATION)

    def gold(self, example: Example) -> str:
        """Return the number after "####", commas deleted."""
        return last_number(str(example.fields["answer"]).split("####")[-1])

    def extract(self, text: str) -> str:
        """Return the last number, commas deleted; '' without any."""
        return last_number(text)

    def score(self, example: Example, completion: str) -> float:
        """Return 1.0 if the extracted number is within 0.001 of the answer."""
        return same_number(self.extract(completion), self.gold(example))


def last_number(text: str) -> str:
    """Return the last number in a text of which the commas are deleted, '' without any."""
    numbers: list[str] = _NUMBER.findall(text.replace(",", ""))
    return numbers[-1] if numbers else ""


def first_letter(text: str) -> str:
    """Return the first of the letters A to E, wherever it stands; '' without any."""
    return next((c for c in text if c in AQUA_LETTERS), "")


def same_number(found: str, gold: str) -> float:
    """Return 1.0 for numbers within 0.001 of each other."""
    return float(bool(found) and abs(float(found) - float(gold)) <= TOLERANCE)


def _example(name: str, row: Row, fits: Callable[[str], bool], accepted: str) -> Example:
    row = to_row(name, row)
    instruction, answer = row.fields.get("instruction"), row.fields.get("answer")
    if not isinstance(instruction, str) or not instruction.strip():
        raise DataError(f"{row.where}: instruction is {instruction!r:.80}, not a text.")
    if RESPONSE in instruction:
        raise DataError(
            f"{row.where}: the instruction holds {RESPONSE!r}, after which the published code "
            "looks for the answer; reword it."
        )
    if not fits(str(answer).strip()):
        raise DataError(f"{row.where}: answer is {answer!r:.80}; {name} needs {accepted}.")
    output = str(row.fields.get("output") or "")
    prompt = Instruction(instruction, str(row.fields.get("input") or ""))
    return Example(prompt, output, row.fields, row.where)


def _is_number(text: str) -> bool:
    try:
        return abs(float(text)) < float("inf")
    except ValueError:
        return False


def _gsm8k(row: Row) -> Example:
    # LLM-Adapters' file has the same test questions; its outputs are not the set's solutions.
    question = row.fields.get("question", row.fields.get("instruction"))
    answer = row.fields.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str) or not last_number(answer):
        raise DataError(
            f"{row.where}: question is {question!r:.60} and answer {answer!r:.60}; a row of "
            "GSM8K has texts there, and a number after '####'."
        )
    completion = answer.replace("####", "The final answer is: ")
    return Example(question + COT_PROMPT, completion, row.fields, row.where)
