"""The pictures of a report, as PNG files in memory."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reftune.errors import RunError
from reftune.records import pareto
from reftune.samples import OverSeeds

# Okabe and Ito's colours, which people with any colour vision tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A7F00")
_MARKERS = "osD^vPX*"
# Where the labels of a group stand: offset in points, and alignment.
_SIDES = (
    (0, 8, "center", "bottom"),
    (0, -8, "center", "top"),
    (9, 0, "left", "center"),
    (-9, 0, "right", "center"),
)


@dataclass(frozen=True)
class Point:
    """An arm in a picture of score against cost."""

    cost: float
    score: OverSeeds
    group: str


def losses(arms: Mapping[str, Sequence[Sequence[Mapping[str, float]]]]) -> bytes:
    """Draw the training loss over the steps: the mean over an arm's logs, and their range."""
    figure, axes = _figure(7.5, 4.2)
    for number, (arm, logs) in enumerate(arms.items()):
        by_step: dict[float, list[float]] = {}
        for log in logs:
            for row in log:
                by_step.setdefault(row["step"], []).append(row["loss"])
        steps = sorted(step for step, values in by_step.items() if len(values) == len(logs))
        means = [sum(by_step[s]) / len(logs) for s in steps]
        colour = _COLOURS[number % len(_COLOURS)]
        style = "-" if number < len(_COLOURS) else "--"
        axes.plot(steps, means, color=colour, ls=style, lw=1.6, label=arm)
        if len(logs) > 1:
            low, high = ([pick(by_step[s]) for s in steps] for pick in (min, max))
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
    axes.set(xlabel="optimizer step", ylabel="training loss (nats per completion token)")
    axes.set_ylim(bottom=0)
    _legend(axes, len(arms))
    return _png(figure)


def against_cost(
    points: Mapping[str, Point], cost: str, base: tuple[str, float] | None, score: str
) -> bytes:
    """Draw scores (mean, deviation over seeds) against a cost; the Pareto front is a line.

    `base` is the name and score of what costs nothing: a horizontal line, or where it is so far off
    that the others would be squeezed, a note in the legend.
    """
    figure, axes = _figure(7.5, 4.6)
    groups = list(dict.fromkeys(point.group for point in points.values()))
    front = pareto({name: (p.cost, p.score.mean) for name, p in points.items()})
    ordered = [points[name] for name in front]
    axes.plot(
        [p.cost for p in ordered],
        [p.score.mean for p in ordered],
        color="#999999",
        lw=1.2,
        ls=(0, (4, 2)),
        zorder=1,
        label="Pareto front" if len(front) > 1 else None,
    )
    for number, group in enumerate(groups):
        mine = [p for p in points.values() if p.group == group]
        axes.errorbar(
            [p.cost for p in mine],
            [p.score.mean for p in mine],
            yerr=[p.score.sd or 0.0 for p in mine],
            fmt=_MARKERS[(number + number // len(_COLOURS)) % len(_MARKERS)],
            color=_COLOURS[number % len(_COLOURS)],
            ms=7,
            capsize=3,
            lw=1,
            zorder=3,
            label=group,
        )
    if base is not None:
        _draw_base(axes, *base, [p.score.mean for p in points.values()])
    costs = [p.cost for p in points.values() if p.cost > 0]
    if costs and max(costs) > 20 * min(costs):
        if any(p.cost == 0 for p in points.values()):  # which a log axis cannot show
            axes.set_xscale("symlog", linthresh=min(costs))
        else:
            axes.set_xscale("log")
    _name_points(axes, points)
    axes.margins(x=0.12, y=0.15)
    axes.set(xlabel=cost, ylabel=score)
    _legend(axes, len(groups) + 2)
    return _png(figure)


def _draw_base(axes: Any, name: str, value: float, scores: Sequence[float]) -> None:
    style: dict[str, Any] = {"color": "#666666", "lw": 1, "ls": ":", "zorder": 0}
    spread = max(scores) - min(scores)
    if min(scores) - 2 * spread <= value <= max(scores) + 2 * spread:
        axes.axhline(value, label=name, **style)
    else:
        axes.plot([], [], label=f"{name}: {value:.1f}", **style)


def _name_points(axes: Any, points: Mapping[str, Point]) -> None:
    """Name points whose group does not say which they are, each group's on a side of its own."""
    groups = list(dict.fromkeys(point.group for point in points.values()))
    for number, group in enumerate(groups):
        x, y, across, along = _SIDES[number % len(_SIDES)]
        names = [name for name, point in points.items() if point.group == group]
        for name, label in zip(names, shortest_labels(names, group), strict=True):
            axes.annotate(
                label,
                (points[name].cost, points[name].score.mean),
                xytext=(x, y),
                textcoords="offset points",
                fontsize=8,
                ha=across,
                va=along,
                color=_COLOURS[number % len(_COLOURS)],
            )


def shortest_labels(names: Sequence[str], group: str) -> list[str]:
    """Return what tells a group's arms apart: of "lora-r4-alpha8" and "lora-r8-alpha16" r4, r8.

    The first parts of their names that do so; "" for an arm that has the group's own name.
    """
    parts = [[p for p in name.removeprefix(group).split("-") if p] for name in names]
    for count in range(1, max(map(len, parts), default=0) + 1):
        labels = ["-".join(own[:count]) for own in parts]
        if len(set(labels)) == len(labels):
            return labels
    return ["-".join(own) for own in parts]


def _figure(width: float, height: float) -> tuple[Any, Any]:
    try:
        import matplotlib
    except ImportError as error:
        raise RunError("Plots need matplotlib: pip install 'reftune[plots]'.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _legend(axes: Any, entries: int) -> None:
    """Put the legend beside the picture where it has many entries, for it would cover points."""
    if entries > 5:
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    elif entries > 1:
        axes.legend(frameon=False, fontsize=9)


def _png(figure: Any) -> bytes:
    from matplotlib import pyplot

    buffer = io.BytesIO()
    # Without the version of matplotlib in the file, the same runs give the same bytes.
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    pyplot.close(figure)
    return buffer.getvalue()
