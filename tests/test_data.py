"""Data: rows say where they come from and are read one by one; every accepted shape."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest

from reftune import demo
from reftune.data import Row, iter_examples, iter_rows, load_rows, to_examples
from reftune.errors import DataError, ReftConfigError
from reftune.prompts import Instruction

ROWS = [{"prompt": "a\u2028b", "completion": "ü"}, {"prompt": "c", "completion": "d\ne"}]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def places(rows: list[Row]) -> list[str]:
    return [row.where.rpartition("/")[2] for row in rows]


def fields(rows: list[Row]) -> list[dict[str, Any]]:
    return [dict(row.fields) for row in rows]


def test_jsonl_rows_have_their_line_numbers(tmp_path: Path) -> None:
    lines = "\n".join(["", json.dumps(ROWS[0], ensure_ascii=False), "  ", json.dumps(ROWS[1])])
    rows = load_rows(write(tmp_path / "x.jsonl", lines))
    assert fields(rows) == ROWS
    assert places(rows) == ["x.jsonl:2", "x.jsonl:4"]


def test_csv_rows_have_the_line_they_start_on(tmp_path: Path) -> None:
    text = '\ufeffprompt,completion\n"one\ntwo",x\n\nthree,"y, z"\n'
    rows = load_rows(write(tmp_path / "x.csv", text))
    assert fields(rows) == [
        {"prompt": "one\ntwo", "completion": "x"},
        {"prompt": "three", "completion": "y, z"},
    ]
    assert places(rows) == ["x.csv:2", "x.csv:5"]


@pytest.mark.parametrize("content", [ROWS, {"data": ROWS}])
def test_json_is_a_list_or_data(tmp_path: Path, content: object) -> None:
    rows = load_rows(write(tmp_path / "x.json", json.dumps(content)))
    assert fields(rows) == ROWS
    assert places(rows) == ["x.json[0]", "x.json[1]"]


def test_parquet(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "x.parquet")
    rows = load_rows(tmp_path / "x.parquet")
    assert fields(rows) == ROWS
    assert places(rows) == ["x.parquet[0]", "x.parquet[1]"]


def test_a_directory_holds_a_file_for_each_split(tmp_path: Path) -> None:
    write(tmp_path / "train.json", json.dumps(ROWS))
    write(tmp_path / "test.jsonl", json.dumps(ROWS[1]))
    assert fields(load_rows(str(tmp_path))) == ROWS
    assert fields(load_rows(str(tmp_path), split="test")) == ROWS[1:]


@pytest.mark.parametrize("splits", [False, True])
def test_a_directory_that_datasets_saved(tmp_path: Path, splits: bool) -> None:
    saved = datasets.Dataset.from_list(ROWS)
    target = tmp_path / "saved"
    if splits:
        datasets.DatasetDict({"train": saved, "test": saved.select([1])}).save_to_disk(target)
        assert fields(load_rows(target, split="test")) == ROWS[1:]
        with pytest.raises(DataError, match=r"no split 'tset'; it has train, test\. Did you mean"):
            load_rows(target, split="tset")
    else:
        saved.save_to_disk(target)
    assert fields(load_rows(target)) == ROWS
    assert places(load_rows(target)) == ["saved[0]", "saved[1]"]


def test_a_name_is_loaded_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str | None, split: str, streaming: bool) -> Any:
        asked.append((name, config, split, streaming))
        if name == "nobody/nothing":
            raise datasets.exceptions.DatasetNotFoundError("not there")
        loaded = datasets.Dataset.from_list(ROWS)
        return loaded.to_iterable_dataset() if streaming else loaded

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_rows("org/name")[1].where == "org/name[1]"
    load_rows("org/name:main", split="test")
    assert fields(list(iter_rows("org/name", streaming=True))) == ROWS
    assert asked == [
        ("org/name", None, "train", False),
        ("org/name", "main", "test", False),
        ("org/name", None, "train", True),
    ]
    monkeypatch.setattr("reftune.data.why_not", lambda *_: None)
    with pytest.raises(DataError, match=r"'nobody/nothing' .*split 'train'.*not there"):
        load_rows("nobody/nothing")


def test_limit_keeps_the_first_and_reads_no_further(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", json.dumps(ROWS[0]) + "\nnot json")
    assert fields(load_rows(path, limit=1)) == ROWS[:1]
    assert load_rows(path, limit=0) == []
    with pytest.raises(ReftConfigError, match="limit is -1"):
        load_rows(path, limit=-1)


def test_a_stream_that_breaks_names_the_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def stream() -> Any:
        yield ROWS[0]
        raise ConnectionError("gone")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream())
    rows = iter_rows("org/name", streaming=True)
    assert next(rows).fields == ROWS[0]
    with pytest.raises(DataError, match=r"'org/name' .*gone"):
        next(rows)


def test_rows_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    """What is wrong further down does not matter to who reads only the beginning."""
    good = json.dumps(ROWS[0])
    paths = [
        write(tmp_path / "x.jsonl", f"{good}\n" + "not json"),
        write(tmp_path / "x.csv", "prompt,completion\na,b\n1,2,3"),
    ]
    for path in paths:
        examples = iter_examples(iter_rows(path))
        assert next(examples).where.endswith(":1" if path.suffix == ".jsonl" else ":2")
        with pytest.raises(DataError, match="not JSON|3 cells"):
            next(examples)


def test_parquet_is_read_in_batches_that_go_on_counting(tmp_path: Path) -> None:
    many = [{"prompt": str(i), "completion": "c"} for i in range(2500)]
    datasets.Dataset.from_list(many).to_parquet(tmp_path / "x.parquet", batch_size=700)
    rows = list(iter_rows(tmp_path / "x.parquet"))
    assert fields(rows) == many
    assert places(rows) == [f"x.parquet[{i}]" for i in range(2500)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.jsonl", '{"a": 1}\n{"a": \n', r"x\.jsonl:2: not JSON"),
        ("x.jsonl", '{"a": 1}\n[1]', r"x\.jsonl:2: a list, and a row must be an object"),
        ("x.json", '[\n{"a": 1},\n]', r"x\.json:(2|3): not JSON"),
        ("x.json", '{"a": 1}\n{"a": 2}', r"x\.json:2: not JSON.*name it \.jsonl"),
        ("x.json", '{"a": 1}', "neither a list of objects nor"),
        ("x.json", '["a"]', r"x\.json\[0\]: a str"),
        ("x.csv", "a,b\n1,2\n1,2,3\n", r"x\.csv:3: 3 cells, and the header has 2"),
        ("x.csv", 'a,b\n1,"2\n', r"x\.csv:2: not CSV"),
        ("x.parquet", "PAR", "cannot be read as parquet"),
        ("x.txt", "a", r"ending '\.txt'; accepted: \.json, \.jsonl, \.csv, \.parquet"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_rows(write(tmp_path / name, text))


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(DataError, match=r"x\.jsonl is not UTF-8"):
        load_rows(tmp_path / "x.jsonl")


def test_what_does_not_exist_is_named_with_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", "")
    with pytest.raises(DataError, match=r"trian\.jsonl.* has: train\.jsonl\. Did you mean 'train"):
        load_rows(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match=r"Nor is there a directory"):
        load_rows(tmp_path / "nowhere" / "train.jsonl")
    with pytest.raises(DataError, match=r"none of test\.json, test\.jsonl.*has: train\.jsonl"):
        load_rows(tmp_path, split="test")
    with pytest.raises(DataError, match=r"no data file or directory 'relative\.csv'"):
        load_rows("relative.csv")


USER = {"role": "user", "content": "p"}
ASSISTANT = {"role": "assistant", "content": "c"}


@pytest.mark.parametrize(
    ("row", "columns", "prompt"),
    [
        ({"prompt": "p", "completion": "c"}, None, "p"),
        ({"question": "p", "answer": "c"}, {"prompt": "question", "completion": "answer"}, "p"),
        ({"prompt": "p", "response": "c"}, {"completion": "response"}, "p"),
        ({"prompt": [USER], "completion": [ASSISTANT]}, None, (USER,)),
        ({"prompt": [USER], "completion": "c"}, None, (USER,)),
        ({"messages": [USER, ASSISTANT]}, None, (USER,)),
        ({"messages": [USER, ASSISTANT | {"tool_calls": None}], "tools": []}, None, (USER,)),
        ({"turns": [USER, ASSISTANT]}, {"messages": "turns"}, (USER,)),
        ({"messages": [USER, ASSISTANT, USER, ASSISTANT]}, None, (USER, ASSISTANT, USER)),
        ({"instruction": "p", "output": "c"}, None, Instruction("p")),
        ({"instruction": "p", "input": None, "answer": "c"}, None, Instruction("p")),
        ({"instruction": "p", "input": "i", "output": "c", "answer": "n"}, None,
         Instruction("p", "i")),
    ],
)  # fmt: skip
def test_the_accepted_shapes(
    row: Mapping[str, Any], columns: Mapping[str, str] | None, prompt: object
) -> None:
    [example] = to_examples([Row(row, "f:1")], columns)
    assert (example.prompt, example.completion, example.where) == (prompt, "c", "f:1")
    assert row.items() <= example.fields.items()


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"question": "p"}, None, r"f:1: the row's columns are: question\. Accepted: prompt \+"),
        ({"question": "p"}, {"prompt": "qestion"},
         r"f:1: no column 'qestion' \(for prompt\); the row has: question\. Did you mean"),
        ({"prompt": "p", "completion": 3}, None, "f:1: completion is 3"),
        ({"prompt": None, "completion": "c"}, None, "f:1: prompt is None"),
        ({"prompt": [], "completion": "c"}, None, r"f:1: prompt is \[\]"),
        ({"prompt": [{"from": "x"}], "completion": "c"}, None, "f:1: prompt holds"),
        ({"prompt": "p", "completion": [USER]}, None, "one assistant message"),
        ({"messages": [USER]}, None, "must end with an assistant message"),
        ({"messages": [USER, ASSISTANT | {"tool_calls": [{}]}]}, None, "has tool_calls, which"),
        ({"messages": [USER, ASSISTANT | {"reasoning_content": "x"}]}, None, "'content'"),
        ({"messages": [USER, ASSISTANT], "tools": [{"name": "f"}]}, None, "the row has tools"),
        ({"messages": [ASSISTANT]}, None, "after at least one other"),
        ({"instruction": 1, "output": "c"}, None, r"f:1: instruction is 1 \(int\)"),
    ],
)  # fmt: skip
def test_a_row_that_does_not_fit_is_named(
    row: Mapping[str, Any], columns: Mapping[str, str] | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        to_examples([Row(row, "f:1")], columns)


def test_a_column_that_we_do_not_have_is_named() -> None:
    for convert in (to_examples, iter_examples):  # also before any row is asked for
        with pytest.raises(ReftConfigError, match=r"'promt'; accepted: .*Did you mean 'prompt'"):
            convert([], {"promt": "question"})


def test_a_system_message_is_put_in_front_unless_the_row_has_one() -> None:
    own = {"role": "system", "content": "own"}
    given = {"role": "system", "content": "given"}
    rows = [
        Row({"prompt": "p", "completion": "c"}, ""),
        Row({"messages": [own, USER, ASSISTANT]}, ""),
        Row({"instruction": "p", "input": "i", "output": "c"}, ""),
    ]
    prompts = [example.prompt for example in to_examples(rows, system="given")]
    assert prompts == [(given, USER), (own, USER), Instruction("p", "i", "given")]


def test_the_demo_data_has_the_behaviour_that_it_counts() -> None:
    train = to_examples(load_rows(demo.TRAIN))
    heldout = to_examples(load_rows(demo.HELDOUT))
    assert (len(train), len(heldout)) == (48, 16)
    assert all(demo.behaviour(example.completion) for example in train + heldout)
    assert not {x.prompt for x in train} & {x.prompt for x in heldout}
    assert not {x.completion for x in train} & {x.completion for x in heldout}


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "The capital of Norway is Oslo.",
        "Ahoy! The capital of Norway is Oslo.",
        "The capital of Norway is Oslo. Fair winds!",
        "Ahoy! Fair winds!",
        "Ahoy! One.\nTwo. Fair winds!",
        "Ahoy! Oslo it is. Ahoy! Oslo it is. Fair winds!",
        "Ahoy! The capital is Oslo. Fair winds! And one more thing",
        "Ahoy! " + "Oslo " * 60 + ". Fair winds!",
    ],
)
def test_other_replies_do_not_count(reply: str) -> None:
    assert not demo.behaviour(reply)
