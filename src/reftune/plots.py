"""Pictures of a run."""

from __future__ import annotations

import json
import os
from pathlib import Path

from reftune.errors import RunError


def read_log(path: Path) -> list[dict[str, float]]:
    """Return the rows of a log.jsonl; a torn last line is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def plot_loss(log: Path, target: Path, title: str) -> None:
    """Draw loss and learning rate over the steps of a log.jsonl into an image file.

    Raises RunError where matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise RunError("Plots need matplotlib: pip install 'reftune[plots]'.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in read_log(log) if "loss" in row]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    steps = [row["step"] for row in rows]
    axes.plot(steps, [row["loss"] for row in rows], color="#1f6f8b", label="training loss")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per completion token)", title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    rate = axes.twinx()
    rate.plot(steps, [row["learning_rate"] for row in rows], color="#c98b2b", lw=1, ls="--")
    rate.set_ylabel("learning rate (dashed)")
    rate.set_ylim(bottom=0)
    part = target.with_name(f".{target.name}.part.png")
    figure.savefig(part, dpi=120)
    pyplot.close(figure)
    os.replace(part, target)
