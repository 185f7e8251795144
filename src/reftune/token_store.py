"""Examples -> tokens in flat arrays, in memory or in a mapped file.

Examples are encoded in chunks that are appended, so that memory does not grow with their number.
A file of tokens is named after all that they follow from (the examples' texts, the tokenizer, the
settings, the libraries' versions): it is never out of date, and the next run finds it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, Final, final

import numpy as np
from numpy.typing import NDArray

from reftune.errors import ReftConfigError
from reftune.models import cache_directory
from reftune.prompts import (
    Encoded,
    Example,
    LongPrompts,
    TemplateName,
    encode_examples,
    render_prompt,
)
from reftune.workers import in_workers, usable_cpus

IN_MEMORY = 4 << 20  # bytes; what takes more goes to a file
CHUNK = 1000  # examples that are encoded at once, fewer where they are long:
CHUNK_BYTES = 2 << 20
SERIAL = 20  # chunks that one process encodes before others are started
MOST_WORKERS = 8

_VERSION = 1  # of what is encoded and of the file: raise it when either changes
_FORMAT = "reftune tokens"
_HEADER = 256  # bytes
_ID: Final = np.dtype("<i4")
_OFFSET: Final = np.dtype("<i8")


@final
class Examples:
    """Examples that are read from their source at each pass instead of being held in memory."""

    def __init__(self, read: Callable[[], Iterator[Example]]) -> None:
        self._read = read

    def __iter__(self) -> Iterator[Example]:
        return self._read()

    @cached_property
    def digest(self) -> str:
        """Return the hash of their prompts and completions; reads them all, once."""
        return _digest(self)


@dataclass(frozen=True, slots=True)
class Columns:
    """All tokens on end, where each example begins (and the last ends), and its prompt's length."""

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    prompts: NDArray[np.int32]
    path: Path | None = None


Chunk = tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int32]]  # ids, lengths, prompts


@dataclass(frozen=True, slots=True)
class Encoder:
    """How examples become tokens; worker processes are given a copy."""

    tokenizer: Any
    template: TemplateName
    max_length: int
    long_prompts: LongPrompts

    def __call__(self, examples: Sequence[Example]) -> Chunk:
        return flatten(
            encode_examples(
                examples, self.tokenizer, self.template, self.max_length, self.long_prompts
            )
        )

    def digest(self) -> str:
        """Return the hash of all that tokens follow from but for the examples."""
        libraries = [importlib.metadata.version(name) for name in ("tokenizers", "transformers")]
        settings = (self.template, self.max_length, self.long_prompts)
        # A chat template may write the date: text that was rendered tells it.
        rendered = render_prompt("probe", self.tokenizer, self.template)
        hashed = _hash()
        hashed.update(repr((_VERSION, libraries, settings, rendered)).encode())
        # What was set on the tokenizer after it was made may show in no file. And padding and
        # truncation of an earlier call are in the files; the last of these calls undoes them.
        for text in ("probe", *self.tokenizer.all_special_tokens):
            for special in (True, False):
                ids = self.tokenizer([text], add_special_tokens=special, verbose=False).input_ids
                hashed.update(repr(ids).encode())
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder)
            for file in sorted(Path(folder).rglob("*")):
                if file.is_file():
                    hashed.update(repr((file.name, _without_origin(file))).encode())
        return hashed.hexdigest()


def _hash() -> blake2b:
    return blake2b(digest_size=16)


def _without_origin(file: Path) -> bytes | list[Any]:
    """Return what a tokenizer's file holds, but for where the tokenizer was loaded from."""
    if file.name != "tokenizer_config.json":
        return file.read_bytes()
    origin = ("is_local", "local_files_only", "name_or_path")
    values = json.loads(file.read_text(encoding="utf-8"))
    return [(name, values[name]) for name in sorted(values) if name not in origin]


def flatten(encoded: Sequence[Encoded]) -> Chunk:
    lengths = np.array([len(one.input_ids) for one in encoded], dtype=_OFFSET)
    ids = chain.from_iterable(one.input_ids for one in encoded)
    prompts = np.array([one.prompt_length for one in encoded], dtype=_ID)
    return np.fromiter(ids, dtype=_ID, count=int(lengths.sum())), lengths, prompts


def stored(
    examples: Iterable[Example],
    encoder: Encoder,
    cache_dir: str | Path | None,
    num_proc: int | None,
) -> Columns:
    """Find the tokens of examples in `cache_dir`, or encode the examples.

    See `TokenDataset.from_examples`.
    """
    folder = _cache_folder(cache_dir)
    if folder is not None and not isinstance(examples, Iterator):
        digest = examples.digest if isinstance(examples, Examples) else _digest(examples)
        # Look first: an encoder's hash takes longer than to encode a few examples.
        known = any(folder.glob(f"{digest}-*"))
        found = open_columns(*_place(folder, digest, encoder)) if known else None
        if found is not None:
            return found
    hashed = _hash()
    chunks = _chunks(examples, hashed.update)
    # on the folder's disk: a system's own place for temporary files may be memory
    directory = None if folder is None else str(folder)
    with ExitStack() as stack:
        offsets, prompts, ids = (
            stack.enter_context(tempfile.SpooledTemporaryFile(IN_MEMORY, dir=directory))
            for _ in range(3)
        )
        columns = Spooled(offsets, prompts, ids)
        for chunk in _encoded(chunks, encoder, num_proc):
            columns.append(chunk)
        if folder is not None and (columns.large or cache_dir != "auto"):
            return _publish(columns, *_place(folder, hashed.hexdigest(), encoder))
        return _unnamed(columns) if columns.large else columns.read()


