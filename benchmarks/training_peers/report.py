"""What was measured, as rates, ratios, a table and a file. Standard library only."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training_peers.floor import Shape, floor_flops
from training_peers.job import Job

OURS = "reftune"
FLOOR = "floor"
Cells = dict[str, dict[str, Any]]  # "WORKLOAD/ARM/ROUND" to what was measured


def rates(job: Job, result: dict[str, Any]) -> dict[str, Any]:
    """Return a worker's result with its rates in place of what each step held."""
    seconds: list[float] = result["seconds"]
    contents = result.pop("contents")
    mean_length = mean_tokens(job)
    if job.whole_run:
        missing = job.total_steps - len(seconds)
        # The first step is not like the others, so it says nothing about those that were not made.
        whole = sum(seconds) + (missing * statistics.median(seconds[1:]) if missing else 0.0)
        examples = len(job.plain_order) / whole
        return result | {
            "examples_per_second": examples,
            "tokens_per_second": examples * mean_length,
            "run_seconds": whole,
            "extrapolated_steps": missing,
        }
    if contents is None:
        result["notes"].append("what each step held is unknown: taken as the mean")
        contents = [(job.batch_size, job.batch_size * mean_length)] * len(seconds)
    measured = slice(job.first_steps, None)
    tokens = sum(n for _, n in contents[measured]) / sum(seconds[measured])
    return result | {
        "tokens_per_second": tokens,
        "examples_per_second": tokens / mean_length,
        "median_step_seconds": statistics.median(seconds[measured]),
    }


def mean_tokens(job: Job) -> float:
    """Return the mean length of the examples."""
    return statistics.mean(len(row.input_ids) for row in job.examples)


def floor_rates(job: Job, operations_per_second: float) -> dict[str, Any]:
    """Return the floor's rates on a job."""
    config = json.loads(Path(job.model, "config.json").read_text())
    setting = job.setting
    operations = floor_flops(
        Shape.of(config),
        [(len(row.input_ids), row.prompt_length) for row in job.examples],
        setting.layers,
        setting.prefix,
        setting.suffix,
        job.epochs,
    )
    examples = len(job.plain_order) * operations_per_second / operations
    return {
        "operations_per_example": operations / len(job.plain_order),
        "examples_per_second": examples,
        "tokens_per_second": examples * mean_tokens(job),
    }


REPORTED = (
    "examples_per_second",
    "tokens_per_second",
    "run_seconds",
    "extrapolated_steps",
    "peak_bytes",
    "load_seconds",
    "first_step_seconds",
    "adapter_bytes",
    "trainable",
    "first_loss",
    "last_loss",
    "heldout_loss",
    "operations_per_second",
    "operations_per_example",
)


def summarise(cells: Cells) -> dict[str, dict[str, Any]]:
    """Return, per workload and arm, medians over the rounds and of the ratios within rounds."""
    summary: dict[str, dict[str, Any]] = {}
    for key in cells:
        workload, arm, _ = key.rsplit("/", 2)
        summary.setdefault(workload, {})[arm] = None
    for workload, arms in summary.items():
        for arm in arms:
            arms[arm] = _summary_of(cells, workload, arm)
    return summary


def _summary_of(cells: Cells, workload: str, arm: str) -> dict[str, Any]:
    rounds = _rounds(cells, workload, arm)
    good = {n: cell for n, cell in rounds.items() if "error" not in cell}
    if not good:
        return {"error": next(iter(rounds.values()))["error"]}
    row: dict[str, Any] = {"rounds": len(good)}
    for name in REPORTED:
        values = [cell[name] for cell in good.values() if cell.get(name) is not None]
        if values:
            row[name] = _rounded(statistics.median(values))
    # A ratio is taken within a round, where both had the same machine.
    for name, other, inverse in (("reftune_is", OURS, True), ("of_floor", FLOOR, False)):
        others = _rounds(cells, workload, other)
        ratios = [
            cell["examples_per_second"] / others[n]["examples_per_second"]
            for n, cell in good.items()
            if "examples_per_second" in others.get(n, {})
        ]
        if ratios and other != arm:
            row[name] = _rounded(statistics.median(1 / r if inverse else r for r in ratios))
    return row


def _rounded(number: float) -> float:
    """Return six digits: no measurement has more."""
    return float(f"{number:.6g}")


def _rounds(cells: Cells, workload: str, arm: str) -> Cells:
    prefix = f"{workload}/{arm}/"
    return {key.removeprefix(prefix): c for key, c in cells.items() if key.startswith(prefix)}


def table(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the summary for reading; errors in full below it."""
    head = ("examples/s", "tokens/s", "reftune is", "of floor", "peak MiB", "1st step s", "kB")
    lines, errors = [], []
    for workload, arms in summary.items():
        width = max(len(arm) for arm in arms) + 2
        lines.append(f"{workload:{width}}" + "".join(f"{h:>12}" for h in (*head, "loss")))
        for arm, row in arms.items():
            if "error" in row:
                errors.append(f"{workload} {arm}: {row['error']}")
                lines.append(f"  {arm:{width - 2}}{'failed':>12}")
                continue
            loss = row.get("heldout_loss")
            values = (
                f"{row['examples_per_second']:.2f}",
                f"{row['tokens_per_second']:.1f}",
                f"{row['reftune_is']:.2f} x" if "reftune_is" in row else "",
                f"{row['of_floor']:.2f}" if "of_floor" in row else "",
                f"{row['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in row else "",
                f"{row['first_step_seconds']:.1f}" if "first_step_seconds" in row else "",
                f"{row['adapter_bytes'] / 1e3:.0f}" if "adapter_bytes" in row else "",
                "" if loss is None else f"{loss:.4f}",
            )
            lines.append(f"  {arm:{width - 2}}" + "".join(f"{v:>12}" for v in values))
    return "\n".join(lines + errors)


def save(path: Path, report: dict[str, Any], cells: Cells) -> None:
    """Write the report, a cell per line, under a temporary name and rename it."""
    head = json.dumps(report | {"summary": summarise(cells)}, indent=1)[:-2]
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(cell)}" for key, cell in cells.items())
    part = path.with_name(f".{path.name}.part")
    part.write_text(f'{head},\n "cells": {{\n{lines}\n }}\n}}\n')
    os.replace(part, path)


def machine() -> dict[str, Any]:
    """Return what the numbers were measured on."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if "model name" in line]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": names[0] if names else platform.machine(),
        "cpus": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "platform": platform.platform(),
    }


def commit_of(checkout: Path | None) -> str | None:
    """Return the commit of a git checkout."""
    if checkout is None or not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or None
