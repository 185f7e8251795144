"""Instruction following (the paper's Table 3): the Alpaca template, replies for a judge to compare.

    alpaca_eval         805 instructions; a run also writes the replies as
                        `alpaca_eval --model_outputs` reads them (reftune.alpaca_eval)
    ultrafeedback, alpaca   training rows; hold some out and look at their loss (data.heldout)

Without a judge a reply has no score. What is counted is whether there is one ("answered"), which
says nothing of its quality. The paper decodes greedily with an n-gram and a repetition penalty, up
to 2,048 tokens with the prompt; here they are the reply's alone.
"""

from pathlib import Path
from typing import ClassVar, Final, final

from reftune.data import Row, to_examples
from reftune.generate import Sampling
from reftune.prompts import Example, TemplateName
from reftune.tasks.base import FamilyTask, Split, load_examples

NAMES: Final = ("alpaca_eval", "ultrafeedback", "alpaca")


@final
class InstructTask(FamilyTask):
    """Instructions with one of many good replies; rows have instruction, input and output."""

    metric: ClassVar[str] = "answered"
    template: ClassVar[TemplateName] = "alpaca"
    greedy: ClassVar[Sampling] = Sampling(max_new_tokens=2048)
    published: ClassVar[Sampling | None] = Sampling(
        max_new_tokens=2048, no_repeat_ngram_size=5, repetition_penalty=1.1
    )

    def _load(self, data_dir: str | Path | None, split: Split, limit: int | None) -> list[Example]:
        return load_examples(self.name, data_dir, split, limit, _example)

    def gold(self, example: Example) -> str:
        """Return the reply in the data set: of Alpaca-Eval, the reference model's."""
        return example.completion

    def extract(self, text: str) -> str:
        """Return the reply, stripped on the left as the published code does."""
        return text.lstrip()

    def score(self, example: Example, completion: str) -> float:
        """Return 1.0 if there is a reply."""
        return float(bool(completion.strip()))


def _example(row: Row) -> Example:
    return to_examples([row])[0]
