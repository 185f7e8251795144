"""Questions that a training set shares with a test set, and rows held out of a training set.

Prompts are compared as words: without case, punctuation and the way a number is written (1,000 and
1000.0 are one word; signs between numbers are words, too). What all prompts of a test set begin or
end with is its template; the rest is the question. A training prompt shares a question if it is the
question, or contains it or the whole test prompt; what is contained must have `MIN_WORDS` words,
since short ones occur by chance.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Final, Literal, NamedTuple, TypeAlias

from reftune.errors import DataError
from reftune.prompts import Example, Instruction, Prompt

Words: TypeAlias = tuple[str, ...]
LeakRule: TypeAlias = Literal["refuse", "drop", "allow"]

MIN_WORDS: Final = 8
# BoolQ, ARC-Easy and SST-2 share up to 0.3% between their own published splits; TREC shares 2%.
TOLERATED: Final = 0.005
HELD_OUT: Final = 300  # at most, and a tenth of the rows

# Numbers, words, and the signs of arithmetic: 4 + 1 is not 4 - 1.
_WORD: Final = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+|[+*/=<>^]|-(?=\s*\d)")


class Leak(NamedTuple):
    """A training example that shares a question with an example of a test set."""

    test: str  # the set's name
    example: int  # of the test set, by its number
    position: int  # in the training set
    where: str  # the training example's


def words(prompt: Prompt) -> Words:
    """Return a prompt's words, lower case, without punctuation, numbers in one way of writing."""
    found = _WORD.findall(_text(prompt).casefold())
    return tuple(_number(word) if word[0].isdigit() else word for word in found)


def find_leaks(train: Iterable[Example], tests: Mapping[str, Sequence[Example]]) -> list[Leak]:
    """Return every pair of a test example and a training example that share a question.

    `train` is read once.
    """
    whole: dict[Words, list[tuple[str, int]]] = defaultdict(list)
    parts: dict[Words, list[tuple[Words, int, str, int]]] = defaultdict(list)
    for name, examples in tests.items():
        for i, (prompt, question, at) in enumerate(_questions(examples)):
            for text in {prompt, question} - {()}:
                whole[text].append((name, i))
            part, offset = (question, 0) if len(question) >= MIN_WORDS else (prompt, at)
            if len(part) >= MIN_WORDS:  # looked up by words that are not the template's alone
                offset = min(offset, len(part) - MIN_WORDS)
                parts[part[offset : offset + MIN_WORDS]].append((part, offset, name, i))
    leaks = []
    for position, example in enumerate(train):
        prompt = words(example.prompt)
        found = dict.fromkeys(whole.get(prompt, ()))
        for at in range(len(prompt) - MIN_WORDS + 1):
            for part, offset, name, i in parts.get(prompt[at : at + MIN_WORDS], ()):
                start = at - offset
                if start >= 0 and prompt[start : start + len(part)] == part:
                    found[name, i] = None
        leaks += [Leak(name, i, position, example.where) for name, i in found]
    return leaks


def look_for_leaks(
    train: Iterable[Example], tests: Mapping[str, Sequence[Example]], wanted: LeakRule = "refuse"
) -> tuple[set[int], list[str]]:
    """Return the positions of the training examples to leave out, and notes on what was found.

    A test set of which no more than `TOLERATED` is shared only gets a note: published splits have
    that. More is refused, left out of training ("drop"), or trained on ("allow").

    Raises:
        DataError: too much is shared; says how much, names one, and what to set.
    """
    leaks = find_leaks(train, tests)
    notes = []
    for name, (count, shares) in describe(leaks, tests).items():
        if wanted == "refuse" and count > TOLERATED * len(tests[name]):
            raise DataError(
                f"{shares}. A score would measure memory. Train on other data, evaluate other "
                "tasks, or set data.leaks: drop (not to train on these) or allow."
            )
        notes.append(f"Note: {shares}" + (". It is not trained on." if wanted == "drop" else ""))
    return {leak.position for leak in leaks} if wanted == "drop" else set(), notes


def describe(
    leaks: Sequence[Leak], tests: Mapping[str, Sequence[Example]], whose: str = "the training data"
) -> dict[str, tuple[int, str]]:
    """Return, of each test set that shares any, how many examples do, and a clause that says so."""
    found = {}
    for name, examples in tests.items():
        mine = [leak for leak in leaks if leak.test == name]
        if not mine:
            continue
        count, first = len({leak.example for leak in mine}), mine[0]
        test = examples[first.example]
        clause = (
            f"{whose} holds {count} of the {len(examples)} questions of {name}, for "
            f"instance {test.where or f'example {first.example}'} in "
            f"{first.where or f'example {first.position}'}: {_text(test.prompt)[:120]!r}"
        )
        found[name] = count, clause
    return found


def hold_out(
    examples: Sequence[Example], last: int | None = None
) -> tuple[list[Example], list[Example]]:
    """Part a training set into (what to fit, what to tune on), which share no question.

    A text that stands inside of another, as SST-2's phrases do, may be on the other side of it.

    The `last` rows are held out; without that, a tenth of the questions but at most `HELD_OUT`,
    chosen by a hash of their words: whatever the order of the rows and whoever runs it.
    """
    keys = [words(example.prompt) for example in examples]
    if last is None:
        count = min(HELD_OUT, max(1, len(set(keys)) // 10))
        held = set(sorted(set(keys), key=_digest)[:count])
        validation = [e for e, key in zip(examples, keys, strict=True) if key in held]
    else:
        held = set(keys[-last:])
        validation = list(examples[-last:])
    return [e for e, key in zip(examples, keys, strict=True) if key not in held], validation


def _questions(examples: Sequence[Example]) -> list[tuple[Words, Words, int]]:
    """Return each prompt, its question (without the words that all share), and where that is."""
    prompts = [words(example.prompt) for example in examples]
    if len(set(prompts)) < 2:
        return [(prompt, prompt, 0) for prompt in prompts]
    start = _common(prompts)
    rest = [prompt[start:] for prompt in prompts]
    end = _common([prompt[::-1] for prompt in rest])
    questions = [prompt[: len(prompt) - end] for prompt in rest]
    return [(prompt, q, start) for prompt, q in zip(prompts, questions, strict=True)]


def _common(prompts: Sequence[Words]) -> int:
    """Return with how many words all begin: as many as the first and last in order share."""
    first, last = min(prompts), max(prompts)
    return next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first)
    )


def _text(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Instruction):
        return f"{prompt.text}\n{prompt.input}" if prompt.input else prompt.text
    return "\n".join(m["content"] for m in prompt if m["role"] != "system")


def _number(word: str) -> str:
    try:
        value = float(word.replace(",", ""))
    except ValueError:  # 1.2.3
        return word
    return str(int(value)) if value.is_integer() else repr(value)


def _digest(key: Words) -> bytes:
    return blake2b(" ".join(key).encode(), digest_size=8).digest()
