"""GLUE (the paper's Table 4): eight sets of sentences to classify or to grade, and their metrics.

    DATA_DIR/NAME/{train,dev or validation}.jsonl   a folder, where a test file with labels stands
                                                    in for a validation file that is not there
    nyu-mll/glue                                    the Hub's, without a folder

Columns and labels are those of the Hub's; in RTE and QNLI, 0 is entailment. What a set is scored by
comes from scikit-learn and SciPy.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, TypeAlias, final

import numpy as np
from numpy.typing import NDArray

from reftune.data import Row, load_rows
from reftune.errors import DataError, ReftConfigError, did_you_mean

Metric: TypeAlias = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]
Protocol: TypeAlias = Literal["paper", "plain"]
Values: TypeAlias = NDArray[np.int64] | NDArray[np.float64]

HUB: Final = "nyu-mll/glue"
SUFFIXES: Final = (".jsonl", ".json", ".csv", ".parquet")
RESAMPLES: Final = 500
_SCORE_MAX: Final = 5.0


@final
@dataclass(frozen=True)
class GlueSet:
    """A set of GLUE.

    Attributes:
        columns: of its texts, one or two.
        labels: names of the classes, in the order of their numbers; none: texts are graded 0 to 5.
        metrics: what it is scored by; an epoch is chosen, and a table filled, by the first.
        validation: names of the split, as the Hub and folders have it.
        more: further sets to score: name -> names of their split.
    """

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[Metric, ...] = ("accuracy",)
    validation: tuple[str, ...] = ("validation", "dev", "test")
    more: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def is_graded(self) -> bool:
        """Return whether a text has a grade (regression) and not a class."""
        return not self.labels


_TWO = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")

GLUE: Final[Mapping[str, GlueSet]] = MappingProxyType(
    {
        "cola": GlueSet(("sentence",), ("unacceptable", "acceptable"), ("matthews", "accuracy")),
        "sst2": GlueSet(("sentence",), ("negative", "positive")),
        "mrpc": GlueSet(_TWO, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
        "stsb": GlueSet(_TWO, (), ("pearson", "spearman")),
        "qqp": GlueSet(
            ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")
        ),
        "mnli": GlueSet(
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            validation=("validation_matched", "dev_matched"),
            more={"mnli-mm": ("validation_mismatched", "dev_mismatched")},
        ),
        "qnli": GlueSet(("question", "sentence"), _ENTAILMENT),
        "rte": GlueSet(_TWO, _ENTAILMENT),
    }
)


@final
@dataclass(frozen=True, slots=True)
class Labelled:
    """Texts with their class or grade, and where they stand."""

    texts: tuple[str, ...]
    label: int | float
    where: str


def get_set(name: str) -> GlueSet:
    """Return a set by its name. Raises ReftConfigError for another."""
    if name not in GLUE:
        raise ReftConfigError(
            f"{name!r} is no set of GLUE; there are {', '.join(GLUE)}."
            + did_you_mean(name, list(GLUE))
        )
    return GLUE[name]


def load(
    name: str, splits: Sequence[str], data_dir: str | None, limit: int | None = None
) -> list[Labelled]:
    """Read the first `limit` rows of the first of `splits` that there is.

    `data_dir` is a folder with one folder for each set; None or "hub" is the Hub.

    Raises:
        DataError: there is no such split, or a row lacks a text or a label; names file and line.
        ReftConfigError: there is no such set.
    """
    wanted = get_set(name)
    if data_dir in (None, "hub"):
        rows = load_rows(f"{HUB}:{name}", splits[0], limit)
    else:
        rows = _read_folder(Path(str(data_dir)).expanduser() / name, splits, limit)
    return [_labelled(row, wanted) for row in rows]


def divide(count: int, seed: int) -> tuple[list[int], list[int]]:
    """Divide a validation split as the paper does: (rows to choose an epoch by, rows to score).

    Of more than 5,000 rows 1,000 choose, otherwise half of them, by a seeded `random_split`, as
    in pyreft; the code of the paper's own runs drew the same numbers of rows in another way.

    Raises:
        ReftConfigError: there are fewer than 2 rows.
    """
    import torch
    from torch.utils.data import random_split

    if count < 2:
        raise ReftConfigError(
            f"The validation split has {count} rows, and the paper's protocol divides it. Give "
            "more, or score it whole (classify.protocol=plain)."
        )
    choosing = 1000 if count > 5000 else count // 2
    generator = torch.Generator().manual_seed(seed)
    rows: Any = range(count)
    scored, choosing_part = random_split(rows, [count - choosing, choosing], generator)
    return list(choosing_part.indices), list(scored.indices)


def check_metrics_installed() -> None:
    """Raise ReftConfigError where the libraries that metrics come from are not installed."""
    missing = [name for name in ("sklearn", "scipy") if importlib.util.find_spec(name) is None]
    if missing:
        raise ReftConfigError(
            f"GLUE's metrics need {', '.join(missing)}, not installed: pip install 'reftune[glue]'."
        )


def score(metric: Metric, gold: Values, predicted: Values) -> float:
    """Return a metric of predictions (N,), between -1 and 1.

    A correlation with predictions that are all the same is 0, as is F1 without a positive one.
    """
    from scipy import stats
    from sklearn import metrics

    if metric == "accuracy":
        return float(metrics.accuracy_score(gold, predicted))
    if metric == "f1":
        return float(metrics.f1_score(gold, predicted, zero_division=0.0))
    if np.ptp(gold) == 0 or np.ptp(predicted) == 0:
        return 0.0
    if metric == "matthews":
        return float(metrics.matthews_corrcoef(gold, predicted))
    correlation = stats.pearsonr if metric == "pearson" else stats.spearmanr
    return float(correlation(gold, predicted).statistic)


def standard_error(metric: Metric, gold: Values, predicted: Values) -> float | None:
    """Return a metric's standard error: of accuracy sqrt(p(1-p)/(n-1)), of others by bootstrap.

    The bootstrap draws `RESAMPLES` samples, the same ones each time; None for a single row.
    """
    from scipy import stats

    count = len(gold)
    if count < 2:
        return None
    if metric == "accuracy":
        p = score(metric, gold, predicted)
        return math.sqrt(p * (1 - p) / (count - 1))
    generator = np.random.default_rng(0)
    drawn = stats.bootstrap(
        (gold, predicted),
        lambda g, p: score(metric, g, p),
        n_resamples=RESAMPLES,
        paired=True,
        vectorized=False,
        method="percentile",
        rng=generator,
    )
    return float(drawn.standard_error)


def commonest(rows: Sequence[Labelled]) -> int:
    """Return the class that most rows have, the first of those that are as frequent."""
    labels, counts = np.unique([row.label for row in rows], return_counts=True)
    return int(labels[counts.argmax()])


def _read_folder(folder: Path, splits: Sequence[str], limit: int | None) -> list[Row]:
    if (folder / "dataset_dict.json").is_file():
        return load_rows(folder, splits[0], limit)
    for split in splits:
        for suffix in SUFFIXES:
            if (file := folder / f"{split}{suffix}").is_file():
                return load_rows(file, limit=limit)
    here = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    raise DataError(
        f"{folder} has no {' or '.join(splits)} file ({', '.join(SUFFIXES)}); it has "
        f"{', '.join(here) or 'nothing'}. Give the folder that holds a folder {folder.name!r} as "
        "data.data_dir, or none for the Hub's."
    )


def _labelled(row: Row, wanted: GlueSet) -> Labelled:
    texts = []
    for column in wanted.columns:
        text = row.fields.get(column)
        if not isinstance(text, str):
            have = [str(name) for name in row.fields]
            raise DataError(
                f"{row.where}: {column} is {text!r:.80}, not a text; the row has {', '.join(have)}."
                + did_you_mean(column, have)
            )
        texts.append(text)
    label = _grade(row) if wanted.is_graded else _class(row, len(wanted.labels))
    return Labelled(tuple(texts), label, row.where)


def _class(row: Row, classes: int) -> int:
    label: Any = row.fields.get("label")
    if isinstance(label, str) and label.isdigit():  # of a CSV file
        label = int(label)
    if type(label) is not int or not 0 <= label < classes:
        hidden = " A test split of the Hub's has no labels (-1)." if label == -1 else ""
        raise DataError(
            f"{row.where}: label is {label!r}; accepted are the numbers 0 to {classes - 1}.{hidden}"
        )
    return label


def _grade(row: Row) -> float:
    given: Any = row.fields.get("label", row.fields.get("score"))
    try:
        grade = float(given)
    except (TypeError, ValueError):
        grade = math.nan
    if isinstance(given, bool) or not 0.0 <= grade <= _SCORE_MAX:
        raise DataError(
            f"{row.where}: the grade (label or score) is {given!r}; accepted is a number from 0 "
            "to 5."
        )
    return grade
