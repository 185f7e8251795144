"""Arithmetic: the published rules of extraction with their traps, prompts, targets, splits."""

import json
from pathlib import Path
from typing import Any

import pytest

from reftune.errors import DataError
from reftune.prompts import encode_examples, render_prompt
from reftune.tasks import Split, get_task, training_examples
from reftune.tasks.arithmetic import NAMES
from reftune.tasks.leaks import words
from task_data import DATA, LLM_ADAPTERS, needs_data
from tiny import tiny_tokenizer

QUESTION = "Ann has 3 hens, and each lays 400 eggs. How many eggs are there?"
SOLUTION = "Each of 3 lays 400.\n3*400 = <<3*400=1200>>1200\n#### 1,200"


def write(data_dir: Path, name: str, split: str, rows: list[dict[str, Any]]) -> Path:
    folder = data_dir / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.json").write_text(json.dumps(rows))
    return data_dir


def row(answer: str, instruction: str = QUESTION, output: str = "It is so.") -> dict[str, str]:
    return {"instruction": instruction, "input": "", "output": output, "answer": answer}


def score(tmp_path: Path, name: str, answer: str, completion: str) -> float:
    task = get_task(name, write(tmp_path, name, "test", [row(answer)]))
    return task.score(task.example(0), completion)


@pytest.mark.parametrize(
    ("completion", "found"),
    [
        ("The answer is 18.", 18.0),
        ("It costs $1,234", 1234.0),
        pytest.param("12 - 7 = 5\nThe answer is 5, not 6", 6.0, id="last number counts"),
        pytest.param("1,2", 12.0, id="commas are deleted, even between two numbers"),
        pytest.param("so 5-3", -3.0, id="a minus sign is a sign"),
        pytest.param("so 5 - 3", 3.0, id="unless a space follows"),
        pytest.param("1.2.3", 3.0, id="a second point begins a number"),
        pytest.param("2/3", 3.0, id="a fraction is its denominator"),
        pytest.param("5%", 5.0, id="per cent are not read"),
        pytest.param("3e5", 5.0, id="nor exponents"),
        pytest.param("no number", None, id="none"),
        pytest.param("", None, id="empty"),
    ],
)
@pytest.mark.parametrize("name", ["gsm8k", "SVAMP"])
def test_the_last_number_counts(
    name: str, completion: str, found: float | None, tmp_path: Path
) -> None:
    if found is None:
        assert score(tmp_path, name, "0", completion) == 0.0
    else:
        assert score(tmp_path, name, str(found), completion) == 1.0
        assert score(tmp_path, name, str(found + 1), completion) == 0.0


@pytest.mark.parametrize(("difference", "right"), [(0.0009, 1.0), (0.0011, 0.0), (-0.0009, 1.0)])
def test_within_a_thousandth(difference: float, right: float, tmp_path: Path) -> None:
    assert score(tmp_path, "mawps", "1.5", f"It is {1.5 + difference:.5f}") == right


@pytest.mark.parametrize(
    ("completion", "letter"),
    [
        ("(C)", "C"),
        pytest.param("The answer is (C).", "C", id="small letters are none"),
        pytest.param("Answer: (C)", "A", id="the A of Answer"),
        pytest.param("Calculate ... so (B)", "C", id="the C of Calculate"),
        pytest.param("F, then E", "E", id="only A to E"),
        pytest.param("it is 5", "", id="none"),
    ],
)
def test_aqua_takes_the_first_letter_anywhere(completion: str, letter: str, tmp_path: Path) -> None:
    task = get_task("AQuA", write(tmp_path, "AQuA", "test", [row(a) for a in "ABCDE"]))
    assert task.extract(completion) == letter
    scores = {task.gold(task.example(i)): task.score(task.example(i), completion) for i in range(5)}
    assert scores == {gold: float(gold == letter) for gold in "ABCDE"}


@pytest.mark.parametrize("name", NAMES)
def test_the_prompt_is_alpacas_without_input_and_the_target_is_the_output(
    name: str, tmp_path: Path
) -> None:
    answer = "B" if name == "AQuA" else "1200.0"
    write(tmp_path, name, "train", [row(answer, output="\nA: 1200.")])
    example = get_task(name, tmp_path, "train").example(0)
    tokenizer = tiny_tokenizer()
    assert render_prompt(example.prompt, tokenizer, "alpaca") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        f"completes the request.\n\n### Instruction:\n{QUESTION}\n\n### Response:\n"
    )
    (encoded,) = encode_examples([example], tokenizer, "alpaca", 512)
    assert tokenizer.decode(encoded.input_ids[encoded.prompt_length :]) == "\nA: 1200.</s>"


def test_decoding_of_the_commands_and_of_the_text(tmp_path: Path) -> None:
    write(tmp_path, "SVAMP", "test", [row("1")])
    write(tmp_path, "gsm8k", "test", [row("1")])
    commands = get_task("SVAMP", tmp_path).sampling
    assert (commands.max_new_tokens, commands.temperature, commands.num_beams) == (512, 0.0, 1)
    text = get_task("SVAMP", tmp_path, decoding="sampling").sampling
    assert (text.max_new_tokens, text.temperature, text.top_p) == (512, 0.3, 0.75)
    assert (text.top_k, text.num_beams) == (40, 4)
    own = get_task("gsm8k_cot", tmp_path).sampling
    assert (own.max_new_tokens, own.temperature) == (256, 0.0)
    own = get_task("gsm8k_cot", tmp_path, decoding="sampling").sampling
    assert (own.temperature, own.top_p, own.top_k, own.num_beams) == (0.1, 0.95, 40, 1)


