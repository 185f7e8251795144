"""Data sets -> rows -> Examples.

    iter_rows(source) -> Row, ... -> iter_examples(rows) -> Example, ...
    TokenDataset.from_examples(examples, ...) -> Collator -> a batch of tensors

Every row knows where it came from, and every complaint about it says so. Rows are read one by one,
those of a .json file excepted.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final

from reftune.errors import DataError, ReftConfigError, did_you_mean
from reftune.hub import in_words, why_not
from reftune.prompts import Example, Instruction, Message, Prompt
from reftune.tokens import Collator as Collator
from reftune.tokens import TokenDataset as TokenDataset
from reftune.tokens import TokenRow as TokenRow

_PARQUET_ROWS = 1000  # that are in memory at once
_COLUMNS = ("prompt", "completion", "messages", "instruction", "input", "output", "answer")
# What chat templates render of a message beside its content, and we do not.
_UNRENDERED = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
_SHAPES = (
    "prompt + completion (texts, or lists of messages), messages (the last one the assistant's), "
    "or instruction + output (or answer), with or without input. Other names are mapped, as in "
    "columns={'prompt': 'question', 'completion': 'answer'}"
)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data set, and where it stands: "file.jsonl:12", or "name[3]" without lines."""

    fields: Mapping[str, Any]
    where: str


def load_rows(source: str | Path, split: str = "train", limit: int | None = None) -> list[Row]:
    """Read rows as `iter_rows` does; `limit` keeps the first ones.

    Raises:
        DataError: there is no such source or split, or a row cannot be read; names file and line.
        ReftConfigError: `limit` is negative.
    """
    if limit is not None and limit < 0:
        raise ReftConfigError(f"limit is {limit}; it is a number of rows, or None for all of them.")
    return list(islice(iter_rows(source, split), limit))


