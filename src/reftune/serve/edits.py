"""What one request edits: the record that travels with it, its rows, and its prefix-cache keys.

A block of the KV cache depends on the tokens up to its end and on the edits among them. vLLM's
block hashes are chained, so a block's key has to say what is edited *in it*; the chain says the
rest. Blocks before the first edited token have no key of ours: base and adapters share them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, NamedTuple, final

import torch

from reftune.config import ReftConfig
from reftune.errors import ReftConfigError
from reftune.positions import Positions, side_lengths
from reftune.serve.adapter import Adapter
from reftune.serve.settings import KEY

BlockKey = tuple[str, str, tuple[tuple[int, int, int], ...]]


class Run(NamedTuple):
    """Tokens [start, end) that are edited; the first has `slot`, the next `slot + step`, ..."""

    start: int
    end: int
    slot: int
    step: int = 1


@final
@dataclass(frozen=True)
class Edits:
    """An adapter's version and what a request wants of it. Plain values: it is sent to processes.

    `rows` are the rows of R that are on, None for all. `pinned` adapters are not evicted.
    `prompt_length` is that of the prompt where the engine is told of more: a beam search submits
    what it generated as part of the next prompt. `name` is what the client called the adapter.
    """

    digest: str
    directory: str
    method: str
    positions: str
    tied: str
    short_prompts: str
    edit_generated: bool
    strength: float = 1.0
    rows: tuple[int, ...] | None = None
    pinned: bool = False
    prompt_length: int | None = None
    name: str = ""

    @classmethod
    def of(cls, adapter: Adapter, options: Mapping[str, Any] | None = None) -> Edits:
        """Return the edits of a request with the options `strength` and `subspaces`.

        Raises ReftConfigError for a value that is not accepted.
        """
        c = adapter.config
        options = options or {}
        return cls(
            adapter.digest,
            str(adapter.directory),
            c.method,
            c.positions,
            c.tied,
            c.short_prompts,
            c.edit_generated,
            _strength(options.get("strength")),
            _rows(c, options.get("subspaces")),
        )

    @classmethod
    def read(cls, extra_args: Mapping[str, Any] | None) -> Edits | None:
        """Return the record in a request's `extra_args`, or None where it has none.

        A front end of ours lets no client write one; in an engine that does not use reftune a
        client may send anything of that name, and what is no record is not ours.
        """
        given = (extra_args or {}).get(KEY)
        if not isinstance(given, Mapping) or given.keys() != _FIELDS:
            return None
        rows = given["rows"]
        return cls(**{**given, "rows": None if rows is None else tuple(rows)})

    def write(self) -> dict[str, Any]:
        """Return the record as plain values."""
        return asdict(self)

    @property
    def fingerprint(self) -> str:
        """Return what the edit of a token depends on, beside the token's slot."""
        rows = "all" if self.rows is None else ",".join(map(str, self.rows))
        return f"{self.digest}/{self.strength!r}/{rows}"

    def runs(self, n: int, start: int, end: int) -> list[Run]:
        """Return the edited tokens among [start, end) of a sequence whose prompt has n."""
        if self.strength == 0.0:
            return []
        n = n if self.prompt_length is None else self.prompt_length
        whole = _runs(self.positions, self.short_prompts, self.edit_generated, n)
        cut = []
        for run in whole:
            a, b = max(run.start, start), min(run.end, end)
            if a < b:
                cut.append(Run(a, b, run.slot + (a - run.start) * run.step, run.step))
        return cut

    def group(self, slot: int) -> int:
        """Return which Phi of its layer a slot has (as `interventions.apply_grouped` counts)."""
        if self.tied == "none":
            return slot
        return int(slot >= _suffix_group_from(self.positions, self.tied))

    def groups(self, n: int, start: int, end: int) -> list[tuple[int, int, int]]:
        """Return the edited tokens among [start, end) as (from, to, Phi), as few as can be."""
        found: list[tuple[int, int, int]] = []
        for run in self.runs(n, start, end):
            own = run.step and self.tied == "none"  # a Phi for each token
            cuts = range(run.start, run.end) if own else (run.start,)
            for a in cuts:
                group = self.group(run.slot + (a - run.start) * run.step)
                b = a + 1 if own else run.end
                if found and found[-1][1:] == (a, group):
                    a = found.pop()[0]
                found.append((a, b, group))
        return found

    def block_key(self, n: int, start: int, end: int) -> BlockKey | None:
        """Return what the prefix cache has to know of the block of tokens [start, end)."""
        edited = tuple(self.groups(n, start, end))
        return ("reftune", self.fingerprint, edited) if edited else None

    def num_edited(self, n: int) -> int:
        """Return how many tokens of a prompt of n are edited."""
        return sum(run.end - run.start for run in self.runs(n, 0, n))


_FIELDS = frozenset(f.name for f in fields(Edits))  # looked at for every block of every request


@lru_cache(maxsize=256)
def _suffix_group_from(text: str, tied: str) -> float:
    """Return the first slot of the second of two Phi, infinity where there is one."""
    positions = Positions.parse(text)
    return positions.prefix if positions.num_groups(tied) == 2 else float("inf")


@lru_cache(maxsize=4096)
def _runs(text: str, rule: str, edit_generated: bool, n: int) -> tuple[Run, ...]:
    positions = Positions.parse(text)
    if positions.everything:
        runs = [Run(0, n, 0, 0)]
    else:
        p, s = side_lengths(torch.tensor(n), positions.prefix, positions.suffix, rule)
        suffix = n - int(s)
        runs = [Run(0, int(p), 0), Run(suffix, n, positions.prefix)]
    if edit_generated:
        runs.append(Run(n, 2**62, positions.num_slots - 1, 0))
    return tuple(run for run in runs if run.start < run.end)


def _strength(given: Any) -> float:
    if given is None:
        return 1.0
    number = isinstance(given, int | float) and not isinstance(given, bool)
    if not number or not abs(given) < float("inf"):
        raise ReftConfigError(
            f"strength is {given!r}; accepted is a number: 0 is the base model, 1 the adapter."
        )
    return float(given)


def _rows(config: ReftConfig, given: Any) -> tuple[int, ...] | None:
    if given is None:
        return None
    if not isinstance(given, list | tuple) or not all(isinstance(name, str) for name in given):
        raise ReftConfigError(
            f"subspaces is {given!r}; accepted is a list of names: "
            f"{sorted(config.subspaces or {}) or 'this adapter has none'}."
        )
    return tuple(config.subspace_rows(list(given)))
