"""Tasks that a program writes without end: arithmetic and strings by `reasoning-gym`, and a format.

    rg/NAME      a generator of reasoning-gym, made easy enough for small models; right is what its
                 own verifier gives full marks (some verifiers give a part of them)
    format/json  facts to be written as a JSON object with given keys in a given order

    prompt      question + "\\nAnswer:"
    target      a space and the answer
    extraction  the first line, stripped; so stopping at a newline is exact

Splits share no question: their seeds are far apart (in reasoning-gym, example 1 of seed 7 is
example 0 of seed 8), and a question of the test or validation split is left out of the others.
"""

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Final, TypeAlias, final

from reftune.errors import ReftConfigError
from reftune.generate import Sampling
from reftune.prompts import Example
from reftune.tasks.base import FamilyTask, Split
from reftune.tasks.labels import first_line
from reftune.tasks.leaks import words

Entry: TypeAlias = Mapping[str, Any]  # question, answer and what a verifier wants besides
Verify: TypeAlias = Callable[[str, Entry], bool]

# Settings of reasoning-gym's generators; all answers stand on one line.
GYM: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "rg/basic_arithmetic": {"max_terms": 3, "max_digits": 2},
        "rg/chain_sum": {"max_terms": 3, "max_digits": 2},
        "rg/products": {"max_digits": 3},
        "rg/gcd": {"max_value": 200},
        "rg/leg_counting": {"max_animals": 4, "max_instances": 9},
        "rg/letter_counting": {"max_words": 8},
        "rg/simple_equations": {"max_terms": 3},
        "rg/spell_backward": {"max_word_len": 8},
        "rg/word_sequence_reversal": {"max_words": 6},
        "rg/word_sorting": {"max_words": 6, "max_word_length": 8},
        "rg/syllogism": {},
        "rg/family_relationships": {"max_family_size": 6},
    }
)
JSON: Final = "format/json"
NAMES: Final = (*GYM, JSON)

# Examples of each split, and the seed of its first one. An order of precedence, too: what is in a
# split is in none of those below it.
SPLITS: Final[Mapping[str, tuple[int, int]]] = MappingProxyType(
    {"test": (500, 1_000_000_000), "validation": (300, 500_000_000), "train": (10_000, 0)}
)
TRIES: Final = 5  # generated per example that is wanted, where questions come twice

_PEOPLE: Final = (
    "Ada",
    "Ben",
    "Chloe",
    "Dmitri",
    "Emil",
    "Fatima",
    "Grace",
    "Hugo",
    "Ines",
    "Jonas",
)
_CITIES: Final = (
    "Accra",
    "Bergen",
    "Cairo",
    "Delhi",
    "Essen",
    "Ghent",
    "Hanoi",
    "Izmir",
    "Kyoto",
    "Lima",
)
_FACTS: Final = (
    "{name} is {age} years old and lives in {city}.",
    "In {city} lives {name}, who is {age}.",
    "{name}, {age}, comes from {city}.",
    "At the age of {age}, {name} moved to {city}.",
)


@final
class ProceduralTask(FamilyTask):
    """A generator's questions; `limit` may ask for more training examples than 10,000.

    Test and validation never have more than `SPLITS` says: only these are kept out of training.
    """

    greedy: ClassVar[Sampling] = Sampling(max_new_tokens=48, stop=("\n",))

    def _load(self, data_dir: str | Path | None, split: Split, limit: int | None) -> list[Example]:
        generate, self._verify = _json_generator() if self.name == JSON else _gym(self.name)
        split = "train" if split == "fit" else split
        size = SPLITS[split][0]
        count = limit or size
        entries = _entries(generate, split, count if split == "train" else min(count, size))
        return [
            Example(f"{entry['question'].strip()}\nAnswer:", f" {entry['answer']}", entry, where)
            for where, entry in ((f"{self.name} seed {seed}", e) for seed, e in entries)
        ]

    def gold(self, example: Example) -> str:
        """Return the generator's answer; a verifier may accept others."""
        return str(example.fields["answer"])

    def extract(self, text: str) -> str:
        """Return the first line, stripped."""
        return first_line(text)

    def score(self, example: Example, completion: str) -> float:
        """Return 1.0 if the verifier accepts the first line."""
        return float(self._verify(self.extract(completion), example.fields))


def _entries(generate: Callable[[int], Entry], split: str, count: int) -> list[tuple[int, Entry]]:
    """Return (seed, entry) of the first `count` questions of a split that no split above it has."""
    seen = set()
    for above in SPLITS:
        if above == split:
            break
        seen |= {words(e["question"]) for _, e in _entries(generate, above, SPLITS[above][0])}
    found: list[tuple[int, Entry]] = []
    first = SPLITS[split][1]
    for seed in range(first, first + TRIES * count):
        entry = generate(seed)
        question = words(entry["question"])
        if question not in seen:
            seen.add(question)
            found.append((seed, entry))
        if len(found) == count:
            break
    return found


def _gym(name: str) -> tuple[Callable[[int], Entry], Verify]:
    try:
        import reasoning_gym
    except ImportError as error:
        raise ReftConfigError(
            f"The task {name!r} needs reasoning-gym: pip install 'reftune[tasks]'."
        ) from error
    data = reasoning_gym.create_dataset(name.removeprefix("rg/"), seed=0, **GYM[name])
    return data.__getitem__, lambda text, entry: data.score_answer(text, dict(entry)) == 1.0


def _json_generator() -> tuple[Callable[[int], Entry], Verify]:
    def generate(seed: int) -> Entry:
        draw = random.Random(seed)
        facts = {
            "name": draw.choice(_PEOPLE),
            "age": draw.randint(11, 98),
            "city": draw.choice(_CITIES),
        }
        keys = draw.sample(sorted(facts), 3)
        text = draw.choice(_FACTS).format(**facts)
        question = f"{text}\nWrite this as a JSON object with the keys {', '.join(keys)}."
        return {"question": question, "answer": json.dumps({key: facts[key] for key in keys})}

    return generate, _same_object


def _same_object(text: str, entry: Entry) -> bool:
    """Return whether a text is the object: keys in their order, values with their types."""
    try:
        # As pairs, since an object may write a key twice; 31 and 31.0 are equal but not the same.
        found = json.loads(text, object_pairs_hook=list)
    except ValueError:
        return False
    return repr(found) == repr(json.loads(entry["answer"], object_pairs_hook=list))