def _content(example: Example) -> bytes:
    return repr((example.prompt, example.completion)).encode() + b"\n"


def _digest(examples: Iterable[Example]) -> str:
    hashed = _hash()
    for example in examples:
        hashed.update(_content(example))
    return hashed.hexdigest()


def _place(folder: Path, digest: str, encoder: Encoder) -> tuple[Path, str]:
    """Return the file of these examples encoded in this way, and the key that is in it."""
    key = f"{digest}-{encoder.digest()}"
    return folder / f"{key}.tokens", key


def _cache_folder(cache_dir: str | Path | None) -> Path | None:
    """Return a directory that can be written; "auto" may end up as none."""
    if cache_dir is None:
        return None
    auto = cache_dir == "auto"
    folder = cache_directory() / "tokens" if auto else Path(cache_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        if auto:
            return None
        raise ReftConfigError(
            f"cache_dir {str(folder)!r} cannot be written: {error}. Give another one, or null to "
            "keep no tokens."
        ) from error


@dataclass(slots=True)
class Spooled:
    """Columns that grow, each in memory while it is small, then in a file without a name."""

    offsets: IO[bytes]
    prompts: IO[bytes]
    ids: IO[bytes]
    examples: int = 0
    tokens: int = 0

    def append(self, chunk: Chunk) -> None:
        """Add the tokens of some examples at the end."""
        ids, lengths, prompts = chunk
        self.ids.write(ids.tobytes())
        self.prompts.write(prompts.tobytes())
        self.offsets.write((self.tokens + np.cumsum(lengths) - lengths).astype(_OFFSET).tobytes())
        self.examples += len(lengths)
        self.tokens += len(ids)

    @property
    def large(self) -> bool:
        """Return whether they are not to be held in memory."""
        return self.examples * 12 + self.tokens * 4 > IN_MEMORY

    def parts(self) -> Iterator[bytes]:
        """Yield the columns' bytes one after the other; ends them."""
        self.offsets.write(np.array([self.tokens], _OFFSET).tobytes())
        for file in (self.offsets, self.prompts, self.ids):
            file.seek(0)
            while part := file.read(1 << 20):
                yield part

    def read(self) -> Columns:
        """Return them in memory."""
        return _columns(np.frombuffer(b"".join(self.parts()), np.uint8), self.examples, self.tokens)


def _chunks(examples: Iterable[Example], note: Callable[[bytes], None]) -> Iterator[list[Example]]:
    chunk: list[Example] = []
    size = 0
    for example in examples:
        content = _content(example)
        note(content)
        size += len(content)
        # without the row it came from, which a worker process does not need
        chunk.append(Example(example.prompt, example.completion, where=example.where))
        if len(chunk) == CHUNK or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encoded(
    chunks: Iterator[list[Example]], encoder: Encoder, num_proc: int | None
) -> Iterator[Chunk]:
    """Encode in this process, in `num_proc` others, or (None) in others if it takes long."""
    workers = min(usable_cpus(), MOST_WORKERS) if num_proc is None else num_proc
    if workers == 1:
        yield from map(encoder, chunks)
        return
    if num_proc is None:
        yield from map(encoder, islice(chunks, SERIAL))
    for first in chunks:  # no process is started for nothing
        yield from in_workers(encoder, chain([first], chunks), workers)


def _publish(columns: Spooled, path: Path, key: str) -> Columns:
    """Write a file under another name and rename it: nobody sees half of it."""
    found = open_columns(path, key)  # an iterator's, or one that was written in the meantime
    if found is None:
        part = path.with_name(f".{key}-{uuid.uuid4().hex}.part")
        try:
            with part.open("xb") as file:
                _write(file, columns, key)
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        found = open_columns(path, key)
    assert found is not None, f"{path} was written and cannot be read"
    return found


def _unnamed(columns: Spooled) -> Columns:
    """Write a file that is gone when it is no longer used."""
    with tempfile.TemporaryFile() as file:
        _write(file, columns, key="")
        found = open_columns(file, key="")
    assert found is not None
    return found


def _write(file: IO[bytes], columns: Spooled, key: str) -> None:
    header = {"format": _FORMAT, "key": key, "examples": columns.examples, "tokens": columns.tokens}
    file.write(json.dumps(header).encode().ljust(_HEADER))
    for part in columns.parts():
        file.write(part)
    file.flush()


def open_columns(file: Path | IO[bytes], key: str) -> Columns | None:
    """Map a file; None if it is not there, not whole, or not the one with this key."""
    try:
        raw = np.asarray(np.memmap(file, dtype=np.uint8, mode="r"))
        header = json.loads(raw[:_HEADER].tobytes())
        count, tokens = int(header["examples"]), int(header["tokens"])
        known = (header["format"], header["key"]) == (_FORMAT, key)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    if not known or raw.size != _HEADER + (count + 1) * _OFFSET.itemsize + (count + tokens) * 4:
        return None
    columns = _columns(raw[_HEADER:], count, tokens, file if isinstance(file, Path) else None)
    whole = columns.offsets[0] == 0 and columns.offsets[-1] == tokens
    return columns if whole else None


def _columns(raw: NDArray[np.uint8], count: int, tokens: int, path: Path | None = None) -> Columns:
    ends = np.cumsum([(count + 1) * _OFFSET.itemsize, count * _ID.itemsize])
    offsets, prompts, ids = np.split(raw, ends)
    return Columns(ids.view(_ID), offsets.view(_OFFSET), prompts.view(_ID), path)
