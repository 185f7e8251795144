"""Data sets -> rows -> Examples -> batches; the one collator.

    load_rows(source) -> [Row] -> to_examples(rows) -> [Example]
    prompts.encode_examples(...) -> [Encoded] -> TokenDataset -> Collator -> a batch of tensors

Every row knows where it came from, and every complaint about it says so.
"""

from __future__ import annotations

import csv
import json
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final, TypedDict, final

import torch
from torch.utils.data import Dataset

from reftune.errors import DataError, ReftConfigError, did_you_mean
from reftune.prompts import IGNORED_LABEL, Encoded, Example, Instruction, Message, Prompt

_COLUMNS = ("prompt", "completion", "messages", "instruction", "input", "output", "answer")
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
    """Read rows from a file, a directory or the Hub; `limit` keeps the first ones.

    A file is .json (a list of objects, or {"data": [...]}), .jsonl, .csv or .parquet. A directory
    holds such a file named after `split`, or was written by `datasets.save_to_disk`. Anything else
    is a data set of the Hub, "name" or "name:config".

    Raises:
        DataError: there is no such source or split, or a row cannot be read; names file and line.
        ReftConfigError: `limit` is negative.
    """
    if limit is not None and limit < 0:
        raise ReftConfigError(f"limit is {limit}; it is a number of rows, or None for all of them.")
    path = Path(source).expanduser()
    if path.is_file():
        rows = _read_file(path)
    elif path.is_dir():
        rows = _read_directory(path, split)
    elif _looks_like_path(str(source)):
        raise DataError(f"There is no data file or directory {str(source)!r}.{_neighbours(path)}")
    else:
        rows = _read_hub(str(source), split)
    return list(islice(rows, limit))


def to_examples(
    rows: Sequence[Row], columns: Mapping[str, str] | None = None, system: str | None = None
) -> list[Example]:
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
    return [_to_example(row, columns, system) for row in rows]


def split_examples(
    examples: Sequence[Example], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Set the share `fraction` of the examples apart; return (the others, those), both in order.

    Raises:
        ReftConfigError: `fraction` is not between 0 and 1, or one of the two would be empty.
    """
    count = round(len(examples) * fraction)
    if not 0 < fraction < 1 or not 0 < count < len(examples):
        raise ReftConfigError(
            f"{fraction} of {len(examples)} examples cannot be set apart: give a fraction between "
            "0 and 1 that leaves at least one example on either side."
        )
    apart = set(random.Random(seed).sample(range(len(examples)), count))
    kept = [x for index, x in enumerate(examples) if index not in apart]
    return kept, [examples[index] for index in sorted(apart)]


class TokenRow(TypedDict):
    """The tokens of one example and their labels, of the same length."""

    input_ids: list[int]
    labels: list[int]


@final
class TokenDataset(Dataset[TokenRow]):
    """Encoded examples as a torch data set; `lengths` serves samplers that group by length."""

    def __init__(self, encoded: Sequence[Encoded]) -> None:
        self._encoded = list(encoded)
        self.lengths = [len(one.input_ids) for one in self._encoded]

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitem__(self, index: int) -> TokenRow:
        one = self._encoded[index]
        return {"input_ids": one.input_ids, "labels": one.labels}


@final
@dataclass(frozen=True, slots=True)
class Collator:
    """Pad rows on the right into a batch of (B, L) tensors: input_ids, attention_mask, labels.

    The attention mask comes from the lengths: a pad token is often eos, too, which a completion
    has to be able to contain.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[TokenRow]) -> dict[str, torch.Tensor]:
        """Return the batch; `labels` is -100 on padding."""
        length = max(len(row["input_ids"]) for row in rows)
        if self.pad_to_multiple_of:
            length += -length % self.pad_to_multiple_of
        ids_BL = torch.full((len(rows), length), self.pad_token_id)
        mask_BL = torch.zeros((len(rows), length), dtype=torch.long)
        labels_BL = torch.full((len(rows), length), IGNORED_LABEL)
        for index, row in enumerate(rows):
            size = len(row["input_ids"])
            assert len(row["labels"]) == size, "labels and input_ids differ in length"
            ids_BL[index, :size] = torch.tensor(row["input_ids"])
            mask_BL[index, :size] = 1
            labels_BL[index, :size] = torch.tensor(row["labels"])
        return {"input_ids": ids_BL, "attention_mask": mask_BL, "labels": labels_BL}


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
        fields = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet: {error}") from error
    for index, row in enumerate(fields):
        yield Row(row, f"{path}[{index}]")


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


def _read_hub(source: str, split: str) -> Iterator[Row]:
    import datasets

    name, _, config = source.partition(":")
    try:
        loaded = datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError) as error:  # datasets' and the Hub's errors derive from these
        raise DataError(
            f"The data set {source!r} (split {split!r}) is no file or directory here, and cannot "
            f"be loaded from the Hub: {error}"
        ) from error
    return (Row(fields, f"{source}[{index}]") for index, fields in enumerate(loaded))


def _looks_like_path(source: str) -> bool:
    starts = source.startswith((".", "~", os.sep))
    return starts or source.count("/") > 1 or Path(source).suffix in _READERS


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
