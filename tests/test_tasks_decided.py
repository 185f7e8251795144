"""What ends a generation early: a score that nothing more can change, whatever follows."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from reftune.evaluate import Decides, Sample, read_samples, run
from reftune.generate import HFEngine
from reftune.prompts import encode_prompt
from reftune.tasks import TASKS, Task, get_task
from reftune.tasks.commonsense import NAMES, TRIGGER, CommonsenseTask, first_named
from tiny import tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
OPTIONS = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "hellaswag": ("ending1", "ending4"),
    "winogrande": ("option1", "option2"),
    "AQuA": tuple("ABCDE"),
}
SPACES = ("", "", " ", "\n", "  \n", "\t", "\u00a0", "\r\n")


def options(name: str) -> tuple[str, ...]:
    return OPTIONS.get(name, ("answer1", "answer2", "answer5"))


def task_of(name: str, folder: Path, *answers: str) -> Task:
    """Return a task with one example for each answer; prompts have the same length."""
    rows = [
        {"instruction": f"Question {i}", "input": "", "output": "", "answer": answer}
        for i, answer in enumerate(answers or options(name))
    ]
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "test.json").write_text(json.dumps(rows))
    return get_task(name, folder)


def pieces(name: str, draw: random.Random) -> Iterator[str]:
    """Yield parts of completions: trigger, options, what nearly is one, and what stands between."""
    short = ("Because ", "0", "1", "2", ".", "e", "A", "Be", "\u00e9")
    while True:
        text = draw.choice((TRIGGER, *options(name), draw.choice(short)))
        change = draw.choice((str, str, str, str, str.upper, str.capitalize))
        cut = draw.choice((0, 0, 0, draw.randint(0, len(text))))
        yield draw.choice((change(text)[cut:], change(text)[: len(text) - cut]))
        yield draw.choice(SPACES)


def texts(name: str, count: int, seed: int) -> Iterator[str]:
    draw = random.Random(f"{name} {seed}")
    some = pieces(name, draw)
    for _ in range(count):
        begins = draw.choice(("", "", TRIGGER, f"{draw.choice(options(name))}, {TRIGGER}"))
        yield begins + "".join(next(some) for _ in range(draw.randint(0, 8)))


def readings(task: Task, example: Any, text: str) -> tuple[float, str]:
    """Return all that a report reads in a completion."""
    named = first_named(task.name, text) if task.name in NAMES else ""
    return task.score(example, text), named


def decides(task: Task) -> Any:
    assert isinstance(task, Decides)
    return task


@pytest.mark.parametrize("name", [*NAMES, "AQuA"])
def test_what_is_decided_stays_whatever_follows(name: str, tmp_path: Path) -> None:
    task = decides(task_of(name, tmp_path))
    decided = 0
    for i in range(task.num_examples):
        example, gold = task.example(i), task.gold(task.example(i))
        nasty = ["", gold, TRIGGER + gold, "\n" + gold, " ", "0", *(gold[k:] for k in range(9))]
        for text in texts(name, 400, i):
            if task.is_decided(example, text):
                decided += 1
                now = readings(task, example, text)
                for more in (*nasty, *texts(name, 30, decided)):
                    assert readings(task, example, text + more) == now, (text, more)
                    assert task.is_decided(example, text + more), (text, more)
    assert decided > 100, "the texts say something"


@pytest.mark.parametrize("name", NAMES)
def test_commonsense_goes_on_only_where_something_could_change(name: str, tmp_path: Path) -> None:
    task = decides(task_of(name, tmp_path))
    undecided = 0
    for i in range(task.num_examples):
        example, gold = task.example(i), task.gold(task.example(i))
        follow = ["", "x", TRIGGER + gold, *(gold[k:] for k in range(len(gold)))]
        for text in texts(name, 400, i):
            if not task.is_decided(example, text):
                undecided += 1
                assert len({readings(task, example, text + more) for more in follow}) > 1, text
    assert undecided > 100


@pytest.mark.parametrize(
    ("name", "gold", "text", "decided"),
    [
        ("boolq", "true", "the correct answer is true", False),
        ("boolq", "true", "the correct answer is true \n\n", False),
        ("boolq", "true", "the correct answer is  \n", False),
        ("boolq", "true", "the correct answer is  tru", False),
        ("boolq", "true", "the correct answer is true\nB", True),
        ("boolq", "true", "the correct answer is true.", True),
        ("boolq", "true", "the correct answer is false", True),
        pytest.param("boolq", "true", "the correct answer is f", False, id="no option yet"),
        pytest.param("boolq", "true", "the correct answer is True", False, id="another case"),
        pytest.param("boolq", "true", "the correct answer is tru e", False, id="none ever named"),
        pytest.param("boolq", "true", "false, the correct answer is t", False, id="named before"),
        pytest.param("boolq", "true", "false, the correct answer is no", True, id="and wrong"),
        pytest.param("boolq", "true", "It is false. No, it is true.", False, id="no trigger yet"),
        pytest.param("boolq", "true", "false: the correct answer is", False, id="part of one"),
        ("piqa", "solution2", "the correct answer is solution1", True),
        ("piqa", "solution2", "the correct answer is solution", False),
        ("piqa", "solution2", "the correct answer is answer2", False),
        ("piqa", "solution1", "the correct answer is solution1", False),
        ("piqa", "solution1", "the correct answer is solution10", True),
        ("AQuA", "C", "The answer is (", False),
        ("AQuA", "C", "The answer is (C).", False),
        ("AQuA", "C", "The answer is (C).\n", True),
        ("AQuA", "C", "\n\nso\nThe answer is (C)", False),
        ("AQuA", "C", "Answer:\n(C)", True),
        ("AQuA", "C", "no letter of these\n", False),
    ],
)
def test_when_it_is_decided(name: str, gold: str, text: str, decided: bool, tmp_path: Path) -> None:
    task = decides(task_of(name, tmp_path, gold))
    assert task.is_decided(task.example(0), text) is decided


def test_tasks_that_read_all_of_a_completion_are_not_asked_at_every_token() -> None:
    can = {name for name, family in TASKS.items() if issubclass(family, Decides)}
    assert can == {*NAMES, "AQuA"}


def writing(text: str, prompt_length: int) -> Any:
    """Return a tiny model that writes `text` after prompts of this length."""
    model, script = tiny_llama(), torch.tensor(TOKENIZER(text).input_ids)

    def say(module: Any, args: Any, out: Any) -> Any:
        at = out.past_key_values.get_seq_length() - prompt_length
        out.logits[:, -1] = torch.nn.functional.one_hot(script[at], 259).float()
        return out

    model.register_forward_hook(say)
    return model


@pytest.mark.parametrize(
    ("name", "answers", "text", "kept"),
    [
        (
            "boolq",
            ("true", "false", "true"),
            "the correct answer is true\nBecause of it",
            ("the correct answer is true\nB", "the correct answer is true"),
        ),
        (
            "AQuA",
            ("C", "D"),
            "Let x be so.\nthus x = 5 (C).\nThis took 40 steps or more" + " ..." * 20,
            ("Let x be so.\nthus x = 5 (C).\n",) * 2,
        ),
    ],
)
def test_a_real_task_has_the_same_scores_in_fewer_tokens(
    name: str,
    answers: tuple[str, ...],
    text: str,
    kept: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = task_of(name, tmp_path, *answers)
    monkeypatch.setattr(
        task, "sampling", get_task(name, tmp_path, max_new_tokens=32).sampling, raising=False
    )
    length = len(encode_prompt(task.example(0).prompt, TOKENIZER, task.template))
    engine = HFEngine(writing(text, length), TOKENIZER, 4)
    early = run(task, engine, samples_path=tmp_path / "early")
    with monkeypatch.context() as patch:
        patch.setattr(type(task), "is_decided", lambda *_: False)
        whole = run(task, engine, samples_path=tmp_path / "whole")
        run(task, engine, samples_path=tmp_path / "earlier", limit=1)
    assert (early.value, early.stderr) == (whole.value, whole.stderr)
    assert early.generated_tokens < whole.generated_tokens
    short, long = read_samples(tmp_path / "early"), read_samples(tmp_path / "whole")
    for i, (a, b) in enumerate(zip(short, long, strict=True)):
        assert (a.completion, a.finish_reason) == (kept[i % 2], "decided")
        assert (b.completion, b.finish_reason) == (text[:32], "length")
        assert readings(task, task.example(i), a.completion) == readings(
            task, task.example(i), b.completion
        )
    # A file from before goes on, with the same scores.
    assert run(task, engine, samples_path=tmp_path / "earlier").value == early.value
    mixed: list[Sample] = read_samples(tmp_path / "earlier")
    assert [s.finish_reason for s in mixed] == ["length"] + ["decided"] * (len(answers) - 1)


def test_beams_are_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task_of("boolq", tmp_path)
    task = get_task("boolq", tmp_path, decoding="sampling", max_new_tokens=4)
    monkeypatch.setattr(CommonsenseTask, "is_decided", lambda *a: True)
    run(task, HFEngine(tiny_llama(), TOKENIZER), samples_path=tmp_path / "samples")
    assert {s.tokens for s in read_samples(tmp_path / "samples")} == {4}
