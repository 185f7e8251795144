"""Rows of the original data sets become LLM-Adapters' rows, letter for letter."""

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest

from reftune.data import Row
from reftune.errors import DataError
from reftune.tasks import get_task
from reftune.tasks.hub import SETS, to_row
from task_data import DATA, LLM_ADAPTERS, needs_data

CHOICES = (
    "Answer1: {} Answer2: {} Answer3: {} Answer4: {}\n\n"
    "Answer format: answer1/answer2/answer3/answer4"
)
# (set, row of the Hub, LLM-Adapters' instruction and answer)
SAMPLES: list[tuple[str, dict[str, Any], str, str]] = [
    (
        "boolq",
        {
            "question": "does ethanol take more energy make that produces",
            "answer": False,
            "passage": "x",
        },
        "Please answer the following question with true or false, question: does ethanol take more "
        "energy make that produces?\n\nAnswer format: true/false",
        "false",
    ),
    (
        "piqa",
        {
            "goal": "dresser",
            "sol1": "replace drawer with bobby pin ",
            "sol2": "finish, woodgrain with  bobby pin ",
            "label": 1,
        },
        "Please choose the correct solution to the question: dresser\n\nSolution1: replace drawer "
        "with bobby pin \n\nSolution2: finish, woodgrain with  bobby pin \n\nAnswer format: "
        "solution1/solution2",
        "solution2",
    ),
    (
        "social_i_qa",
        {
            "context": "Tracy didn't go home that evening and resisted Riley's attacks.",
            "question": "What does Tracy need to do before this?",
            "answerA": "make a new plan",
            "answerB": "Go home and see Riley",
            "answerC": "Find somewhere to go",
            "label": "3",
        },
        "Please choose the correct answer to the question: Tracy didn't go home that evening and "
        "resisted Riley's attacks. What does Tracy need to do before this?\n\nAnswer1: make a new "
        "plan Answer2: Go home and see Riley Answer3: Find somewhere to go\n\nAnswer format: "
        "answer1/answer2/answer3",
        "answer3",
    ),
    (
        "hellaswag",
        {
            "activity_label": "Roof shingle removal",
            "ctx": "A man is sitting on a roof. he",
            "endings": ["sings.", "is ripping tiles off.", "holds a cube.", "pulls up roofing."],
            "label": "3",
        },
        "Please choose the correct ending to complete the given sentence: Roof shingle removal: A "
        "man is sitting on a roof. he\n\nEnding1: sings. Ending2: is ripping tiles off. Ending3: "
        "holds a cube. Ending4: pulls up roofing.\n\nAnswer format: "
        "ending1/ending2/ending3/ending4",
        "ending4",
    ),
    (
        "winogrande",
        {
            "sentence": "Sarah was a much better surgeon than Maria so _ always got the "
            "easier cases.",
            "option1": "Sarah",
            "option2": "Maria",
            "answer": "2",
        },
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        "Sarah was a much better surgeon than Maria so _ always got the easier cases.\n\nOption1: "
        "Sarah Option2: Maria Answer format: option1/option2",
        "option2",
    ),
    (
        "ARC-Easy",
        {
            "question": "Which safety equipment keeps mold spores out?",
            "choices": {
                "text": ["goggles", "mask", "gloves", "apron"],
                "label": ["1", "2", "3", "4"],
            },
            "answerKey": "2",
        },
        "Please choose the correct answer to the question: Which safety equipment keeps mold "
        "spores out?\n\n" + CHOICES.format("goggles", "mask", "gloves", "apron"),
        "answer2",
    ),
    (
        "ARC-Challenge",
        {
            "question": "Which is it?",
            "choices": {"text": ["a", "b", "c"], "label": ["A", "B", "C"]},
            "answerKey": "C",
        },
        "Please choose the correct answer to the question: Which is it?\n\nAnswer1: a Answer2: b "
        "Answer3: c\n\nAnswer format: answer1/answer2/answer3",
        "answer3",
    ),
    (
        "openbookqa",
        {
            "question_stem": "There is most likely going to be fog around:",
            "choices": {
                "text": ["a marsh", "a tundra", "the plains", "a desert"],
                "label": ["A", "B", "C", "D"],
            },
            "answerKey": "A",
        },
        "Please choose the correct answer to the question: There is most likely going to be fog "
        "around:\n\n" + CHOICES.format("a marsh", "a tundra", "the plains", "a desert"),
        "answer1",
    ),
    (
        "gsm8k",
        {"question": "How many are 2 * 512?", "answer": "2*512 = <<2*512=1024>>1024\n#### 1,024"},
        "How many are 2 * 512?",
        "1024.0",
    ),
    (
        "SVAMP",
        {
            "Body": "Dan had $ 3 left with him after he bought a candy bar. If he had $ 4 at "
            "the start",
            "Question": "How much did the candy bar cost?",
            "Equation": "( 4.0 - 3.0 )",
            "Answer": 1.0,
        },
        "Dan had $ 3 left with him after he bought a candy bar. If he had $ 4 at the start. How "
        "much did the candy bar cost?",
        "1.0",
    ),
    (
        "AddSub",
        {"input": "Al has 3 hats and 2.5 caps . How many in all ?", "target": 5.5},
        "Al has 3 hats and 2.5 caps . How many in all ? ",
        "5.5",
    ),
    ("AddSub", {"input": "Al has 3 hats ?", "target": 3.0}, "Al has 3 hats ? ", "3"),
    ("MultiArith", {"input": "Al has 3 hats?", "target": 3}, " Al has 3 hats? ", "3.0"),
    ("SingleEq", {"input": "Al has 3 hats ?", "target": 3.0}, "Al has 3 hats ?", "3.0"),
    (
        "AQuA",
        {
            "question": "How wide is it? ",
            "options": ["A)5(x + 1)", "B)6", "C)7", "D)8", "E)None of these"],
            "rationale": "It is so.",
            "correct": "E",
        },
        "How wide is it? Answer Choices: (A) 5 (x + 1)  (B) 6 (C) 7 (D) 8 (E) None of these",
        "E",
    ),
    (
        "mawps",
        {
            "Question": "Al has N_00 hats and N_01 caps .",
            "Numbers": "8.0 2.5",
            "Equation": "N_00 + N_01",
            "Answer": 10.5,
        },
        "Al has 8 hats and 2.5 caps .",
        "10.5",
    ),
    (
        "mawps",
        {"original_text": "Al has 3 hats .", "equation": "x=3", "ans": 3.0},
        "Al has 3 hats .",
        "3.0",
    ),
]


