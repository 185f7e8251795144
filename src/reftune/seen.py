"""Which questions of tasks an adapter was trained on, by the config of the run that it is of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reftune.prompts import Example
from reftune.settings import parse_config
from reftune.sources import trained_on
from reftune.stored import ADAPTER, CONFIG, adapter_directory, run_config
from reftune.tasks.leaks import Leak, describe, find_leaks

_CHOOSES_DATA = ("data", "seed", "evaluate")  # keys of a run


def find_seen(
    adapters: Mapping[str, str | Path],
    tests: Mapping[str, Sequence[Example]],
    counts: Mapping[str, int] | None = None,
) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Return how many questions, where any, were trained on: {test set: {who: count}}, and notes.

    `adapters` are runs' directories, or the adapters in them; of others nothing is known. Of a test
    set the first `counts` are meant; all of it is given, since its template is what all of its
    prompts share. Training is over, so nothing is refused, and what cannot be read any more is a
    note, too. Runs of the same data are searched once.
    """
    wanted = {name: rows[: (counts or {}).get(name)] for name, rows in tests.items()}
    searched: dict[str, list[Leak] | Exception] = {}
    seen: dict[str, dict[str, int]] = {}
    notes = []
    for who, adapter in adapters.items():
        values = _config_of(adapter)
        if values is None:
            continue
        key = json.dumps([values.get(k) for k in _CHOOSES_DATA], sort_keys=True, default=str)
        if key not in searched:
            try:
                searched[key] = find_leaks(trained_on(parse_config(values, CONFIG)), tests)
            except Exception as error:  # whatever is wrong with the data, scores are not lost
                searched[key] = error
        leaks = searched[key]
        if isinstance(leaks, Exception):
            reason = " ".join(str(leaks).split())
            notes.append(f"Note: not checked against what {adapter} was trained on: {reason}")
            continue
        asked = [leak for leak in leaks if leak.example < len(wanted[leak.test])]
        found = describe(asked, wanted, f"the training data of {adapter}")
        for name, (count, shares) in found.items():
            seen.setdefault(name, {})[who] = count
            notes.append(f"Note: {shares}")
    return seen, notes


def _config_of(adapter: str | Path) -> dict[str, Any] | None:
    """Return the config of the run that an adapter is of, if it was trained on prompts."""
    directory = Path(adapter_directory(adapter)).absolute()
    values = run_config(directory.parent) if directory.name == ADAPTER else {}
    if not values.get("data", {}).get("train") or values.get("task_type") == "seq_cls":
        return None
    return values
