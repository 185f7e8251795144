"""Tasks: prompts, targets and scores as published, on real rows where there are some."""

import json
import os
from pathlib import Path

import pytest

from reftune.errors import DataError, ReftConfigError
from reftune.prompts import encode_examples, render_prompt
from reftune.tasks import TASKS, get_task, training_examples
from reftune.tasks.commonsense import NAMES, TRIGGER, first_named
from tiny import tiny_tokenizer

ANSWERS = {"boolq": ["true", "false"], "piqa": ["solution1", "solution2"]}


def write_set(data_dir: Path, name: str, split: str, n: int = 6) -> None:
    """Write a file in LLM-Adapters' form."""
    answers = ANSWERS.get(name, [f"answer{i}" for i in range(1, 5)])
    rows = [
        {
            "instruction": f"Please answer, question {i} of {name} {split}?\n\nAnswer format: "
            + "/".join(answers),
            "input": "",
            "output": f"{TRIGGER}{answers[i % len(answers)]}",
            "answer": answers[i % len(answers)],
        }
        for i in range(n)
    ]
    folder = data_dir / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.json").write_text(json.dumps(rows, indent=4))


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    for name in NAMES:
        write_set(tmp_path, name, "test")
        write_set(tmp_path, name, "train")
    return tmp_path


def available_sets(tmp_path: Path) -> dict[str, Path]:
    """Return every set with a test file: the real ones if REFTUNE_TEST_DATA names a folder."""
    real = os.environ.get("REFTUNE_TEST_DATA")
    if real is None:
        for name in NAMES:
            write_set(tmp_path, name, "test")
    root = tmp_path if real is None else Path(real) / "llm_adapters/dataset"
    found = {name: root for name in NAMES if (root / name / "test.json").is_file()}
    assert found, f"no commonsense set under {root}"
    return found


def test_every_row_scores_1_with_its_own_target_and_0_with_another_answer(tmp_path):
    for name, root in available_sets(tmp_path).items():
        task = get_task(name, root)
        assert task.num_examples == len(json.loads((root / name / "test.json").read_text()))
        for i in range(task.num_examples):
            example = task.example(i)
            assert example.completion == example.fields["output"]
            assert task.extract(example.completion) == task.gold(example)
            assert task.score(example, example.completion) == 1.0
            assert task.score(example, example.completion + "x") == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_the_prompt_is_the_instruction_and_a_newline(name, data_dir):
    task = get_task(name, data_dir)
    example = task.example(1)
    instruction = json.loads((data_dir / name / "test.json").read_text())[1]["instruction"]
    tokenizer = tiny_tokenizer()
    assert render_prompt(example.prompt, tokenizer, task.template) == instruction + "\n"
    (encoded,) = encode_examples([example], tokenizer, task.template, 512)
    target = encoded.input_ids[encoded.prompt_length :]
    assert tokenizer.decode(target) == TRIGGER + task.gold(example) + "</s>"


def test_the_paper_decodes_greedily_with_32_tokens_or_samples_with_beams(data_dir):
    sampling = get_task("boolq", data_dir).sampling
    assert (sampling.max_new_tokens, sampling.temperature, sampling.num_beams) == (32, 0.0, 1)
    assert sampling == get_task("boolq", data_dir, decoding="greedy").sampling
    other = get_task("boolq", data_dir, decoding="sampling").sampling
    assert (other.max_new_tokens, other.temperature, other.top_p) == (32, 0.1, 0.75)
    assert (other.top_k, other.num_beams) == (40, 4)
    assert get_task("boolq", data_dir, max_new_tokens=5).sampling.max_new_tokens == 5


@pytest.mark.parametrize(
    ("key", "value", "near"), [("split", "tst", "test"), ("decoding", "gredy", "greedy")]
)
def test_an_unknown_split_or_decoding_gets_a_suggestion(key, value, near, data_dir):
    with pytest.raises(ReftConfigError, match=rf"{key} is '{value}'.*Did you mean '{near}'"):
        get_task("boolq", data_dir, **{key: value})


