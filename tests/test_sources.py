"""A config's data: what is read, when, and what of it becomes tokens."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from reftune import sources, token_store
from reftune.data import Row, load_rows, to_examples
from reftune.errors import DataError, ReftConfigError, RunError
from reftune.prompts import encode_examples
from reftune.run import execute
from reftune.sources import read_examples, tokenise
from reftune.tokens import TokenDataset
from runs import ROWS, tiny_run
from tiny import tiny_tokenizer


def tokens(data: TokenDataset | None) -> list[list[int]]:
    assert data is not None
    return [data[i]["input_ids"].tolist() for i in range(len(data))]


def expected(rows: list[dict[str, str]]) -> list[list[int]]:
    examples = to_examples([Row(row, "") for row in rows])
    return [one.input_ids for one in encode_examples(examples, tiny_tokenizer(), "none", 32)]


def both(tmp_path: Path, **data: Any) -> tuple[TokenDataset, TokenDataset | None]:
    config = tiny_run(tmp_path, data=data)
    return tokenise(config, read_examples(config), tiny_tokenizer())


def test_the_examples_of_all_sources_in_their_order(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps(ROWS[:2]))
    config = tiny_run(tmp_path)
    train, heldout = both(tmp_path, train=[str(other), str(config.data.train)])
    assert tokens(train) == expected(ROWS[:2] + ROWS)
    assert heldout is None


@pytest.mark.parametrize("cached", [True, False])
def test_limit_reads_no_further(tmp_path: Path, cached: bool) -> None:
    config = tiny_run(tmp_path)
    path = tmp_path / "more.jsonl"
    path.write_text(Path(str(config.data.train)).read_text() + "not json")
    cache_dir = str(tmp_path / "cache") if cached else None
    train, _ = both(tmp_path, train=str(path), limit=len(ROWS), cache_dir=cache_dir)
    assert tokens(train) == expected(ROWS)
    assert len(list(tmp_path.glob("cache/*.tokens"))) == cached


def test_a_share_or_another_file_is_held_out(tmp_path: Path) -> None:
    train, heldout = both(tmp_path, heldout_fraction=0.25)
    assert len(train) == 9
    assert sorted(tokens(train) + tokens(heldout)) == sorted(expected(ROWS))
    other = tmp_path / "other.json"
    other.write_text(json.dumps(ROWS[:2]))
    train, heldout = both(tmp_path, heldout=str(other), limit=5)
    assert (tokens(train), tokens(heldout)) == (expected(ROWS[:5]), expected(ROWS[:2]))
    with pytest.raises(ReftConfigError, match="cannot be set apart"):
        both(tmp_path, heldout_fraction=0.01)


def test_a_stream_is_read_once_to_be_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def load_dataset(*_: Any, streaming: bool, **__: Any) -> Any:
        def stream() -> Any:
            for row in ROWS:
                asked.append(streaming)
                yield row

        return stream()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    train, _ = both(tmp_path, train="org/name", streaming=True, cache_dir=str(tmp_path / "cache"))
    assert tokens(train) == expected(ROWS)
    assert asked == [True] * (len(ROWS) + 1), "and its first row, to see that there is one"


def test_what_is_wrong_with_rows_is_said_before_a_model_is_loaded(tmp_path: Path) -> None:
    for key in ("train", "heldout"):
        path = tmp_path / "bad.jsonl"
        path.write_text(json.dumps(ROWS[0]) + '\n{"prompt": "x"}\n')
        with pytest.raises(DataError, match=r"bad\.jsonl:2: the row's columns are: prompt"):
            read_examples(tiny_run(tmp_path, data={key: str(path)}))


def test_no_examples_and_none_that_fit(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(ReftConfigError, match=r"empty\.jsonl' holds no examples"):
        both(tmp_path, train=str(empty))
    with pytest.raises(ReftConfigError, match=r"All prompts .* too long for data.max_length=4"):
        both(tmp_path, max_length=4, long_prompts="skip")
    _, heldout = both(tmp_path, heldout=str(empty))
    assert heldout is None


def test_the_demo_data_has_its_own_heldout_rows(tmp_path: Path) -> None:
    train, heldout = both(tmp_path, train="demo", heldout="demo", max_length=400)
    counts = [len(load_rows(path)) for path in sources.DEMO_SPLITS.values()]
    assert [len(tokens(train)), len(tokens(heldout))] == counts


def test_settings_reach_the_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    encoded = token_store._encoded
    monkeypatch.setattr(token_store, "_encoded", lambda *a: seen.append(a[2]) or encoded(*a))
    train, _ = both(tmp_path, num_proc=2)
    assert tokens(train) == expected(ROWS)
    assert seen == [2]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_a_run_is_resumed_with_other_ways_to_read_the_same(tmp_path: Path) -> None:
    execute(tiny_run(tmp_path, train={"max_steps": 1}))
    data = {"num_proc": 2, "cache_dir": None, "streaming": True}
    with pytest.raises(RunError, match="is finished"):  # and not: has other settings
        execute(tiny_run(tmp_path, train={"max_steps": 1}, data=data), resume=True)
    with pytest.raises(RunError, match=r"other settings \(data.limit\)"):
        execute(tiny_run(tmp_path, train={"max_steps": 1}, data={"limit": 3}), resume=True)