def test_no_stop_string_is_exact_because_the_last_number_counts(tmp_path: Path) -> None:
    write(tmp_path, "gsm8k", "test", [row("6")])
    for name in ("gsm8k", "gsm8k_cot"):
        task = get_task(name, tmp_path)
        full = "It is 5.\nNo: 6"
        assert task.score(task.example(0), full) == 1.0
        assert task.score(task.example(0), full.partition("\n")[0]) == 0.0
        assert task.sampling.stop == ()


def test_gsm8k_in_its_own_prompt(tmp_path: Path) -> None:
    write(tmp_path, "gsm8k", "train", [{"question": QUESTION, "answer": SOLUTION}])
    task = get_task("gsm8k_cot", tmp_path, "train")
    example = task.example(0)
    assert render_prompt(example.prompt, tiny_tokenizer(), task.template) == (
        f"{QUESTION}\nAnswer the above question. First think step by step and then answer the "
        "final number.\n"
    )
    assert example.completion.endswith(">>1200\nThe final answer is:  1,200")  # with two spaces
    assert task.gold(example) == "1200"
    assert task.score(example, example.completion) == 1.0
    assert task.score(example, "The final answer is: 1,201") == 0.0


def test_both_forms_of_gsm8k_score_alike(tmp_path: Path) -> None:
    write(tmp_path / "a", "gsm8k", "test", [{"question": QUESTION, "answer": SOLUTION}])
    write(tmp_path / "b", "gsm8k", "test", [row("1200.0")])
    for name in ("gsm8k", "gsm8k_cot"):
        a, b = get_task(name, tmp_path / "a"), get_task(name, tmp_path / "b")
        assert a.example(0).prompt == b.example(0).prompt
        for text in ("1200", "1,200.0004", "1201", ""):
            assert a.score(a.example(0), text) == b.score(b.example(0), text)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("SVAMP", row("many"), "answer is 'many'; SVAMP needs a number"),
        ("SVAMP", row("nan"), "answer is 'nan'"),
        ("AQuA", row("5"), "answer is '5'; AQuA needs one of A, B, C, D, E"),
        ("gsm8k", row("1", ""), "instruction is ''"),
        ("gsm8k", row("1", "a ### Response: b"), "### Response:"),
        ("gsm8k", {"question": "q", "answer": "no mark"}, "gsm8k cannot be read from this row"),
        ("gsm8k", {"prompt": "q"}, "its columns are prompt"),
        ("AddSub", {"prompt": "q"}, "AddSub cannot be read from .*columns are prompt"),
        ("gsm8k_cot", {"question": "q", "answer": "none"}, "a number after '####'"),
    ],
)
def test_a_row_that_does_not_fit_is_named(
    name: str, fields: dict[str, str], message: str, tmp_path: Path
) -> None:
    write(
        tmp_path, name.removesuffix("_cot"), "test", [row("A" if name == "AQuA" else "1"), fields]
    )
    with pytest.raises(DataError, match=r"test\.json\[1\].*" + message):
        get_task(name, tmp_path)


@pytest.mark.parametrize("name", ["gsm8k", "gsm8k_cot"])
def test_gsm8k_is_tuned_on_its_last_300_training_rows(name: str, tmp_path: Path) -> None:
    rows = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(400)]
    rows[7] = rows[350]  # a question that the last rows have, too
    write(tmp_path, "gsm8k", "train", rows)
    sizes: dict[Split, int] = {"train": 400, "fit": 99, "validation": 300}
    tasks = {split: get_task(name, tmp_path, split) for split in sizes}
    assert {split: task.num_examples for split, task in tasks.items()} == sizes
    assert "What is 100 +" in str(tasks["validation"].example(0).prompt)
    fit, tuned = (
        {words(tasks[s].example(i).prompt) for i in range(tasks[s].num_examples)}
        for s in ("fit", "validation")
    )
    assert not fit & tuned


def test_a_training_set_of_word_problems_shows_the_equation(tmp_path: Path) -> None:
    folder = tmp_path / "mawps-asdiv-a_svamp"
    folder.mkdir()
    (folder / "train.csv").write_text(
        "Question,Numbers,Equation,Answer\n"
        "Al has number0 hats of number1 feathers and loses number2 ,2.0 4.5 1.0,"
        "- * number0 number1 number2,8.0\n"
        "All number0 share number1 ,7.0 40.0,/ number1 number0,5.0\n"  # the set's own error
    )
    first, second = training_examples(["mawps-asdiv"], tmp_path, seed=0)
    if "All" in str(first.prompt):
        first, second = second, first
    assert first.prompt.text == "Al has 2 hats of 4.5 feathers and loses 1 "  # type: ignore[union-attr]
    assert first.completion == "(2 * 4.5) - 1 = 8. The answer is 8."
    assert second.completion == "The answer is 5."


@needs_data
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("AQuA", 254),
        ("gsm8k", 1319),
        ("mawps", 238),
        ("AddSub", 395),
        ("MultiArith", 600),
        ("SingleEq", 508),
    ],
)
def test_real_rows_are_scored_by_their_answers(name: str, rows: int) -> None:
    task = get_task(name, LLM_ADAPTERS)
    assert task.num_examples == rows
    for i in range(rows):
        example = task.example(i)
        assert task.score(example, f"therefore it is {task.gold(example)}") == 1.0
        other = "F" if name == "AQuA" else float(task.gold(example)) + 1
        assert task.score(example, f"therefore it is {other}") == 0.0


@needs_data
def test_real_targets_lead_to_their_answers() -> None:
    for name, split in (("gsm8k", "train"), ("gsm8k_cot", "test"), ("mawps-asdiv", "train")):
        task = get_task(name, DATA, split)  # type: ignore[arg-type]
        examples = [task.example(i) for i in range(task.num_examples)]
        assert all(task.score(e, e.completion) == 1.0 for e in examples)
        assert not any("number0" in str(e.prompt) for e in examples)
