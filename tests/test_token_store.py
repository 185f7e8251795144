"""Tokens: the same in memory, in a mapped file, found again and from several processes."""

import json
import mmap
import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from reftune import token_store
from reftune.data import iter_examples, iter_rows
from reftune.errors import DataError, ReftConfigError
from reftune.prompts import Encoded, Example, Instruction, Message, encode_examples
from reftune.token_store import Examples
from reftune.tokens import TokenDataset
from tokenizers_for_tests import CHAT, byte_tokenizer

CONVERSATION = (Message(role="system", content="Be kind."), Message(role="user", content="Hi"))
EXAMPLES = [
    *(Example("say " + "x" * (i % 7), f"{i} ü", {"row": i}, f"f:{i}") for i in range(40)),
    Example(Instruction("add", "1 2", "briefly"), "3"),
    Example(CONVERSATION, "Hello"),
]
TOKENIZER = byte_tokenizer([("x", "x"), ("Ċ", "Ċ")], chat_template=CHAT, adds="<s> $A")


def rows(data: TokenDataset) -> list[tuple[list[int], list[int], int]]:
    return [(r["input_ids"].tolist(), r["labels"].tolist(), r["index"]) for r in data]  # type: ignore[attr-defined]


def expected(examples: list[Example], **settings: Any) -> list[tuple[list[int], list[int], int]]:
    tokenizer = settings.pop("tokenizer", TOKENIZER)
    settings = {"template": "auto", "max_length": 64} | settings
    encoded = encode_examples(examples, tokenizer, **settings)
    return [(one.input_ids, one.labels, i) for i, one in enumerate(encoded)]


def build(examples: Any, tokenizer: Any = TOKENIZER, **settings: Any) -> TokenDataset:
    settings = {"max_length": 64, "cache_dir": None, "num_proc": 1} | settings
    return TokenDataset.from_examples(examples, tokenizer, **settings)


def is_mapped(data: TokenDataset) -> bool:
    """Return whether the tokens are those of a file, and not in memory."""
    at: Any = data._ids
    while isinstance(at, np.ndarray):
        at = at.base
    return isinstance(at, mmap.mmap)


