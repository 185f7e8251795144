"""An experiment: one YAML, many runs. Variants of the method, a grid of settings, several seeds.

    name, model, data, ...   as of a run; what all cells share
    methods:                 named variants, each with the keys that it changes
    grid:                    keys and their values: every combination; or a list of combinations;
                             "r" is "adapter.r", where only one key ends so
    seeds: [42, 43, 44]
    keep_checkpoints: false  of finished cells

A cell is an ordinary run in OUTPUT_DIR/NAME/CELL. What is finished is not run again, what was
killed goes on from its checkpoint, what fails is recorded and does not stop the rest. The base
model is evaluated once, in OUTPUT_DIR/NAME/base.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reftune.errors import ReftConfigError, did_you_mean
from reftune.methods import BASELINES
from reftune.settings import (
    RunConfig,
    apply_override,
    keys_ending,
    parse_config,
    read_yaml,
    set_key,
)

Value = TypeVar("Value")
Point = Mapping[str, Any]
"""Keys of a grid with one value each."""


class Plan(BaseModel):
    """What an experiment's YAML has beside the keys of a run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    methods: dict[str, dict[str, Any]] = Field(default_factory=dict)
    grid: Any = Field(default_factory=dict)  # looked at by _points
    seeds: list[int] = Field(default_factory=lambda: [42], min_length=1)
    keep_checkpoints: bool = False


@dataclass(frozen=True)
class Cell:
    """One run of an experiment: which variant, which point of the grid, which seed."""

    variant: str
    point: Point
    seed: int
    config: RunConfig

    def __reduce__(self) -> tuple[Any, ...]:
        """Be sent to another process as plain values: settings' classes are made at run time."""
        values = self.config.model_dump(mode="json")
        return _cell_again, (self.variant, dict(self.point), self.seed, values)

    @property
    def name(self) -> str:
        """Return the run's name: of variant, point and seed."""
        return self.config.name

    @property
    def arm(self) -> str:
        """Return what differs from other cells but the seed: their results are averaged."""
        return arm_name(self.variant, self.point)


@dataclass(frozen=True)
class Experiment:
    """All cells of an experiment, and where they are kept."""

    name: str
    directory: Path
    cells: tuple[Cell, ...]
    keep_checkpoints: bool
    source: str


def load_experiment(
    path: str | Path, overrides: Sequence[str] = (), seeds: Sequence[int] | None = None
) -> Experiment:
    """Read an experiment's YAML; `overrides` win over variants, `seeds` over the file's.

    Raises ReftConfigError for a key or value that is not accepted, naming the cell.
    """
    values = read_yaml(path)
    own = set(Plan.model_fields)
    shared = [text for text in overrides if text.partition("=")[0].split(".")[0] not in own]
    for text in overrides:
        if text not in shared:
            apply_override(values, text)
    if any(text.startswith("seed=") for text in shared):
        raise ReftConfigError("An experiment has several seeds; give --seeds 42,43,44, not seed=.")
    unknown = [str(key) for key in values if key not in own and key not in RunConfig.model_fields]
    if unknown:
        known = [*Plan.model_fields, *RunConfig.model_fields]
        raise ReftConfigError(
            f"{path}: there is no key {unknown[0]!r}; an experiment has those of a run, and "
            f"{', '.join(Plan.model_fields)}." + did_you_mean(unknown[0], known)
        )
    given = {"seeds": [values["seed"]]} if "seed" in values else {}
    plan = _plan(given | {key: values.pop(key) for key in own & set(values)}, str(path))
    name = _text(values, "name", str(path), overrides)
    changed = {text.partition("=")[0] for text in shared}
    cells = [
        _cell(values, shared, variant, changes, point, seed, name, str(path))
        for variant, changes in (plan.methods or {"": {}}).items()
        for point in _points(changes.get("grid", plan.grid), changed, str(path))
        for seed in (seeds or plan.seeds)
    ]
    if twice := _twice(seeds or plan.seeds):
        raise ReftConfigError(f"{path}: seeds has {twice[0]} more than once.")
    _check_names([cell.name for cell in cells], str(path))
    directory = cells[0].config.directory.parent
    return Experiment(name, directory, tuple(cells), plan.keep_checkpoints, str(path))


def _cell_again(variant: str, point: Point, seed: int, values: Mapping[str, Any]) -> Cell:
    return Cell(variant, point, seed, parse_config(values, str(values["name"])))


def arm_name(variant: str, point: Point) -> str:
    """Return a variant with the values of a grid's point: "lora-r8-lr0.0003"."""
    told = {key: v for key, v in point.items() if (key, v) != ("adapter.method", variant)}
    return "".join([variant, *(f"-{_short(key)}{_slug(v)}" for key, v in told.items())])


