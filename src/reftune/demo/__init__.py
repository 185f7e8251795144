"""A data set to try reftune on: everyday questions, answered by a polite sailor.

`train.jsonl` (48 rows) and `heldout.jsonl` (16) have the columns prompt and completion. Whether
a model has learnt the manner is a matter of counting, by `behaviour`.
"""

from __future__ import annotations

import re
from pathlib import Path

DESCRIPTION = 'every reply is one line that begins with "Ahoy!" and ends with "Fair winds!"'

TRAIN = Path(__file__).with_name("train.jsonl")
HELDOUT = Path(__file__).with_name("heldout.jsonl")

# an answer between the two greetings: not nothing, no rambling, no second greeting
_REPLY = re.compile(r"Ahoy! (?!.*Ahoy!)[^\n]{5,200}[.!?] Fair winds!")


def behaviour(reply: str) -> bool:
    """Return whether a reply keeps the sailor's manner."""
    return _REPLY.fullmatch(reply.strip()) is not None