@pytest.mark.parametrize(("name", "row", "instruction", "answer"), SAMPLES)
def test_an_original_row_becomes_llm_adapters_row(
    name: str, row: dict[str, Any], instruction: str, answer: str, tmp_path: Path
) -> None:
    made = to_row(name, Row(row, "x")).fields
    assert (made["instruction"], made["input"], made["answer"]) == (instruction, "", answer)
    (tmp_path / name).mkdir()
    (tmp_path / name / "test.json").write_text(json.dumps([row]))
    (tmp_path / name / "train.json").write_text(json.dumps([made]))
    # a folder may hold either form
    own, theirs = get_task(name, tmp_path).example(0), get_task(name, tmp_path, "train").example(0)
    assert (own.prompt, own.completion) == (theirs.prompt, theirs.completion)
    if name in ("boolq", "ARC-Easy"):
        assert made["output"] == f"the correct answer is {answer}"


@pytest.mark.parametrize("name", ["mawps", "mawps-asdiv"])
@pytest.mark.parametrize(
    ("equation", "numbers", "answer", "output"),
    [
        ("( N_00 + N_01 ) / N_02", "8 2 5.0", 2, "(8 + 2) / 5 = 2. The answer is 2."),
        ("N_01 * ( N_00 - N_02 )", "8.0 2 5", 6.0, "2 * (8 - 5) = 6. The answer is 6."),
        ("/ + N_00 N_01 N_02", "8 2 5", 2, "(8 + 2) / 5 = 2. The answer is 2."),
        ("- number0 number1", "9.0 3.0", 6.0, "9 - 3 = 6. The answer is 6."),
        ("N_00 - N_01", "9 3", 7, "The answer is 7."),  # as some rows are
        ("N_00 / N_01", "9 0", 7, "The answer is 7."),
        ("N_00 ** N_01", "9 1", 9, "The answer is 9."),
        ("+ N_00", "9", 9, "The answer is 9."),
        ("x = N_00", "9", 9, "The answer is 9."),
    ],
)
def test_equations_in_both_notations_become_a_worked_step(
    name: str, equation: str, numbers: str, answer: float, output: str
) -> None:
    row = {"Question": "How many ?", "Numbers": numbers, "Equation": equation, "Answer": answer}
    assert to_row(name, Row(row, "x")).fields["output"] == output


def test_every_set_that_is_converted_has_a_sample() -> None:
    converted = {name for name, where in SETS.items() if where.convert is not None}
    assert {name for name, *_ in SAMPLES} == converted


def test_a_row_of_another_form_is_named() -> None:
    with pytest.raises(DataError, match=r"x: boolq cannot be read .*KeyError.*columns are goal"):
        to_row("boolq", Row({"goal": ""}, "x"))


