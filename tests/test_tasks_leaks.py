"""Training data that holds test questions is found, whatever form either has."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from reftune import classify, seen
from reftune.errors import DataError
from reftune.prompts import Example, Instruction, Message, Prompt
from reftune.run import execute
from reftune.settings import parse_config
from reftune.sources import read_examples, tasks_of, without_leaks
from reftune.tasks import get_task, training_examples
from reftune.tasks.leaks import find_leaks, hold_out, look_for_leaks, words
from reftune_cli import app
from runs import tiny_run
from task_data import DATA, needs_data

quiet = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning", "ignore:.*pin_memory.*"
)

LONG = "How many legs have 3 cats, 12 hens and 1,000 ants in a wide field?"
SHORT = "What is autism?"
TEMPLATE = (
    "Please answer the following question with true or false, question: {}\n\n"
    "Answer format: true/false"
)


def example(prompt: Prompt, where: str = "") -> Example:
    return Example(prompt, "x", {}, where)


def shared(train: Prompt, *test: Prompt) -> list[int]:
    tests = {"t": [example(p) for p in test]}
    return [leak.example for leak in find_leaks([example("other"), example(train)], tests)]


@pytest.mark.parametrize(
    "train",
    [
        LONG,
        LONG.upper().replace("?", " ?"),
        LONG.replace("1,000", "1000.0"),
        f"### Question: {LONG}\nLet's think",
        Instruction("Solve this.", LONG),
        (Message(role="system", content="Be brief."), Message(role="user", content=LONG)),
        TEMPLATE.format(LONG),
    ],
    ids=["same", "case and spaces", "numbers", "inside", "input", "messages", "template"],
)
@pytest.mark.parametrize("wrap", ["{}", TEMPLATE], ids=["bare", "in a template"])
def test_a_question_is_found_in_any_form(train: Prompt, wrap: str) -> None:
    test = [wrap.format(q) for q in ("Is it so or otherwise, all in all and now?", LONG, SHORT)]
    assert shared(train, *test) == [1]


@pytest.mark.parametrize(
    "train",
    [
        LONG.replace("12", "13"),
        "How many legs have 3 cats?",
        TEMPLATE.format("Is this another one?"),
        (Message(role="system", content=LONG), Message(role="user", content="Well?")),
    ],
    ids=["other number", "a part", "the template alone", "system message"],
)
def test_other_questions_are_not(train: Prompt) -> None:
    assert shared(train, TEMPLATE.format(LONG), TEMPLATE.format(SHORT)) == []


def test_short_questions_must_be_the_whole() -> None:
    tests = [TEMPLATE.format(SHORT), TEMPLATE.format("Who was Galileo ?")]
    assert shared(SHORT, *tests) == [0]
    assert shared(TEMPLATE.format(SHORT), *tests) == [0]
    assert shared(f"Tell me, please: {SHORT} And who has it?", *tests) == []


def many(count: int, shared: int) -> tuple[list[Example], list[Example]]:
    test = [example(f"What is the sum of {i} and {i} in the end?", f"t[{i}]") for i in range(count)]
    train = [example(f"{e.prompt} Think!", f"f[{i}]") for i, e in enumerate(test[:shared])]
    return [example("Something else"), *train], test


def test_few_shared_questions_are_noted_and_more_refused() -> None:
    train, test = many(1000, 5)
    assert look_for_leaks(train, {"sums": []}) == (set(), [])
    left_out, (note,) = look_for_leaks(train, {"sums": test})
    assert not left_out
    assert "holds 5 of the 1000 questions of sums, for instance t[0] in f[0]: 'What is" in note
    train, test = many(1000, 6)
    with pytest.raises(
        DataError, match=r"holds 6 of the 1000 .* set data\.leaks: drop .* or allow"
    ):
        look_for_leaks(train, {"sums": test})
    assert look_for_leaks(train, {"sums": test}, "allow")[0] == set()
    left_out, (note,) = look_for_leaks(train, {"sums": test}, "drop")
    assert left_out == {1, 2, 3, 4, 5, 6}
    assert note.endswith("It is not trained on.")


def test_rows_held_out_share_no_question_and_depend_on_no_order() -> None:
    rows = [example(f"Question {i // 2}, please?", str(i)) for i in range(200)]  # each twice
    fit, validation = hold_out(rows)
    assert (len(fit), len(validation)) == (180, 20)
    assert not {words(e.prompt) for e in fit} & {words(e.prompt) for e in validation}
    again = hold_out(rows[::-1])[1]
    assert sorted(again, key=str) == sorted(validation, key=str)
    assert len(hold_out([example(f"Q {i}") for i in range(9000)])[1]) == 300
    assert [e.where for e in hold_out(rows, last=3)[1]] == ["197", "198", "199"]
    assert len(hold_out(rows, last=3)[0]) == 196  # one row with the question of row 197 left out


# --- in a run ------------------------------------------------------------------------------------


def leaking_run(tmp_path: Path, **data: Any) -> Any:
    """Return a run that is evaluated on boolq, of which 3 of 4 questions are trained on."""
    data_dir = tmp_path / "data" / "boolq"
    data_dir.mkdir(parents=True, exist_ok=True)
    names = ["the earth round", "ice cold", "fire wet", "snow white"]
    rows = [
        {"instruction": TEMPLATE.format(f"is {n}?"), "input": "", "answer": "true"} for n in names
    ]
    (data_dir / "test.json").write_text(json.dumps(rows))
    (data_dir / "train.json").write_text(
        json.dumps(
            [
                *rows[:3],
                *[{**rows[0], "instruction": TEMPLATE.format(f"is {i} even?")} for i in range(20)],
            ]
        )
    )
    return tiny_run(
        tmp_path,
        data={
            "train": ["boolq"],
            "data_dir": str(tmp_path / "data"),
            "template": "commonsense",
            "max_length": 400,
            **data,
        },
        train={"max_steps": 1},
        evaluate={"tasks": ["boolq"], "limit": 1, "max_new_tokens": 2},
    )


def test_a_run_on_test_questions_is_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reftune.run._attach", lambda config: pytest.fail("a model was loaded"))
    with pytest.raises(DataError, match=r"holds 3 of the 4 questions of boolq"):
        execute(leaking_run(tmp_path))


def test_what_is_shared_is_left_out_or_allowed(tmp_path: Path) -> None:
    for rule, count in (("drop", 20), ("allow", 23)):
        config = leaking_run(tmp_path, leaks=rule)
        train, notes = without_leaks(config, read_examples(config)[0])
        assert len(list(train)) == count
        assert len(list(train)) == count, "it is read at each pass"
        assert [n for n in notes if "3 of the 4 questions" in n] == notes != []


def test_streamed_data_is_not_searched_and_that_is_said(tmp_path: Path) -> None:
    config = leaking_run(tmp_path, streaming=True)
    train, notes = without_leaks(config, read_examples(config)[0])
    assert len(list(train)) == 23
    assert "not searched" in notes[0]


@pytest.mark.parametrize("where", ["evaluate", "heldout"])
def test_tuning_trains_on_none_of_the_rows_it_looks_at(where: str, tmp_path: Path) -> None:
    config = leaking_run(tmp_path)
    if where == "evaluate":
        evaluate = config.evaluate.model_copy(update={"split": "validation", "limit": None})
        config = config.model_copy(update={"evaluate": evaluate})
    else:
        config = config.model_copy(
            update={"data": config.data.model_copy(update={"heldout": "boolq", "leaks": "allow"})}
        )
    train, heldout = read_examples(config)
    if where == "evaluate":
        assert without_leaks(config, train)[1] == []
        (task,) = tasks_of(config)
        looked_at = [task.example(i) for i in range(task.num_examples)]
    else:
        assert heldout is not None
        looked_at = list(heldout)
    assert len(looked_at) == 2
    assert len(list(train)) == 21
    assert not {str(e.prompt) for e in train} & {str(e.prompt) for e in looked_at}


def test_tasks_are_trained_on_in_the_prompts_they_are_evaluated_in(tmp_path: Path) -> None:
    from reftune.errors import ReftConfigError

    with pytest.raises(ReftConfigError, match=r"boolq have prompts of the template 'commonsense'"):
        read_examples(leaking_run(tmp_path, template="none"))
    with pytest.raises(ReftConfigError, match=r"several templates \(boolq: commonsense, SVAMP: al"):
        read_examples(leaking_run(tmp_path, train=["boolq", "SVAMP"]))


# --- in an evaluation -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a run that trained on 3 of the 4 questions of boolq, unasked."""
    config = leaking_run(tmp_path_factory.mktemp("seen"))
    asked = config.evaluate.model_copy(update={"tasks": []})
    execute(config.model_copy(update={"evaluate": asked}))
    return Path(config.directory)