def files(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(token_store, "CHUNK", 9)
    monkeypatch.setenv("REFTUNE_CACHE", str(tmp_path / "home"))


@pytest.fixture
def no_encoding(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function after which nothing can be encoded, only found."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("encoded again")

    return lambda: monkeypatch.setattr(token_store, "encode_examples", refuse)


@pytest.mark.parametrize("num_proc", [1, 2, None])
@pytest.mark.parametrize("store", ["memory", "file", "unnamed file", "cache"])
@pytest.mark.parametrize("once", [False, True])
def test_wherever_they_are_and_whoever_encodes_them_tokens_are_the_same(
    store: str, num_proc: int | None, once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_store, "SERIAL", 2)
    monkeypatch.setattr(token_store, "usable_cpus", lambda: 2)
    if store == "unnamed file" or store == "cache":
        monkeypatch.setattr(token_store, "IN_MEMORY", 100)
    where = {"file": tmp_path, "cache": "auto"}.get(store)
    examples: Any = iter(EXAMPLES) if once else EXAMPLES
    data = build(examples, cache_dir=where, num_proc=num_proc)
    assert rows(data) == expected(EXAMPLES)
    assert len(list(tmp_path.rglob("*.tokens"))) == (where is not None)
    assert is_mapped(data) == (store != "memory")
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("long_prompts", ["skip", "truncate_left"])
def test_long_prompts_are_treated_in_a_file_as_in_memory(long_prompts: Any, tmp_path: Path) -> None:
    settings = {"max_length": 42, "long_prompts": long_prompts}
    assert 0 < len(expected(EXAMPLES, **settings)) <= len(EXAMPLES)
    assert rows(build(EXAMPLES, cache_dir=tmp_path, **settings)) == expected(EXAMPLES, **settings)


def test_no_examples_and_examples_that_are_all_skipped(tmp_path: Path) -> None:
    for where in (None, tmp_path):
        assert rows(build([], cache_dir=where)) == []
        assert len(build(EXAMPLES[:3], cache_dir=where, max_length=4, long_prompts="skip")) == 0


def test_tokens_are_found_again(tmp_path: Path, no_encoding: Callable[[], None]) -> None:
    build(EXAMPLES, cache_dir=tmp_path)
    no_encoding()
    assert rows(build(EXAMPLES, cache_dir=tmp_path)) == expected(EXAMPLES)
    lazily = Examples(lambda: iter(EXAMPLES))
    assert rows(build(lazily, cache_dir=tmp_path, num_proc=2)) == expected(EXAMPLES)
    TOKENIZER(["a", "bc"], padding=True, truncation=True, max_length=5)  # leaves traces in it
    assert len(build(EXAMPLES, cache_dir=tmp_path)) == len(EXAMPLES)
    elsewhere = [Example(x.prompt, x.completion, {}, "other:1") for x in EXAMPLES]
    assert len(build(elsewhere, cache_dir=tmp_path)) == len(EXAMPLES)


def test_a_tokenizer_that_was_saved_and_loaded_is_the_same(
    tmp_path: Path, no_encoding: Callable[[], None]
) -> None:
    build(EXAMPLES, cache_dir=tmp_path / "cache")
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer")
    no_encoding()
    assert len(build(EXAMPLES, loaded, cache_dir=tmp_path / "cache")) == len(EXAMPLES)


def other_tokenizer(**changes: Any) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer([("x", "x"), ("Ċ", "Ċ")], chat_template=CHAT, adds="<s> $A")
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


@pytest.mark.parametrize(
    "change",
    [
        {"template": "alpaca", "max_length": 200},
        {"max_length": 63},
        {"long_prompts": "skip"},
        {"tokenizer": byte_tokenizer([("a", "y")], chat_template=CHAT, adds="<s> $A")},
        {"tokenizer": byte_tokenizer([("x", "x"), ("Ċ", "Ċ")], chat_template=CHAT)},
        {"tokenizer": other_tokenizer(chat_template=CHAT.replace("\n", " "))},
        {"tokenizer": other_tokenizer(eos_token="<end>")},
        {"tokenizer": other_tokenizer(split_special_tokens=True)},  # not among what it saves
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_is_encoded_otherwise_is_another_file(change: Any, tmp_path: Path) -> None:
    examples = EXAMPLES[:40]
    build(examples, cache_dir=tmp_path)
    assert rows(build(examples, cache_dir=tmp_path, **change)) == expected(examples, **change)
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize(
    "examples",
    [
        EXAMPLES[:-1],
        EXAMPLES[::-1],
        [*EXAMPLES[:-1], Example(CONVERSATION, "Hello!")],
        [*EXAMPLES[:-1], Example((CONVERSATION[1], CONVERSATION[0]), "Hello")],
        [*EXAMPLES[:40], Example(Instruction("add 1 2", "", "briefly"), "3"), EXAMPLES[41]],
    ],
)
def test_other_examples_are_another_file(examples: list[Example], tmp_path: Path) -> None:
    build(EXAMPLES, cache_dir=tmp_path)
    assert rows(build(examples, cache_dir=tmp_path)) == expected(examples)
    assert len(files(tmp_path)) == 2


def test_a_text_can_not_be_made_to_look_like_another() -> None:
    one, other = [Example("a", "b"), Example("c", "d")], [Example("a", "b')\n('c', 'd")]
    digests = {Examples(lambda of=of: iter(of)).digest for of in (one, other)}  # type: ignore[misc]
    assert len(digests) == 2


def test_a_template_that_writes_the_date_is_encoded_anew_the_next_day(tmp_path: Path) -> None:
    dated = byte_tokenizer(chat_template="{{ strftime_now('%H:%M:%S.%f') }}" + CHAT)
    for _ in range(2):
        build(EXAMPLES, dated, cache_dir=tmp_path)
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda good: b"",
        lambda good: good[:100],
        lambda good: good[:-4],
        lambda good: good + b"\0\0\0\0",
        lambda good: b"\x80" * len(good),
        lambda good: b"[]".ljust(256) + good[256:],
        lambda good: good.replace(b"reftune tokens", b"foreign tokens"),
        lambda good: good.replace(b'"key": "', b'"key": "0'),
        lambda good: good.replace(b'"tokens": ', b'"tokens": 1'),
        lambda good: good[:256] + b"\1" + good[257:],
    ],
)
def test_a_file_that_is_not_whole_or_not_ours_is_written_anew(
    damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    reader = build(EXAMPLES, cache_dir=tmp_path)
    [path] = tmp_path.iterdir()
    good = path.read_bytes()
    assert damage(good) != good
    bad = tmp_path / "bad"
    bad.write_bytes(damage(good))
    os.replace(bad, path)
    assert rows(build(EXAMPLES, cache_dir=tmp_path)) == expected(EXAMPLES)
    assert path.read_bytes() == good
    assert files(tmp_path) == [path.name]
    assert rows(reader) == expected(EXAMPLES), "who had the file open still reads it"


def test_another_settings_file_under_this_name_is_not_used(tmp_path: Path) -> None:
    build(EXAMPLES, cache_dir=tmp_path / "a")
    build(EXAMPLES, byte_tokenizer(chat_template=CHAT), cache_dir=tmp_path / "b")
    [ours], [theirs] = ((tmp_path / name).iterdir() for name in "ab")
    os.replace(theirs, ours)
    assert rows(build(EXAMPLES, cache_dir=tmp_path / "a")) == expected(EXAMPLES)


def test_two_that_write_at_once_do_not_disturb_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others: list[TokenDataset] = []

    def meanwhile(*args: Any) -> list[Encoded]:
        monkeypatch.setattr(token_store, "encode_examples", encode_examples)
        others.append(build(EXAMPLES, cache_dir=tmp_path))
        return encode_examples(*args)

    monkeypatch.setattr(token_store, "encode_examples", meanwhile)
    assert rows(build(EXAMPLES, cache_dir=tmp_path)) == expected(EXAMPLES) == rows(others[0])
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("num_proc", [1, 2])
def test_an_error_names_its_row_and_leaves_no_file(num_proc: int, tmp_path: Path) -> None:
    bad = Example("x" * 200, "c", where="f.jsonl:30")
    examples = [*EXAMPLES[:29], bad, *EXAMPLES]
    with pytest.raises(DataError, match=r"^f\.jsonl:30: the prompt has \d+ tokens"):
        build(examples, cache_dir=tmp_path, num_proc=num_proc)
    assert files(tmp_path) == []


def test_a_write_that_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        build(EXAMPLES, cache_dir=tmp_path)
    assert files(tmp_path) == []


def test_by_default_only_what_is_large_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_encoding: Callable[[], None]
) -> None:
    folder = tmp_path / "home" / "tokens"
    build(EXAMPLES, cache_dir="auto")
    assert files(folder) == []
    monkeypatch.setattr(token_store, "IN_MEMORY", 100)
    build(EXAMPLES, cache_dir="auto")
    no_encoding()
    assert rows(build(EXAMPLES, cache_dir="auto")) == expected(EXAMPLES)
    assert len(files(folder)) == 1


def test_a_home_that_cannot_be_written_is_no_hindrance_but_a_named_folder_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_store, "IN_MEMORY", 100)
    (tmp_path / "home").write_text("a file")
    assert rows(build(EXAMPLES, cache_dir="auto")) == expected(EXAMPLES)
    with pytest.raises(ReftConfigError, match=r"cache_dir '.*home/x' cannot be written"):
        build(EXAMPLES, cache_dir=tmp_path / "home" / "x")


def test_few_long_examples_are_encoded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def count(examples: list[Example], *rest: Any) -> list[Encoded]:
        sizes.append(len(examples))
        return encode_examples(examples, *rest)

    monkeypatch.setattr(token_store, "encode_examples", count)
    monkeypatch.setattr(token_store, "CHUNK_BYTES", 1000)
    build([Example("x" * 100, "c")] * 9 + [Example("x" * 990, "c")] * 3, max_length=1200)
    assert sizes == [9, 1, 1, 1]
    sizes.clear()
    build([Example("x" * 495, "c")] * 5, max_length=1200)
    assert sizes == [2, 2, 1]


class Trivial:
    """A tokenizer that takes no time: a token for each word."""

    chat_template = bos_token_id = None
    all_special_tokens: tuple[str, ...] = ()
    eos_token_id = 0

    def __call__(self, text: str | list[str], **_: Any) -> SimpleNamespace:
        ids = [
            [len(word) for word in t.split(" ")]
            for t in ([text] if isinstance(text, str) else text)
        ]
        return SimpleNamespace(input_ids=ids)

    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")


def test_memory_does_not_grow_with_the_number_of_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From rows in a file to tokens in a file, with all lists that are made on the way."""
    monkeypatch.setattr(token_store, "CHUNK", 500)
    monkeypatch.setattr(token_store, "IN_MEMORY", 1 << 18)
    peaks = {}
    for count in (5_000, 50_000):
        path = tmp_path / f"{count}.jsonl"
        with path.open("w") as file:
            for i in range(count):
                file.write(json.dumps({"prompt": f"say {i}" + " a" * 30, "completion": "b"}) + "\n")

        def read(path: Path = path) -> Iterator[Example]:
            return iter_examples(iter_rows(path))

        tracemalloc.start()
        data = build(Examples(read), Trivial(), template="none", cache_dir=tmp_path)
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(data) == count
    per_example = (peaks[50_000] - peaks[5_000]) / 45_000
    # two integers of 4 bytes each are kept, for samplers, and what is made of offsets in passing
    assert per_example < 40, peaks
    assert sum(data.lengths) == 50_000 * 34


@pytest.mark.parametrize(("num_proc", "count", "asked"), [(None, 18, 0), (None, 19, 3), (2, 1, 2)])
def test_by_default_few_examples_start_no_process(
    num_proc: int | None, count: int, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    def here(encode: Any, chunks: Any, processes: int) -> Any:
        started.append(processes)
        return map(encode, chunks)

    monkeypatch.setattr(token_store, "in_workers", here)
    monkeypatch.setattr(token_store, "usable_cpus", lambda: 3)
    monkeypatch.setattr(token_store, "SERIAL", 2)
    assert rows(build(EXAMPLES[:count], num_proc=num_proc)) == expected(EXAMPLES[:count])
    assert sum(started) == asked


def test_workers_tokenise_without_a_warning(capfd: pytest.CaptureFixture[str]) -> None:
    build(EXAMPLES * 20)  # uses the tokenizer's threads
    build(EXAMPLES * 20, num_proc=2)
    assert capfd.readouterr().err == ""
    assert "TOKENIZERS_PARALLELISM" not in os.environ
