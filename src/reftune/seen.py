"""Which questions of tasks an adapter was trained on, by the config of the run that it is of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from reftune.prompts import Example
from reftune.settings import parse_config
from reftune.sources import trained_on
from reftune.stored import ADAPTER, CONFIG, adapter_directory, run_config
from reftune.tasks.leaks import describe, find_leaks


def find_seen(
    adapter: str | Path,
    tests: Mapping[str, Sequence[Example]],
    counts: Mapping[str, int] | None = None,
) -> tuple[dict[str, int], list[str]]:
    """Return how many questions of each test set, where any, were trained on, and notes on that.

    `adapter` is a run's directory, or the adapter in it; of others nothing is known. Of a test set
    the first `counts` are meant; all of it is given, since its template is what all of its prompts
    share. Training is over, so nothing is refused, and what cannot be read any more is a note, too.
    """
    directory = Path(adapter_directory(adapter)).absolute()
    values = run_config(directory.parent) if directory.name == ADAPTER else {}
    if not values.get("data", {}).get("train") or values.get("task_type") == "seq_cls":
        return {}, []
    try:
        leaks = find_leaks(trained_on(parse_config(values, CONFIG)), tests)
    except Exception as error:  # whatever is wrong with the data, scores are not lost for it
        reason = " ".join(str(error).split())
        return {}, [f"Note: not checked against what {adapter} was trained on: {reason}"]
    wanted = {name: rows[: (counts or {}).get(name)] for name, rows in tests.items()}
    asked = [leak for leak in leaks if leak.example < len(wanted[leak.test])]
    found = describe(asked, wanted, f"the training data of {adapter}")
    counted = {name: count for name, (count, _) in found.items()}
    return counted, [f"Note: {shares}" for _, shares in found.values()]