def _plan(values: dict[str, Any], where: str) -> Plan:
    try:
        plan = Plan.model_validate(values)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, p['loc'][:2]))} is {p['input']!r}: {p['msg'].lower()}"
            for p in error.errors()
        ]
        raise ReftConfigError(f"{where}: " + "; ".join(problems)) from error
    for name, changes in plan.methods.items():
        if not re.fullmatch(r"\w[\w.]*", name):
            raise ReftConfigError(
                f"{where}: a variant is named {name!r}; accepted are letters, digits, _ and dots."
            )
        for key in changes:
            known = [*RunConfig.model_fields, "grid"]
            if key.split(".")[0] not in known:
                raise ReftConfigError(
                    f"{where}: methods.{name} has the key {key!r}, which is none of a run's."
                    + did_you_mean(key, known)
                )
    return plan


def _points(grid: Any, overridden: set[str], where: str) -> Iterator[Point]:
    """Yield the points of a grid: the product of its values, or those listed."""
    points: list[Point]
    if isinstance(grid, Mapping):
        for key, found in grid.items():
            if not isinstance(found, list) or not found:
                raise ReftConfigError(
                    f"{where}: grid.{key} is {found!r}; a grid has lists of values, or is a list "
                    "of points such as {adapter.r: 4, adapter.lora_alpha: 8}."
                )
        points = [dict(zip(grid, one, strict=True)) for one in itertools.product(*grid.values())]
    elif isinstance(grid, list) and all(isinstance(point, Mapping) for point in grid):
        points = grid or [{}]
    else:
        raise ReftConfigError(f"{where}: grid is {grid!r}; accepted are keys with lists of values.")
    for given in points:
        whole = [_whole(str(key), where) for key in given]
        if twice := _twice(whole):
            raise ReftConfigError(f"{where}: grid has {twice[0]} twice: {', '.join(given)}.")
        point = dict(zip(whole, given.values(), strict=True))
        # "adapter={...}" would undo "adapter.r" without a word
        both = {o for o in overridden for key in point if f"{key}.".startswith(f"{o}.")}
        if both:
            raise ReftConfigError(
                f"{', '.join(sorted(both))} is in the grid of {where} and overridden as well; "
                "override the grid: 'grid={...}'."
            )
        yield point


def _whole(key: str, where: str) -> str:
    """Return a grid's key with its section. Raises ReftConfigError where several have it."""
    if "." in key or key in RunConfig.model_fields:
        return key
    found = keys_ending(key)
    if len(found) > 1:
        raise ReftConfigError(f"{where}: grid has {key!r}, which may be {' or '.join(found)}.")
    return found[0] if found else key


def _cell(
    values: Mapping[str, Any],
    overrides: Sequence[str],
    variant: str,
    changes: Mapping[str, Any],
    point: Point,
    seed: int,
    name: str,
    where: str,
) -> Cell:
    merged = copy.deepcopy(dict(values))
    _change(merged, {key: value for key, value in changes.items() if key != "grid"})
    _change(merged, point)
    for text in overrides:
        apply_override(merged, text)
    adapter = merged.get("adapter") or {}
    variant = variant or str(adapter.get("method", "loreft"))
    cell = f"{arm_name(variant, point)}-s{seed}"
    folder = str(Path(merged.get("output_dir", "runs")) / name)
    merged |= {"name": cell, "seed": seed, "output_dir": folder}
    return Cell(variant, dict(point), seed, parse_config(merged, f"{where}, {cell}"))


def _change(values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Set a variant's keys; a method of another kind does not inherit the adapter's other keys."""
    flat = dict(_flat(changes))
    method = flat.get("adapter.method")
    if method is not None and _kind(method) != _kind(_method_of(values)):
        values["adapter"] = {}
    for key, value in flat.items():
        set_key(values, key, copy.deepcopy(value))


def _flat(changes: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield "adapter.r" and its value for {"adapter": {"r": 4}}, and for {"adapter.r": 4}."""
    for key, value in changes.items():
        if isinstance(value, Mapping) and key in RunConfig.model_fields:
            yield from ((f"{key}.{inner}", found) for inner, found in value.items())
        else:
            yield key, value


def _method_of(values: Mapping[str, Any]) -> str:
    return str((values.get("adapter") or {}).get("method", "loreft"))


def _kind(method: str) -> str:
    return method if method in BASELINES else "reft"


def _text(values: Mapping[str, Any], key: str, where: str, overrides: Sequence[str]) -> str:
    found = next((t.partition("=")[2] for t in overrides if t.startswith(f"{key}=")), None)
    found = values.get(key) if found is None else found
    if not isinstance(found, str) or not re.fullmatch(r"\w[\w.\-]*", found):
        raise ReftConfigError(f"{where}: {key} is {found!r}; an experiment has a name, as a run.")
    return found


def _check_names(names: Sequence[str], where: str) -> None:
    if twice := _twice(names):
        raise ReftConfigError(f"{where}: two cells would be named {twice[0]!r}; name them apart.")


def _twice(values: Iterable[Value]) -> list[Value]:
    """Return the values that are there more than once."""
    return [value for value, count in Counter(values).items() if count > 1]


def _short(key: str) -> str:
    last = key.rpartition(".")[2]
    known = {"learning_rate": "lr", "num_virtual_tokens": "tokens", "lora_alpha": "alpha"}
    return known.get(last, last)


def _slug(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^\w.]+", "_", text).strip("_")