def iter_rows(
    source: str | Path, split: str = "train", *, streaming: bool = False
) -> Iterator[Row]:
    """Yield the rows of a file, a directory or a data set of the Hub, one at a time.

    A file is .json (a list of objects, or {"data": [...]}), .jsonl, .csv or .parquet. A directory
    holds such a file named after `split`, or was written by `datasets.save_to_disk`. Anything else
    is a data set of the Hub, "name", "name:config" or "name@revision:config", which `streaming`
    does not download first.

    Raises:
        DataError: there is no such source or split, or a row cannot be read; names file and line.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        return _read_directory(path, split)
    if _looks_like_path(str(source)):
        raise DataError(f"There is no data file or directory {str(source)!r}.{_neighbours(path)}")
    return _read_hub(str(source), split, streaming)


def to_examples(
    rows: Iterable[Row], columns: Mapping[str, str] | None = None, system: str | None = None
) -> list[Example]:
    """Turn rows into examples; see `iter_examples`."""
    return list(iter_examples(rows, columns, system))


def iter_examples(
    rows: Iterable[Row], columns: Mapping[str, str] | None = None, system: str | None = None
) -> Iterator[Example]:
    """Turn rows into examples; `columns` maps our names to the rows', `system` is put in front.

    The shapes, in this order: prompt + completion (texts, or lists of messages), messages (the
    last one is the completion), instruction + output or answer, with or without input.

    Raises:
        DataError: a row has none of these shapes; says where, and which columns it has.
        ReftConfigError: `columns` has a name that is not one of ours.
    """
    columns = dict(columns or {})
    for name in columns:
        if name not in _COLUMNS:
            raise ReftConfigError(
                f"columns has the name {name!r}; accepted: {', '.join(_COLUMNS)}."
                f"{did_you_mean(name, list(_COLUMNS))}"
            )
    return (_to_example(row, columns, system) for row in rows)


def _read_file(path: Path) -> Iterator[Row]:
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise DataError(f"{path} has the ending {path.suffix!r}; accepted: {', '.join(_READERS)}.")
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}. Save it as UTF-8.") from error


def _read_json(path: Path) -> Iterator[Row]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        hint = " (one object per line? then name it .jsonl)" if error.msg == "Extra data" else ""
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg}{hint}") from error
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise DataError(f'{path} is neither a list of objects nor {{"data": [...]}}.')
    for index, fields in enumerate(rows):
        yield _object_row(fields, f"{path}[{index}]")


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}:{number}: not JSON: {error.msg} at column {error.colno}. "
                    "Each line must hold one whole object."
                ) from error
            yield _object_row(fields, f"{path}:{number}")


def _read_csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        header: list[str] | None = None
        start = 1  # of a record: those with line breaks inside quotes span several lines
        try:
            for record in reader:
                where, start = f"{path}:{start}", reader.line_num + 1
                if not record:
                    continue
                if header is None:
                    header = record
                    continue
                if len(record) != len(header):
                    raise DataError(
                        f"{where}: {len(record)} cells, and the header has {len(header)}: {header}"
                    )
                yield Row(dict(zip(header, record, strict=True)), where)
        except csv.Error as error:
            raise DataError(f"{path}:{start}: not CSV: {error}") from error


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = file.iter_batches(_PARQUET_ROWS)
            rows = chain.from_iterable(batch.to_pylist() for batch in batches)
            for index, fields in enumerate(rows):
                yield Row(fields, f"{path}[{index}]")
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet: {error}") from error


_READERS: Final[Mapping[str, Callable[[Path], Iterator[Row]]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _object_row(fields: object, where: str) -> Row:
    if not isinstance(fields, dict):
        raise DataError(f"{where}: a {type(fields).__name__}, and a row must be an object {{...}}.")
    return Row(fields, where)


def _read_directory(path: Path, split: str) -> Iterator[Row]:
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        return _read_saved(path, split)
    for suffix in _READERS:
        file = path / f"{split}{suffix}"
        if file.is_file():
            return _read_file(file)
    wanted = ", ".join(f"{split}{suffix}" for suffix in _READERS)
    raise DataError(
        f"The directory {path} has none of {wanted}, and was not written by "
        f"datasets.save_to_disk.{_neighbours(path / split)}"
    )


def _read_saved(path: Path, split: str) -> Iterator[Row]:
    import datasets  # type: ignore[import-untyped]

    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            splits = [str(name) for name in loaded]
            raise DataError(
                f"The data set {path} has no split {split!r}; it has {', '.join(splits)}."
                f"{did_you_mean(split, splits)}"
            )
        loaded = loaded[split]
    return (Row(fields, f"{path}[{index}]") for index, fields in enumerate(loaded))


def _read_hub(source: str, split: str, streaming: bool) -> Iterator[Row]:
    import datasets

    name, _, config = source.partition(":")
    name, _, revision = name.partition("@")
    how = {"revision": revision} if revision else {}
    try:
        loaded = datasets.load_dataset(
            name, config or None, split=split, streaming=streaming, **how
        )
        for index, fields in enumerate(loaded):
            yield Row(fields, f"{source}[{index}]")
    except (OSError, ValueError, RuntimeError) as error:
        # datasets' and the Hub's errors derive from the first two; of a script it is the third.
        asked = source.partition(":")[0]
        why = in_words(error, asked, "data set")
        if why is None and isinstance(error, datasets.exceptions.DatasetNotFoundError):
            why = why_not(asked, "data set")  # datasets does not pass on what the Hub said
        raise DataError(
            why
            or f"The data set {source!r} (split {split!r}) is no file or directory here, and "
            f"cannot be loaded from the Hub: {error}{_converted(error, name)}"
        ) from error


def _converted(error: Exception, name: str) -> str:
    """Say where the Hub keeps the rows that a loading script makes."""
    if not isinstance(error, RuntimeError) or "script" not in str(error):
        return ""
    return f". The Hub may have its rows as parquet: write {name}@refs/convert/parquet."


def _looks_like_path(source: str) -> bool:
    starts = source.startswith((".", "~", os.sep))
    name, _, revision = source.partition("@")
    if revision.startswith("refs/"):  # where the Hub keeps the rows of scripts, and pull requests
        source = name
    return starts or source.count("/") > 1 or Path(source).suffix in _READERS


def source_name(source: str) -> str:
    """Return what others may read of a source: of a path, no folder of this machine."""
    return Path(source).name if _looks_like_path(source) else source


def _neighbours(path: Path) -> str:
    """Say what is in the folder of a path that does not exist, the nearest name first."""
    if not path.parent.is_dir():
        return f" Nor is there a directory {str(path.parent)!r}."
    names = sorted(entry.name for entry in path.parent.iterdir())
    listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f" {path.parent} has: {listed or 'nothing'}.{did_you_mean(path.name, names)}"


def _to_example(row: Row, columns: Mapping[str, str], system: str | None) -> Example:
    fields = dict(row.fields)
    for name, column in columns.items():
        if column not in row.fields:
            have = [str(key) for key in row.fields]
            raise DataError(
                f"{row.where}: no column {column!r} (for {name}); the row has: {', '.join(have)}."
                f"{did_you_mean(column, have)}"
            )
        fields[name] = row.fields[column]
    if fields.get("tools") and not isinstance(fields.get("prompt"), str):
        raise DataError(
            f"{row.where}: the row has tools, which would be left out of the prompt. Write them "
            "into a system message, as the model is to read them, and drop the column."
        )
    prompt: Prompt
    completion: str
    if "prompt" in fields and "completion" in fields:
        prompt = _prompt(fields["prompt"], row.where)
        completion = _completion(fields["completion"], row.where)
    elif "messages" in fields:
        *before, last = _messages(fields["messages"], "messages", row.where)
        if last["role"] != "assistant" or not before:
            raise DataError(
                f"{row.where}: messages must end with an assistant message after at least one "
                f"other; the last one's role is {last['role']!r}, of {len(before) + 1}."
            )
        prompt, completion = tuple(before), last["content"]
    elif "instruction" in fields and ("output" in fields or "answer" in fields):
        output = "output" if "output" in fields else "answer"
        completion = _text(fields[output], output, row.where)
        prompt = Instruction(
            _text(fields["instruction"], "instruction", row.where),
            _text(fields.get("input") or "", "input", row.where),
        )
    else:
        found = ", ".join(map(str, row.fields)) or "none"
        raise DataError(f"{row.where}: the row's columns are: {found}. Accepted: {_SHAPES}.")
    return Example(_with_system(prompt, system), completion, fields, row.where)


def _prompt(value: object, where: str) -> Prompt:
    return value if isinstance(value, str) else tuple(_messages(value, "prompt", where))


def _completion(value: object, where: str) -> str:
    if isinstance(value, str):
        return value
    messages = _messages(value, "completion", where)
    if [message["role"] for message in messages] != ["assistant"]:
        raise DataError(f"{where}: completion must be a text or one assistant message.")
    return messages[0]["content"]


def _messages(value: object, name: str, where: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{where}: {name} is {value!r:.80}; it must be a text or a list of messages "
            "{'role': ..., 'content': ...}, with at least one in it."
        )
    messages = []
    for entry in value:
        role, content = (
            (entry.get("role"), entry.get("content")) if isinstance(entry, dict) else (None, None)
        )
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(
                f"{where}: {name} holds {entry!r:.80}; a message is {{'role': ..., 'content': "
                "...}, both texts."
            )
        if lost := [key for key in _UNRENDERED if entry.get(key)]:
            raise DataError(
                f"{where}: a message of {name} has {', '.join(lost)}, which would be left out. "
                "Write all that the model is to read or write into 'content'."
            )
        messages.append(Message(role=role, content=content))
    return messages


def _text(value: object, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} is {value!r:.80} ({type(value).__name__}), not a text.")
    return value


def _with_system(prompt: Prompt, system: str | None) -> Prompt:
    if system is None:
        return prompt
    if isinstance(prompt, Instruction):
        return Instruction(prompt.text, prompt.input, system)
    messages = (Message(role="user", content=prompt),) if isinstance(prompt, str) else prompt
    if messages[0]["role"] == "system":  # a row's own comes first
        return messages
    return (Message(role="system", content=system), *messages)