def evaluated(tmp_path: Path, *args: str) -> tuple[str, dict[str, Any]]:
    """Evaluate on boolq and the demo; return what was printed from the scores on, and results."""
    command = ["evaluate", *args, "--no-base", "--max-new-tokens", "1", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "results.json").read_text())
    return result.output[result.output.index("(± standard error)") :], results


def copied(run: Path, tmp_path: Path, **data: Any) -> Path:
    """Copy a run, with other keys in the data of its config."""
    shutil.copytree(run, tmp_path / "copy")
    path = tmp_path / "copy" / "config.yaml"
    values = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(values | {"data": values["data"] | data}))
    return tmp_path / "copy"


def tasks_and_data(run: Path, tasks: str = "boolq,demo") -> tuple[str, ...]:
    return "--tasks", tasks, "--data-dir", str(run.parent.parent / "data")


@quiet
@pytest.mark.parametrize(
    ("options", "count", "of"),
    [((), 3, 4), (("--limit", "2"), 2, 2), (("--split", "validation"), 2, 2)],
)
def test_an_evaluation_tells_what_was_trained_on(
    trained: Path, tmp_path: Path, options: tuple[str, ...], count: int, of: int
) -> None:
    tasks = "boolq" if "--split" in options else "boolq,demo"
    for adapter in (trained, trained / "adapter"):
        out = tmp_path / adapter.name
        text, results = evaluated(out, str(adapter), *tasks_and_data(trained, tasks), *options)
        assert f"holds {count} of the {of} questions of boolq, for instance" in text
        assert text.count("Note:") == 1
        assert results["shared_with_training"] == {"boolq": {"adapter": count}}
        assert results["tasks"]["boolq"]["adapter"]["n"] == of