@pytest.mark.parametrize(
    ("completion", "extracted", "score"),
    [
        ("the correct answer is true", "true", 1.0),
        ("the correct answer is   true \n\n", "true \n\n", 1.0),
        ("I think the correct answer is true", "true", 1.0),
        pytest.param("true", "", 0.0, id="trigger absent"),
        pytest.param("", "", 0.0, id="empty"),
        pytest.param("The correct answer is true", "", 0.0, id="trigger in another case"),
        pytest.param("the correct answer is True", "True", 0.0, id="answer in another case"),
        pytest.param("the correct answer is true.", "true.", 0.0, id="trailing full stop"),
        pytest.param("the correct answer is true\nfalse", "true\nfalse", 0.0, id="trailing text"),
        pytest.param(
            "the correct answer is false, no: the correct answer is true",
            "false, no: the correct answer is true",
            0.0,
            id="first trigger counts",
        ),
        pytest.param("the correct answer is", "", 0.0, id="cut inside the trigger"),
        pytest.param("the correct answer is tru", "tru", 0.0, id="cut inside the answer"),
    ],
)
def test_extraction_and_scoring_as_published(completion, extracted, score, data_dir):
    task = get_task("boolq", data_dir)
    example = task.example(0)
    assert task.gold(example) == "true"
    assert task.extract(completion) == extracted
    assert task.score(example, completion) == score


@pytest.mark.parametrize(
    ("name", "completion", "option"),
    [
        ("boolq", "It is false, so the correct answer is true", "false"),
        ("piqa", "the correct solution is solution2", "solution2"),
        ("piqa", "the correct answer is answer1", ""),
        ("social_i_qa", "answer3 or answer1", "answer3"),
        ("hellaswag", "ending4.", "ending4"),
        ("winogrande", "Option1 is option2", "option2"),
        ("ARC-Challenge", "answer5", "answer5"),
        ("openbookqa", "answer9", ""),
    ],
)
def test_llm_adapters_takes_the_first_option_named(name, completion, option):
    assert first_named(name, completion) == option


def test_stopping_at_a_newline_would_change_scores_so_no_stop_string_is_used(data_dir):
    task = get_task("boolq", data_dir)
    full = "the correct answer is true\nBecause it is."
    assert task.score(task.example(0), full) == 0.0
    assert task.score(task.example(0), full.partition("\n")[0]) == 1.0
    assert task.sampling.stop == ()


def test_limit_takes_the_first_rows(data_dir):
    task = get_task("piqa", data_dir, limit=2)
    assert task.num_examples == 2
    assert task.example(0) == get_task("piqa", data_dir).example(0)


def test_split_chooses_the_file(data_dir):
    assert "piqa train" in get_task("piqa", data_dir, split="train").example(0).prompt


def test_all_eight_sets_are_registered():
    assert set(NAMES) <= set(TASKS)
    assert len(NAMES) == 8


def test_an_unknown_task_gets_a_suggestion(data_dir):
    with pytest.raises(ReftConfigError, match=r"no task 'bolq'.*Did you mean 'boolq'"):
        get_task("bolq", data_dir)


def test_a_missing_file_says_where_it_should_be(tmp_path):
    with pytest.raises(DataError, match=r"boolq/test\.json does not exist there"):
        get_task("boolq", tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "Is it?"}, "answer is None"),
        ({"instruction": "", "answer": "true"}, "instruction is ''"),
        ({"instruction": "Is it?", "answer": 1}, "answer is 1"),
        ({"instruction": f"Is {TRIGGER}x?", "answer": "true"}, "marks the answer"),
    ],
)
def test_a_row_that_does_not_fit_is_named(row, message, tmp_path):
    (tmp_path / "boolq").mkdir()
    good = {"instruction": "Is it?", "answer": "true"}
    (tmp_path / "boolq" / "test.json").write_text(json.dumps([good, row]))
    with pytest.raises(DataError, match=rf"test\.json.*{message}"):
        get_task("boolq", tmp_path)


def test_training_examples_mix_the_training_splits(data_dir):
    names = ["boolq", "piqa", "ARC-Easy"]
    mixed = training_examples(names, data_dir)
    everything = [
        get_task(name, data_dir, split="train").example(i) for name in names for i in range(6)
    ]
    key = str
    assert sorted(mixed, key=key) == sorted(everything, key=key)
    assert mixed != everything
    assert len({example.prompt.split(" of ")[1] for example in mixed[:9]}) == 3
    assert training_examples(names, data_dir, limit=5) == mixed[:5]
    assert training_examples(names, data_dir, seed=1) != mixed


def test_training_on_an_unknown_set_gets_a_suggestion(data_dir):
    with pytest.raises(ReftConfigError, match=r"no task 'ARC-Esy'.*Did you mean 'ARC-Easy'"):
        training_examples(["ARC-Esy"], data_dir)
