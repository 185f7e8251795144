"""Tasks that small models learn: classes as words, procedural questions, a format; and replies."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from reftune.alpaca_eval import write_alpaca_eval
from reftune.errors import DataError, ReftConfigError, RunError
from reftune.evaluate import run
from reftune.generate import HFEngine
from reftune.prompts import render_prompt
from reftune.run import execute
from reftune.tasks import TASKS, get_task, template_of
from reftune.tasks.labels import SETS
from reftune.tasks.leaks import words
from reftune.tasks.procedural import GYM, NAMES, SPLITS
from reftune_cli import app
from runs import tiny_run
from task_data import DATA, needs_data
from tiny import tiny_llama, tiny_tokenizer

COMPLETIONS = ("", "\n", " {0}", "{0}\n", " {0} \nor not", "\n{0}", "{0}.", "The {0}", "{0} x\n{0}")


def write_labels(data_dir: Path, place: str, n: int = 30) -> Path:
    folder = data_dir / place
    folder.mkdir(parents=True, exist_ok=True)
    count = {"sst2": 2, "trec": 6}[place]
    for split in ("train", "test"):
        rows = [{"text": f"{split} text {i} .", "label": i % count} for i in range(n)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return data_dir


# --- classes as words ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETS)
def test_a_class_is_learned_and_recognised_as_its_word(name: str, tmp_path: Path) -> None:
    write_labels(tmp_path, name.partition("/")[2])
    task = get_task(name, tmp_path)
    for i, label in enumerate(SETS[name].labels):
        example = task.example(i)
        assert example.completion == f" {label}"
        assert task.score(example, example.completion) == 1.0
        others = set(SETS[name].labels) - {label}
        assert [task.score(example, f" {other}") for other in others] == [0.0] * len(others)
        prompt = render_prompt(example.prompt, tiny_tokenizer(), task.template)
        assert f": test text {i} .\n" in prompt
        assert all(word in prompt for word in SETS[name].labels), "the base model is told them, too"
        assert prompt.endswith("Answer:")


@pytest.mark.parametrize("name", [*SETS, "format/json", "rg/chain_sum"])
def test_stopping_at_a_newline_changes_no_score(name: str, tmp_path: Path) -> None:
    if name in SETS:
        write_labels(tmp_path, name.partition("/")[2])
    task = get_task(name, tmp_path, limit=3)
    assert task.sampling.stop == ("\n",)
    scores = set()
    for i, completion in itertools.product(range(3), COMPLETIONS):
        text = completion.format(task.gold(task.example(i)))
        score = task.score(task.example(i), text)
        assert task.score(task.example(i), text.partition("\n")[0]) == score, text
        assert task.extract(text) == task.extract(text.partition("\n")[0])
        scores.add(score)
    assert scores == {0.0, 1.0}


def test_labels_of_the_hubs_trec_are_read_by_name(tmp_path: Path) -> None:
    (tmp_path / "trec").mkdir()
    row = {"text": "Who?", "label": 17, "label_coarse": 3, "label_coarse_original": "HUM"}
    (tmp_path / "trec/test.json").write_text(json.dumps([row]))
    task = get_task("words/trec", tmp_path)
    assert task.gold(task.example(0)) == "person"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x", "label": 2}, r"label is 2; accepted: 0 to 1 \(negative, positive\)"),
        ({"text": "x", "label": -1}, "label is -1"),
        ({"text": " ", "label": 1}, "text is ' '"),
        ({"label": 1}, "text is None"),
    ],
)
def test_a_row_without_text_or_class_is_named(row: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2/test.json").write_text(json.dumps([{"sentence": "x", "label": "1"}, row]))
    with pytest.raises(DataError, match=rf"test\.json\[1\]: {message}"):
        get_task("words/sst2", tmp_path)


@needs_data
def test_real_classes_are_those_of_the_questions() -> None:
    task = get_task("words/trec", DATA, "train")
    gold = {str(task.example(i).prompt): task.gold(task.example(i)) for i in range(5452)}
    for start, label, share in (
        ("Who ", "person", 0.95),
        ("Where ", "place", 0.9),
        ("How many ", "number", 0.95),
        ("What does ", "description", 0.4),
    ):
        found = [given for p, given in gold.items() if p.startswith(f"Question: {start}")]
        assert found.count(label) > share * len(found) > 0, start
    assert [get_task("words/sst2", DATA, s).num_examples for s in ("train", "test")] == [60614, 872]


# --- procedural ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_verifiers_accept_the_answers_and_no_other_ones(name: str) -> None:
    task = get_task(name, limit=30)
    examples = [task.example(i) for i in range(task.num_examples)]
    assert len(examples) == 30
    for example in examples:
        assert "\n" not in task.gold(example), "stopping at a newline would cut it"
        assert task.score(example, example.completion) == 1.0
        assert task.score(example, f"{example.completion} and more") == 0.0
        assert task.score(example, "") == 0.0
    wrong = [task.score(a, b.completion) for a, b in itertools.permutations(examples, 2)]
    same = [task.gold(a) == task.gold(b) for a, b in itertools.permutations(examples, 2)]
    assert wrong == [float(s) for s in same]


@pytest.mark.parametrize("name", ["rg/chain_sum", "rg/spell_backward", "format/json"])
def test_splits_share_no_question(name: str) -> None:
    questions = {}
    for split in ("test", "validation", "train"):
        task = get_task(name, split=split, limit=2000 if split == "train" else None)
        asked = [words(task.example(i).prompt) for i in range(task.num_examples)]
        assert len(set(asked)) == len(asked) >= 300
        questions[split] = set(asked)
    for one, other in itertools.combinations(questions.values(), 2):
        assert not one & other
    fit = get_task(name, split="fit", limit=2000)
    assert {words(fit.example(i).prompt) for i in range(fit.num_examples)} == questions["train"]


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_limit_does_not_ask_for_questions_that_training_has(split: Any) -> None:
    size = SPLITS[split][0]
    assert get_task("rg/gcd", split=split, limit=size + 100).num_examples == size


def test_why_seeds_are_far_apart() -> None:
    import reasoning_gym

    for name in GYM:
        one, next_one = (
            reasoning_gym.create_dataset(name[3:], seed=seed, **GYM[name]) for seed in (7, 8)
        )
        assert one[1]["question"] == next_one[0]["question"], "an example's seed is seed + index"
    firsts = sorted(first for _, first in SPLITS.values())
    assert min(b - a for a, b in itertools.pairwise(firsts)) >= 100_000_000


def test_the_questions_are_the_same_on_every_call() -> None:
    for name in ("rg/word_sorting", "format/json"):
        one, other = (get_task(name, split="train", limit=5) for _ in range(2))
        assert [one.example(i) for i in range(5)] == [other.example(i) for i in range(5)]


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ('{"age": 31, "name": "Ada"}', 1.0),
        ('{ "age" : 31,"name":"Ada"}', 1.0),
        pytest.param('{"name": "Ada", "age": 31}', 0.0, id="order"),
        pytest.param('{"age": "31", "name": "Ada"}', 0.0, id="text for a number"),
        pytest.param('{"age": 31.0, "name": "Ada"}', 0.0, id="another type of number"),
        pytest.param('{"age": 31}', 0.0, id="a key is missing"),
        pytest.param('{"age": 31, "name": "Ada", "name": "Ada"}', 0.0, id="a key twice"),
        pytest.param('{"age": 31, "name": "Ada"} Done.', 0.0, id="text after it"),
        pytest.param("age 31", 0.0, id="no JSON"),
        pytest.param('[["age", 31], ["name", "Ada"]]', 0.0, id="a list of pairs"),
    ],
)
def test_the_format_is_verified(answer: str, score: float) -> None:
    import dataclasses

    task = get_task("format/json", limit=1)
    fields = {"question": "?", "answer": '{"age": 31, "name": "Ada"}'}
    assert task.score(dataclasses.replace(task.example(0), fields=fields), answer) == score


def test_without_the_generators_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ReftConfigError, match=r"pip install 'reftune\[tasks\]'"):
        get_task("rg/chain_sum")


# --- instructions --------------------------------------------------------------------------------

ALPACA_EVAL = [
    {"dataset": "koala", "instruction": f"Say {i}.", "output": f"{i}!", "generator": "ref"}
    for i in range(3)
]


@pytest.fixture
def judged(tmp_path: Path) -> Path:
    (tmp_path / "alpaca_eval.json").write_text(json.dumps(ALPACA_EVAL))
    return tmp_path


def test_instructions_are_decoded_as_the_commands_do(judged: Path) -> None:
    task = get_task("alpaca_eval", judged)
    assert (task.metric, task.template) == ("answered", "alpaca")
    paper, greedy = task.sampling, get_task("alpaca_eval", judged, decoding="greedy").sampling
    assert (paper.no_repeat_ngram_size, paper.repetition_penalty) == (5, 1.1)
    assert (greedy.no_repeat_ngram_size, greedy.repetition_penalty) == (0, 1.0)
    assert paper.temperature == greedy.temperature == 0
    assert paper.max_new_tokens == 2048


def test_replies_are_written_for_the_judge(judged: Path) -> None:
    task = get_task("alpaca_eval", judged, max_new_tokens=4)
    samples, out = judged / "samples.jsonl", judged / "out.json"
    result = run(task, HFEngine(tiny_llama(), tiny_tokenizer(), 2), samples_path=samples)
    assert result.metric == "answered"
    rows = write_alpaca_eval(samples, task, out, "tiny")
    assert json.loads(out.read_text()) == rows
    assert [(r["instruction"], r["dataset"], r["generator"]) for r in rows] == [
        (f"Say {i}.", "koala", "tiny") for i in range(3)
    ]
    outputs = [row["output"] for row in rows]
    assert len(set(outputs)) > 1
    assert outputs == [o.lstrip() for o in outputs]
    assert "### Response" not in "".join(outputs)
    (judged / "alpaca_eval.json").write_text(json.dumps(ALPACA_EVAL[::-1]))
    with pytest.raises(RunError, match=r"sample 0 is not of alpaca_eval's example"):
        write_alpaca_eval(samples, get_task("alpaca_eval", judged), out, "tiny")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_a_run_and_the_verb_evaluate_write_for_the_judge(judged: Path, tmp_path: Path) -> None:
    data = {"data_dir": str(judged), "template": "alpaca", "max_length": 256}
    wanted = {"tasks": ["alpaca_eval"], "max_new_tokens": 4}
    (judged / "alpaca").mkdir()
    others = [{"instruction": f"Spell {i}.", "output": f"{i}?"} for i in range(3)]
    (judged / "alpaca/train.json").write_text(json.dumps(others))
    config = tiny_run(tmp_path, data={"train": ["alpaca"], **data}, evaluate=wanted)
    execute(config)
    generators = {"adapter": config.name, "base": config.model}
    for who, generator in generators.items():
        rows = json.loads((config.directory / "alpaca_eval" / f"{who}.json").read_text())
        assert [row["instruction"] for row in rows] == [f"Say {i}." for i in range(3)]
        assert {row["generator"] for row in rows} == {generator}
    arguments = ["evaluate", f"mine={config.directory}", "--tasks", "alpaca_eval"]
    arguments += ["--data-dir", str(judged), "--max-new-tokens", "4", "--no-base"]
    for limit in (3, 2):  # a file of samples that has more than is asked for now
        more = ["--out", str(tmp_path / "out"), "--limit", str(limit)]
        result = CliRunner().invoke(app, arguments + more)
        assert result.exit_code == 0, result.output
        rows = json.loads((tmp_path / "out/alpaca_eval/mine.json").read_text())
        assert len(rows) == limit


def test_training_rows_have_the_template_with_and_without_input(tmp_path: Path) -> None:
    (tmp_path / "alpaca").mkdir()
    rows = [{"instruction": "Add.", "input": given, "output": "3"} for given in ("", "1 2")]
    (tmp_path / "alpaca/train.json").write_text(json.dumps(rows))
    task = get_task("alpaca", tmp_path, "train")
    plain, given = (
        render_prompt(task.example(i).prompt, tiny_tokenizer(), task.template) for i in (0, 1)
    )
    assert plain == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nAdd.\n\n### Response:\n"
    )
    assert given == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
        "Add.\n\n### Input:\n1 2\n\n### Response:\n"
    )


@needs_data
def test_real_instructions() -> None:
    assert get_task("alpaca_eval", DATA).num_examples == 805
    sizes = [
        get_task("ultrafeedback", DATA, s).num_examples for s in ("train", "fit", "validation")
    ]
    assert sizes[0] == 1000
    assert sizes[1] + sizes[2] == 1000
    assert 90 <= sizes[2] <= 110


# --- all of them ---------------------------------------------------------------------------------


def test_every_family_says_what_it_measures_and_how_it_prompts() -> None:
    for name, family in TASKS.items():
        assert family.metric in ("accuracy", "answered")
        assert template_of([name]) == family.template
        assert family.greedy.temperature == 0