@quiet
def test_an_evaluation_tells_nothing_where_nothing_is_shared(trained: Path, tmp_path: Path) -> None:
    text, results = evaluated(tmp_path, str(trained), *tasks_and_data(trained, "demo"))
    assert "Note:" not in text
    assert set(results) == {"tasks"}
    shutil.copytree(trained / "adapter", tmp_path / "alone")  # of no run that is known
    text, _ = evaluated(tmp_path / "out", str(tmp_path / "alone"), *tasks_and_data(trained))
    assert "Note:" not in text


@quiet
def test_an_evaluation_knows_what_each_run_left_out(trained: Path, tmp_path: Path) -> None:
    run = copied(trained, tmp_path, leaks="drop")
    path = run / "config.yaml"
    values = yaml.safe_load(path.read_text())
    for asked, counts in ((["boolq"], {"a": 3}), ([], {"a": 3, "b": 3})):
        values["evaluate"]["tasks"] = asked
        path.write_text(yaml.safe_dump(values))
        adapters = (f"a={trained}", f"b={run}")
        text, results = evaluated(tmp_path / str(len(asked)), *adapters, *tasks_and_data(trained))
        assert results["shared_with_training"] == {"boolq": counts}
        assert text.count("Note: the training data of") == len(counts)


@quiet
def test_runs_of_the_same_data_are_searched_once(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched = []
    whole = seen.trained_on
    monkeypatch.setattr(seen, "trained_on", lambda c: searched.append(c) or whole(c))
    adapters = (f"a={trained}", f"b={trained}", f"c={copied(trained, tmp_path, limit=1000)}")
    _, results = evaluated(tmp_path, *adapters, *tasks_and_data(trained))
    assert results["shared_with_training"] == {"boolq": {"a": 3, "b": 3, "c": 3}}
    assert len(searched) == 2


@quiet
@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"data_dir": "/nowhere"}, "nowhere"),
        ({"train": "gone.jsonl"}, "gone.jsonl"),
        ({"streaming": True}, "it was streamed"),
        ({"an_older_key": 1}, "an_older_key"),
    ],
)
def test_an_evaluation_goes_on_where_training_data_cannot_be_read(
    trained: Path, tmp_path: Path, data: dict[str, Any], says: str
) -> None:
    run = copied(trained, tmp_path, **data)
    text, results = evaluated(tmp_path / "out", str(run), *tasks_and_data(trained))
    (line,) = [line for line in text.splitlines() if "Note:" in line]
    assert "not checked against what" in line
    assert says in line
    assert set(results) == {"tasks"}