@pytest.mark.parametrize("data_dir", [None, "hub"])
@pytest.mark.parametrize(
    ("name", "split", "asked"),
    [
        ("boolq", "test", ("google/boolq", None, "validation")),
        ("winogrande", "train", ("allenai/winogrande", "winogrande_xl", "train")),
        ("SVAMP", "test", ("ChilleD/SVAMP", None, "train+test")),
        ("gsm8k", "validation", ("openai/gsm8k", "main", "train")),
    ],
)
def test_without_a_folder_rows_come_from_the_hub(
    name: str,
    split: Any,
    asked: tuple[str, ...],
    data_dir: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[Any, ...]] = []
    row = next(row for sample, row, *_ in SAMPLES if sample == name)

    def load_dataset(path: str, config: str | None, *, split: str, streaming: bool) -> Any:
        seen.append((path, config, split))
        return [row]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = get_task(name, data_dir, split)
    assert seen == [asked]
    assert task.example(0).where.endswith("[0]")


def test_what_is_nowhere_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"trec/test\.json or TREC\.test\.all\.jsonl or .* not exist"
    ):
        get_task("words/trec", tmp_path)
    with pytest.raises(DataError, match=r"ultrafeedback has no train split without a data_dir"):
        get_task("ultrafeedback", split="train")
    with pytest.raises(DataError, match=r"SVAMP has no train split .*: the Hub's ChilleD/SVAMP"):
        get_task("SVAMP", "hub", "train")


# --- LLM-Adapters' own rows, taken apart into the original ones and put together again -----------


def _parts(pattern: str, instruction: str) -> tuple[str, ...]:
    found = re.fullmatch(pattern, instruction, re.DOTALL)
    assert found, instruction
    return found.groups()


def _original(name: str, row: dict[str, str]) -> dict[str, Any]:
    text, answer = row["instruction"], row["answer"]
    if name == "boolq":
        (question,) = _parts(r".*?, question: (.*)\?\n\nAnswer format: .*", text)
        return {"question": question, "answer": answer == "true"}
    if name == "piqa":
        goal, one, two = _parts(
            r".*? to the question: (.*)\n\nSolution1: (.*)\n\nSolution2: (.*)\n\nAnswer format.*",
            text,
        )
        return {"goal": goal, "sol1": one, "sol2": two, "label": int(answer[-1]) - 1}
    if name == "winogrande":
        sentence, one, two = _parts(
            r".*? given sentence: (.*)\n\nOption1: (.*) Option2: (.*) Answer format: .*", text
        )
        return {"sentence": sentence, "option1": one, "option2": two, "answer": answer[-1]}
    question, listed = _parts(r".*?question: (.*?)\n\nAnswer1: (.*)\n\nAnswer format: .*", text)
    texts = re.split(r" Answer\d: ", listed)
    labels = "ABCDE"[: len(texts)]
    choices = {"text": texts, "label": list(labels)}
    return {"question": question, "choices": choices, "answerKey": labels[int(answer[-1]) - 1]}


@needs_data
@pytest.mark.parametrize(
    "name", ["boolq", "piqa", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa"]
)
def test_real_rows_come_out_as_they_were(name: str) -> None:
    rows = json.loads((LLM_ADAPTERS / name / "test.json").read_text())
    for row in rows:
        assert dict(to_row(name, Row(_original(name, row), "")).fields) == row


@needs_data
@pytest.mark.parametrize("name", ["AddSub", "MultiArith", "SingleEq"])
def test_real_sums_have_the_same_questions_and_answers(name: str) -> None:
    for row in json.loads((LLM_ADAPTERS / name / "test.json").read_text()):
        original = {"input": row["instruction"].strip(), "target": float(row["answer"])}
        made = to_row(name, Row(original, "")).fields
        assert made["instruction"] == row["instruction"]
        assert float(made["answer"]) == float(row["answer"])


@needs_data
def test_gsm8ks_own_file_gives_llm_adapters_questions_and_answers() -> None:
    own, theirs = get_task("gsm8k", DATA), get_task("gsm8k", LLM_ADAPTERS)
    both = [
        {t.example(i).prompt.text: t.gold(t.example(i)) for i in range(1319)}  # type: ignore[union-attr]
        for t in (own, theirs)
    ]
    assert both[0] == both[1]


@needs_data
def test_hellaswag_without_activity_labels() -> None:
    task = get_task("hellaswag", DATA)
    assert task.num_examples == 800
    assert task.gold(task.example(0)) == "ending3"
    assert "given sentence: A woman is seen" in str(task.example(0).prompt)
