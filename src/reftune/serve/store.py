"""Versions of adapters: immutable, named by their content, read and checked once.

A directory may be overwritten while requests run. What is checked, hashed and later loaded comes
from one copy of its bytes, so a request sees one version from its first token to its last.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
import threading
import uuid
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import final

from safetensors.torch import save_file
from torch import Tensor

from reftune.checkpoint import WEIGHTS, parse_tensors
from reftune.errors import AdapterMismatchError
from reftune.serve.adapter import CONFIG, Adapter, ModelShape, read_adapter
from reftune.serve.parameters import PARAMETERS, make_parameters
from reftune.serve.settings import MiB

_FILES = (CONFIG, WEIGHTS)
_FORMAT = b"1"  # of a version's files: another one is another version
_Signature = tuple[tuple[int, int, int], ...]


@final
class Store:
    """Adapters by content, for one model; all methods may be called from any thread."""

    def __init__(
        self, model: ModelShape, directory: str | None = None, largest: int = 2**30
    ) -> None:
        """Keep versions in a directory (None: a temporary one); no file above `largest` bytes."""
        self.model = model
        self.largest = largest
        if directory is None:
            self.directory = Path(tempfile.mkdtemp(prefix="reftune-serve-")).resolve()
            self._finalizer = weakref.finalize(
                self, shutil.rmtree, self.directory, ignore_errors=True
            )
        else:
            self.directory = Path(directory).resolve()
            self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._versions: dict[str, Adapter] = {}
        self._seen: dict[Path, tuple[_Signature, Adapter]] = {}

    def get(self, path: str | Path) -> Adapter:
        """Return the version of an adapter that is in a directory now.

        A directory of this store is a version. Another one is read again when its files changed.
        Raises AdapterMismatchError or ReftConfigError.
        """
        path = Path(os.path.abspath(path))
        if path.parent == self.directory and path.name in self._versions:
            if not path.is_dir():  # a worker that reads it would end, and all requests with it
                raise AdapterMismatchError(
                    f"The server's copy of this adapter is gone from {self.directory}: load it "
                    "again, and see who deletes files there."
                )
            return self._versions[path.name]
        signature = self._signature(path)
        known = self._seen.get(path)
        if known is not None and known[0] == signature:
            return known[1]
        adapter = self._add(path)
        # Else it changed while it was read: look again next time.
        if self._signature(path) == signature:
            self._seen[path] = (signature, adapter)
        return adapter

    def forget(self, path: str | Path) -> None:
        """Read a directory again at its next use, even if its files look unchanged."""
        self._seen.pop(Path(os.path.abspath(path)), None)

    def _signature(self, path: Path) -> _Signature:
        try:
            stats = {name: os.stat(path / name) for name in _FILES}
        except OSError as error:
            raise _unreadable(path, error) from error
        for name, found in stats.items():
            if not stat.S_ISREG(found.st_mode):  # to open a pipe would wait for ever
                raise AdapterMismatchError(f"{path / name} is no file.")
            if found.st_size > self.largest:
                raise AdapterMismatchError(
                    f"{path / name} has {found.st_size / MiB:,.0f} MiB; served are files of up to "
                    f"{self.largest / MiB:,.0f} MiB (the larger of --adapter-memory and "
                    "--adapter-host-memory)."
                )
        return tuple((s.st_ino, s.st_size, s.st_mtime_ns) for s in stats.values())

    def _add(self, path: Path) -> Adapter:
        contents = {name: _read(path / name) for name in _FILES}
        digest = _digest([contents[name] for name in _FILES])
        with self._lock:
            if digest in self._versions:
                return self._versions[digest]
            target = self.directory / digest
            scratch = self.directory / f".{digest}-{uuid.uuid4().hex}"
            scratch.mkdir()
            try:
                (scratch / CONFIG).write_bytes(contents[CONFIG])
                tensors = parse_tensors(contents[WEIGHTS], path / WEIGHTS)
                checked = _checked(scratch, path, digest, self.model, tensors)
                if not target.is_dir():  # else another process made it, of the same bytes
                    width = self.model.hidden_size
                    made = make_parameters(checked.config, width, tensors, path / WEIGHTS)
                    save_file(made, scratch / PARAMETERS)
                    _rename(scratch, target)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
            adapter = replace(checked, directory=target)
            self._versions[digest] = adapter
            return adapter


def _rename(scratch: Path, target: Path) -> None:
    try:
        scratch.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was faster
            raise


def _checked(
    copy: Path, source: Path, digest: str, model: ModelShape, tensors: Mapping[str, Tensor]
) -> Adapter:
    try:
        return read_adapter(copy, digest, model, tensors, source / WEIGHTS)
    except ValueError as error:  # ours are; the user knows the source, not the copy
        raise type(error)(str(error).replace(str(copy), str(source))) from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path.parent, error) from error


def _unreadable(path: Path, error: OSError) -> AdapterMismatchError:
    return AdapterMismatchError(
        f"{path} is no adapter that can be served ({error.strerror}: {error.filename}). An adapter "
        f"is a directory with an {CONFIG} and an {WEIGHTS}; pickled weights are not read."
    )


def _digest(contents: Sequence[bytes]) -> str:
    found = hashlib.sha256(_FORMAT)
    for data in contents:
        found.update(len(data).to_bytes(8, "little"))
        found.update(data)  # not joined: to copy millions of bytes takes longer than to hash them
    return found.hexdigest()
