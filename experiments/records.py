"""The cells of an experiment in a file that several commands, one after another or at once, share.

A results file NAME.json holds what was measured with what (`settings`, `versions`), on which
`machines`, a `summary`, and for each cell its numbers and seconds. A run that was interrupted goes
on where it stopped; numbers made with other settings or versions are never mixed into one file,
nor are times of several machines: a file of times has one `machine`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from reftune.errors import RunError

Numbers = dict[str, Any]
"""What was measured of a cell, by name; JSON can hold it."""


class DivergedError(RunError):
    """A cell's training came to a loss that is not finite; other cells' may not."""


class Record:
    """The cells of an experiment, in memory and in a file."""

    def __init__(
        self, args: argparse.Namespace, settings: Mapping[str, Any], *, times: bool = False
    ) -> None:
        """Go on with the file in `--out`, if there is one; `--fresh` removes it.

        `settings` are those that change a cell's numbers. So does the machine where the numbers are
        `times`. Raises RunError where the file was made with others.
        """
        name = f"{args.name}-quick" if args.quick else args.name
        self.path: Path = args.out / f"{name}.json"
        self.fresh: bool = args.fresh
        head = {"settings": dict(settings), "versions": versions()}
        # As a file has it: tuples are lists there.
        self.head = json.loads(json.dumps(head | ({"machine": machine()} if times else {})))
        self.machines: list[dict[str, Any]] = []
        if args.fresh:
            self.path.unlink(missing_ok=True)
        self.cells: dict[str, Numbers] = self._now().get("cells", {})

    @property
    def picture(self) -> Path:
        """Return where the picture of these results belongs."""
        return self.path.with_suffix(".png")

    def measure(self, cells: Mapping[str, Callable[[], Numbers]]) -> None:
        """Measure the cells that were not before, and write the file after each.

        One that diverges has no result, and the others are measured all the same. Raises RunError
        at the end, which names those without.
        """
        failed: dict[str, DivergedError] = {}
        for cell, work in cells.items():
            if cell in self.cells:
                continue
            began = time.perf_counter()
            try:
                numbers = work()
            except DivergedError as error:
                failed[cell] = error
                print(f"{cell}: no result, {error}", flush=True)
                continue
            self.cells[cell] = numbers | {"seconds": round(time.perf_counter() - began, 1)}
            if machine() not in self.machines:
                self.machines.append(machine())
            self.save()
            print(f"{cell}: {brief(self.cells[cell])}", flush=True)
        if failed:
            named = "; ".join(f"{cell} ({error})" for cell, error in failed.items())
            others = f" The others are in {self.path}." if len(failed) < len(cells) else ""
            raise RunError(
                f"{len(failed)} of {len(cells)} cells have no result: {named}.{others} A lower "
                "--learning-rate is another setting, for all cells: give another --out with it. "
                "For a table without these cells, do not ask for them. The same command tries them "
                f"again.{without_fresh(self.fresh)}"
            )

    def save(self, summary: Any = None) -> None:
        """Write the file under a temporary name and rename it; one line per cell.

        What other commands have put there meanwhile stays: their cells, unless they are ours too,
        and without a summary of ours the last one. Raises RunError where it has other settings.
        """
        before = self._now()
        self.cells = before.get("cells", {}) | self.cells
        seconds = round(sum(cell.get("seconds", 0.0) for cell in self.cells.values()), 1)
        head = self.head | self._contributors(before)
        head |= {"seconds": seconds, "summary": summary or before.get("summary")}
        cells = ",\n".join(
            f"  {json.dumps(name)}: {json.dumps(numbers, ensure_ascii=False)}"
            for name, numbers in self.cells.items()
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        text = f'{json.dumps(head, indent=1)[:-2]},\n "cells": {{\n{cells}\n }}\n}}\n'
        part.write_text(text, encoding="utf-8")
        os.replace(part, self.path)

    def finish(self, summary: Any, rows: Sequence[Sequence[str]]) -> Any:
        """Write the file with its summary, print a table (its first row is the head), return it."""
        self.save(summary)
        seconds = sum(cell.get("seconds", 0.0) for cell in self.cells.values())
        print(f"\n{table(rows)}\n\n{seconds:.0f} s of work; {self.path}, {self.picture.name}")
        return summary

    def _now(self) -> dict[str, Any]:
        """Return what the file holds now, {} where there is none. Raises RunError."""
        if not self.path.exists():
            return {}
        before: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        changed = [
            f"{what} ({difference(before.get(what, {}), now)})"
            for what, now in self.head.items()
            if before.get(what) != now
        ]
        if changed:
            raise RunError(
                f"{self.path} was measured with other {' and '.join(changed)}. Give another "
                "--out, or --fresh to forget it."
            )
        return before

    def _contributors(self, before: Mapping[str, Any]) -> dict[str, Any]:
        """Return the machines that measured cells, as the head has them; of times there is one."""
        if "machine" in self.head:
            return {}
        # Files were once written with the last machine alone.
        found = before.get("machines", [before["machine"]] if "machine" in before else [])
        return {"machines": [*found, *(one for one in self.machines if one not in found)]}


def without_fresh(fresh: bool) -> str:
    """Return what belongs to the advice to give the same command, where it has `--fresh`."""
    return " Leave out --fresh then: it forgets what was measured." if fresh else ""


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return which values differ, and how."""
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return ", ".join(f"{key} {before.get(key)}, now {now.get(key)}" for key in keys)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows for reading: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def brief(numbers: Numbers) -> str:
    """Return the plain numbers of a cell on one line."""
    plain = {k: v for k, v in numbers.items() if isinstance(v, int | float)}
    return ", ".join(f"{name} {value:.4g}" for name, value in plain.items())


def versions() -> dict[str, str]:
    """Return the versions that decide the numbers."""
    found = {"python": platform.python_version()}
    return found | {name: metadata.version(name) for name in ("torch", "transformers", "peft")}


def machine() -> dict[str, Any]:
    """Return what numbers are made on here: times of two processors are not to be mixed up."""
    found: dict[str, Any] = {"cpus": os.cpu_count(), "processor": processor()}
    # A virtual machine may hide which processor it has; what PyTorch's kernels use tells more.
    found["instructions"] = torch.backends.cpu.get_cpu_capability()
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def processor() -> str:
    """Return the processor's name, or its kind where the system does not tell the name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
