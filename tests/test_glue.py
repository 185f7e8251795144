"""GLUE: metrics against formulas done by hand, rows of folder and Hub, the paper's division."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import random_split

from reftune.errors import DataError, ReftConfigError
from reftune.tasks import glue
from reftune.tasks.glue import GLUE, Labelled, Metric

# Rows as the Hub's data sets have them.
HUB_ROWS: dict[str, dict[str, Any]] = {
    "cola": {"sentence": "It rains.", "label": 1, "idx": 0},
    "sst2": {"sentence": "dull", "label": 0, "idx": 0},
    "mrpc": {"sentence1": "a", "sentence2": "b", "label": 1, "idx": 0},
    "stsb": {"sentence1": "a", "sentence2": "b", "label": 3.8, "idx": 0},
    "qqp": {"question1": "a", "question2": "b", "label": 0, "idx": 0},
    "mnli": {"premise": "a", "hypothesis": "b", "label": 2, "idx": 0},
    "qnli": {"question": "a", "sentence": "b", "label": 1, "idx": 0},
    "rte": {"sentence1": "a", "sentence2": "b", "label": 0, "idx": 0},
}
TABLE = {"cola": "matthews", "stsb": "pearson"}  # what the paper's Table 4 has; else accuracy


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_eight_sets_are_scored_as_in_the_papers_table() -> None:
    assert set(GLUE) == set(HUB_ROWS)
    for name, about in GLUE.items():
        assert about.metrics[0] == TABLE.get(name, "accuracy")
    assert GLUE["stsb"].metrics[1] == "spearman"
    assert [name for name, about in GLUE.items() if "f1" in about.metrics] == ["mrpc", "qqp"]


def test_zero_is_entailment() -> None:
    for name in ("rte", "qnli", "mnli"):
        assert GLUE[name].labels[0] == "entailment"


# --- metrics --------------------------------------------------------------------------------------

GOLD = np.array([1, 1, 1, 0, 0, 1])
ANSWERS = np.array([1, 0, 1, 1, 0, 1])  # 3 true positives, 1 true negative, 1 false of each


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("accuracy", 4 / 6),
        ("f1", 2 * 3 / (2 * 3 + 1 + 1)),
        ("matthews", (3 * 1 - 1 * 1) / math.sqrt(4 * 4 * 2 * 2)),
    ],
)
def test_metrics_of_classes_are_their_formulas(metric: Metric, expected: float) -> None:
    assert glue.score(metric, GOLD, ANSWERS) == pytest.approx(expected)


def test_correlations_are_their_formulas() -> None:
    gold, answers = np.array([0.0, 1.0, 2.0, 5.0]), np.array([0.1, 0.0, 3.0, 4.0])
    assert glue.score("pearson", gold, answers) == pytest.approx(
        statistics.correlation(gold.tolist(), answers.tolist())
    )
    # Ranks 0 1 2 3 and 1 0 2 3: 1 - 6 * (1 + 1) / (4 * 15)
    assert glue.score("spearman", gold, answers) == pytest.approx(0.8)


@pytest.mark.parametrize("metric", ["matthews", "f1", "pearson", "spearman"])
def test_the_same_answer_for_all_is_worth_nothing(metric: Metric) -> None:
    assert glue.score(metric, GOLD, np.zeros_like(GOLD)) == 0.0


def test_the_standard_error_of_accuracy_is_that_of_a_mean() -> None:
    right = (GOLD == ANSWERS).astype(float).tolist()
    expected = statistics.stdev(right) / math.sqrt(len(right))
    assert glue.standard_error("accuracy", GOLD, ANSWERS) == pytest.approx(expected)
    assert glue.standard_error("accuracy", GOLD[:1], ANSWERS[:1]) is None


def test_the_bootstrap_gives_a_correlations_standard_error_and_always_the_same() -> None:
    """Of n pairs of normal numbers: about (1 - r^2) / sqrt(n - 1)."""
    draw = np.random.default_rng(3)
    gold = draw.normal(size=400)
    answers = gold + draw.normal(size=400)
    r = glue.score("pearson", gold, answers)
    error = glue.standard_error("pearson", gold, answers)
    assert error == pytest.approx((1 - r**2) / math.sqrt(399), rel=0.15)
    assert glue.standard_error("pearson", gold, answers) == error


def test_the_bootstrap_of_classes_is_near_the_mean_of_many_draws() -> None:
    draw = np.random.default_rng(5)
    gold = draw.integers(0, 2, 300)
    answers = np.where(draw.random(300) < 0.8, gold, 1 - gold)
    scores = []
    for _ in range(400):
        rows = draw.integers(0, 300, 300)
        scores.append(glue.score("matthews", gold[rows], answers[rows]))
    error = glue.standard_error("matthews", gold, answers)
    assert error == pytest.approx(statistics.stdev(scores), rel=0.15)


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GLUE)
def test_hub_and_folder_give_the_same_rows(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, config: str, *, split: str, streaming: bool) -> Any:
        asked.append((path, config, split))
        return datasets.Dataset.from_list([HUB_ROWS[name]] * 3)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    validation = GLUE[name].validation
    hub = glue.load(name, validation, None)
    assert glue.load(name, validation, "hub", limit=2) == hub[:2]
    assert asked[0] == ("nyu-mll/glue", name, validation[0])
    write(tmp_path / name / f"{validation[0]}.jsonl", *[HUB_ROWS[name]] * 3)
    folder = glue.load(name, validation, str(tmp_path))
    assert [(row.texts, row.label) for row in folder] == [(row.texts, row.label) for row in hub]
    texts = [value for value in HUB_ROWS[name].values() if isinstance(value, str)]
    assert hub[0].texts == tuple(texts)
    assert hub[0].label == HUB_ROWS[name]["label"]


def test_files_of_a_folder_stand_in_for_one_another(tmp_path: Path) -> None:
    """A dev file is a validation split; without either, so is a test file with labels."""
    row = {"sentence1": "a", "sentence2": "b", "label": 1}
    write(tmp_path / "mrpc" / "test.jsonl", row)
    assert len(glue.load("mrpc", GLUE["mrpc"].validation, str(tmp_path))) == 1
    write(tmp_path / "mrpc" / "dev.jsonl", row, row)
    assert len(glue.load("mrpc", GLUE["mrpc"].validation, str(tmp_path))) == 2
    write(tmp_path / "mnli" / "dev_mismatched.jsonl", {"premise": "", "hypothesis": "", "label": 0})
    assert len(glue.load("mnli", GLUE["mnli"].more["mnli-mm"], str(tmp_path))) == 1


def test_grades_are_under_score_or_label_and_csv_has_labels_as_text(tmp_path: Path) -> None:
    for key in ("score", "label"):
        write(tmp_path / "stsb" / "train.jsonl", {"sentence1": "a", "sentence2": "b", key: 2.5})
        (row,) = glue.load("stsb", ("train",), str(tmp_path))
        assert row.label == 2.5
    path = tmp_path / "cola" / "train.csv"
    path.parent.mkdir()
    path.write_text('sentence,label\n"Hello, you.",1\n')
    assert glue.load("cola", ("train",), str(tmp_path)) == [
        Labelled(("Hello, you.",), 1, f"{path}:2")
    ]


def test_what_datasets_saved_is_read(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([HUB_ROWS["rte"]])
    datasets.DatasetDict({"validation": rows}).save_to_disk(str(tmp_path / "rte"))
    assert glue.load("rte", GLUE["rte"].validation, str(tmp_path))[0].texts == ("a", "b")


@pytest.mark.parametrize(
    ("name", "row", "says"),
    [
        ("rte", {"sentence1": "a", "sentence2": "b", "label": -1}, r"-1.*test split.*no labels"),
        ("rte", {"sentence1": "a", "sentence2": "b", "label": 2}, "0 to 1"),
        ("rte", {"sentence1": "a", "sentence2": "b", "label": True}, "label is True"),
        ("rte", {"sentence1": "a", "sentence2": "b"}, "label is None"),
        ("rte", {"sentence1": "a", "sentence": "b", "label": 0}, "sentence2 is None.*Did you mean"),
        ("rte", {"sentence1": "a", "sentence2": 3, "label": 0}, "sentence2 is 3, not a text"),
        ("stsb", {"sentence1": "a", "sentence2": "b", "score": 5.2}, "5.2.*from 0 to 5"),
        ("stsb", {"sentence1": "a", "sentence2": "b", "score": "high"}, "'high'"),
        ("stsb", {"sentence1": "a", "sentence2": "b"}, "None"),
    ],
)
def test_a_wrong_row_is_named(name: str, row: dict[str, Any], says: str, tmp_path: Path) -> None:
    write(tmp_path / name / "train.jsonl", HUB_ROWS[name], row)
    with pytest.raises(DataError, match=rf"train\.jsonl:2: .*{says}"):
        glue.load(name, ("train",), str(tmp_path))


def test_a_folder_without_the_set_says_what_it_has(tmp_path: Path) -> None:
    write(tmp_path / "rte" / "other.jsonl", {})
    with pytest.raises(DataError, match=r"no validation or dev or test file.*other\.jsonl"):
        glue.load("rte", GLUE["rte"].validation, str(tmp_path))
    with pytest.raises(DataError, match="nothing"):
        glue.load("cola", ("train",), str(tmp_path))


def test_an_unknown_set_is_named_with_its_nearest() -> None:
    with pytest.raises(ReftConfigError, match=r"cola, .*Did you mean 'sst2'"):
        glue.get_set("sst-2")


# --- the paper's division -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "choosing"),
    [(277, 138), (408, 204), (872, 436), (5000, 2500), (5001, 1000), (9815, 1000), (2, 1)],
)
def test_half_of_a_validation_split_chooses_or_1000_of_a_large_one(
    count: int, choosing: int
) -> None:
    by, scored = glue.divide(count, seed=42)
    assert len(by) == choosing
    assert sorted(by + scored) == list(range(count))


def test_the_division_is_the_seeds() -> None:
    """As torch's random_split divides, what is scored first."""
    by, scored = glue.divide(10, seed=7)
    first, second = random_split(range(10), [5, 5], torch.Generator().manual_seed(7))  # type: ignore[arg-type]
    assert (list(second.indices), list(first.indices)) == (by, scored)
    assert glue.divide(10, seed=7) == (by, scored)
    assert glue.divide(10, seed=8) != (by, scored)
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    glue.divide(10, seed=7)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_one_row_cannot_be_divided() -> None:
    with pytest.raises(ReftConfigError, match="1 rows.*classify.protocol=plain"):
        glue.divide(1, seed=0)


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    glue.check_metrics_installed()
    monkeypatch.setattr(glue.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ReftConfigError, match=r"sklearn, scipy.*reftune\[glue\]"):
        glue.check_metrics_installed()
