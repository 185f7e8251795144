"""Rounds in which arms take turns, kept as they come: shared by generation.py and scaling.py.

Standard library only. A results file holds what was measured on what (`head`), and for each cell
the numbers of every round. A run that was interrupted goes on where it stopped; numbers made with
other settings, versions or machines are never mixed into one file.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

Round = dict[str, float]  # what was measured, by name: the seconds of each arm, say


class Record:
    """The rounds of each cell, in memory and in a file."""

    def __init__(self, path: Path, head: Mapping[str, Any], *, fresh: bool = False) -> None:
        """Go on with the file at `path`, if there is one and `fresh` does not say otherwise.

        Raises SystemExit where that was made with another `head`.
        """
        self.path, self.head = path, json.loads(json.dumps(head))
        self.cells: dict[str, list[Round]] = {}
        if fresh or not path.exists():
            return
        before = json.loads(path.read_text())
        changed = [key for key, value in self.head.items() if before.get(key) != value]
        if changed:
            raise SystemExit(
                f"{path} was measured with other {' and '.join(changed)}. "
                "Give another --out, or --fresh to forget it."
            )
        self.cells = before["cells"]

    def missing(self, cell: str, names: Sequence[str], rounds: int) -> bool:
        """Return whether a cell has fewer rounds than that, of these numbers.

        Raises SystemExit where its rounds are of others.
        """
        before = self.cells.get(cell, [])
        if before and list(before[0]) != list(names):
            raise SystemExit(
                f"{self.path}: {cell} was measured with {', '.join(before[0])}, not with "
                f"{', '.join(names)}. Give another --out, or --fresh to forget it."
            )
        return len(before) < rounds

    def add(self, cell: str, numbers: Round, summary: Callable[[], Any]) -> None:
        """Keep one more round of a cell, and write the file."""
        self.cells.setdefault(cell, []).append(numbers)
        self.save(summary())

    def save(self, summary: Any) -> None:
        """Write the file under a temporary name and rename it; one line per round."""
        head = json.dumps(self.head | {"summary": summary}, indent=1)[:-2]
        cells = ",\n".join(
            f"  {json.dumps(cell)}: [\n   "
            + ",\n   ".join(json.dumps(numbers) for numbers in rounds)
            + "\n  ]"
            for cell, rounds in self.cells.items()
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f".{self.path.name}.part")
        part.write_text(f'{head},\n "cells": {{\n{cells}\n }}\n}}\n')
        os.replace(part, self.path)


def measure_in_turns(
    record: Record,
    cells: Mapping[str, Sequence[str]],
    rounds: int,
    measure: Callable[[str, str], float],
    summary: Callable[[], Any],
) -> None:
    """Measure each arm of each cell `rounds` times; the order turns around from round to round.

    Each cell gets its first round before any gets its second.
    """
    for n in range(rounds):
        for cell, arms in cells.items():
            if record.missing(cell, arms, n + 1):
                taken = {arm: measure(cell, arm) for arm in in_turn(arms, n)}
                record.add(cell, {arm: taken[arm] for arm in arms}, summary)


def in_turn(arms: Sequence[str], n: int) -> list[str]:
    """Return the arms in the order of round `n`."""
    return list(arms) if n % 2 == 0 else list(reversed(arms))


def median_of(rounds: Sequence[Round], name: str) -> float:
    """Return the median over the rounds of one number."""
    return statistics.median(numbers[name] for numbers in rounds)


def median_ratio(rounds: Sequence[Round], name: str, other: str) -> float:
    """Return the median of `name` over `other`, taken within each round."""
    return statistics.median(numbers[name] / numbers[other] for numbers in rounds)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows for reading: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        "  ".join(
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (head, *rows)
    ]
    return "\n".join(line.rstrip() for line in lines)


def versions(*packages: str) -> dict[str, str]:
    """Return the installed versions of some packages."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