@quiet
def test_a_wrong_row_that_is_not_evaluated_stops_nothing(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "boolq"
    folder.mkdir(parents=True)
    rows = json.loads((trained.parent.parent / "data" / "boolq" / "test.json").read_text())
    (folder / "test.json").write_text(json.dumps([*rows, {"no": "row"}]))
    args = (str(trained), "--tasks", "boolq", "--data-dir", str(tmp_path / "data"), "--limit", "2")
    _, results = evaluated(tmp_path / "out", *args)
    assert results["shared_with_training"] == {"boolq": {"adapter": 2}}


@needs_data
@pytest.mark.parametrize(
    ("train", "test", "fewest", "most"),
    [
        ("boolq", "boolq", 1, 16),  # 1 as it is written, 8 as it is worded
        ("ARC-Easy", "ARC-Easy", 2, 11),
        ("ARC-Challenge", "ARC-Challenge", 0, 0),
        ("openbookqa", "openbookqa", 0, 0),
        ("gsm8k_cot", "gsm8k", 0, 0),
        ("mawps-asdiv", "SVAMP", 0, 0),
        ("mawps-asdiv", "AddSub", 300, 395),
        ("mawps-asdiv", "MultiArith", 500, 600),
        ("mawps-asdiv", "SingleEq", 300, 508),
        ("mawps-asdiv", "mawps", 150, 238),
        ("words/sst2", "words/sst2", 2, 4),
        ("words/trec", "words/trec", 11, 11),
    ],
)
def test_what_real_sets_share(train: str, test: str, fewest: int, most: int) -> None:
    task = get_task(test, DATA)
    examples = [task.example(i) for i in range(task.num_examples)]
    leaks = find_leaks(training_examples([train], DATA), {test: examples})
    assert fewest <= len({leak.example for leak in leaks}) <= most


@needs_data
@pytest.mark.parametrize(
    ("name", "count"), [("cola", 24), ("mrpc", 5), ("rte", 0), ("stsb", 6), ("sst2", 2)]
)
def test_what_sets_of_glue_share(name: str, count: int) -> None:
    data = {"train": name, "data_dir": str(DATA / "glue"), "leaks": "allow"}
    values = {"name": "run", "task_type": "seq_cls", "adapter": {"positions": "f3"}, "data": data}
    notes = classify.read(parse_config(values, "glue")).notes
    assert [f"holds {count} of the " in note for note in notes] == [True] * bool(count)
    values["data"] = data | {"leaks": "refuse"}
    if name == "cola":
        with pytest.raises(DataError, match="holds 24 of the 1043"):
            classify.read(parse_config(values, "glue"))
    else:
        classify.read(parse_config(values, "glue"))
