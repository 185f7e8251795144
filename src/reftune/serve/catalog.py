"""The adapters that a server has by name, and where it may take others from."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from reftune.errors import ReftConfigError, RunError
from reftune.hub import is_hub_name, split_revision
from reftune.serve.adapter import CONFIG
from reftune.stored import find_adapter

HUB = "hub"


@final
@dataclass(frozen=True)
class CatalogSettings:
    """What `reftune serve` was told about adapters.

    Attributes:
        adapters: as `NAME=DIRECTORY` or `DIRECTORY`: an adapter, a run, or a directory of them; or
            an adapter's Hub name in the place of the directory.
        roots: directories below which adapters may be loaded while the server runs; the word
            "hub" allows Hub names.
        pinned: names of adapters that are never evicted.
    """

    adapters: tuple[str, ...] = ()
    roots: tuple[str, ...] = ()
    pinned: tuple[str, ...] = ()


@final
class Catalog:
    """Adapters by name. Registering one reads nothing of it but that its config exists."""

    def __init__(self, settings: CatalogSettings) -> None:
        self.allows_hub = HUB in settings.roots
        self.roots = [_real(root) for root in settings.roots if root != HUB]
        self.paths: dict[str, Path] = {}
        self.pinned = set(settings.pinned)
        for text in settings.adapters:
            for name, path in named_adapters(text):
                if ":" in name:
                    raise ReftConfigError(
                        f"An adapter is named {name!r}; accepted is a name without a colon, which "
                        "separates it from the base model's: --adapters OTHER=DIRECTORY."
                    )
                if name in self.paths and self.paths[name] != path:
                    raise ReftConfigError(
                        f"Two adapters are named {name!r}: {self.paths[name]} and {path}. Name one "
                        "of them otherwise: --adapters OTHER=DIRECTORY."
                    )
                self.paths[name] = path

    def locate(self, given: str, largest: int | None = None) -> Path:
        """Return the directory of an adapter that is to be loaded while the server runs.

        Raises ReftConfigError where it lies outside the allowed roots (links are followed first,
        those of the files, too), or the Hub has files of more than `largest` bytes.
        """
        if self.allows_hub and not os.path.isabs(given) and is_hub_name(given):
            return _from_hub(given, largest)
        if not self.roots:
            raise ReftConfigError(
                "Adapters cannot be loaded while this server runs: it was started without "
                "--adapter-roots."
            )
        directory = _inside(_real(given))
        for path in (directory, *(directory / name for name in os.listdir(directory))):
            if not any(_real(path).is_relative_to(root) for root in self.roots):
                raise ReftConfigError(
                    f"{given!r} is, or has a file, outside the directories that adapters may be "
                    "loaded from (--adapter-roots)."
                )
        return directory


def named_adapters(text: str) -> Iterator[tuple[str, Path]]:
    """Yield the names and directories that an argument of --adapters stands for.

    A Hub name's adapter is downloaded. Raises ReftConfigError where there is no adapter.
    """
    name, separator, rest = text.partition("=")
    if not separator or Path(text).exists():
        name, rest = "", text
    directory = Path(rest).expanduser()
    if is_hub_name(rest):
        yield name or split_revision(rest)[0].rpartition("/")[2], _from_hub(rest)
        return
    if _is_adapter(directory):
        yield name or directory.resolve().name, _inside(_real(directory))
        return
    found = [] if name else [path for path in _children(directory) if _is_adapter(path)]
    if not found:
        raise ReftConfigError(
            f"{rest!r} is no adapter, no run and no directory of them: there is no {CONFIG} in it, "
            "in its 'adapter' directory or one level below."
        )
    for path in found:
        yield path.name, _inside(_real(path))


def _is_adapter(path: Path) -> bool:
    return (_inside(path) / CONFIG).is_file()


def _inside(path: Path) -> Path:
    """Return the adapter's directory in a run's."""
    inside = path / "adapter"
    return inside if (inside / CONFIG).is_file() else path


def _children(directory: Path) -> Sequence[Path]:
    if not directory.is_dir():
        return []
    entries: Iterable[os.DirEntry[str]] = os.scandir(directory)
    return sorted(Path(entry.path) for entry in entries if entry.is_dir())


def _real(path: str | Path) -> Path:
    """Return a path without links. Raises ReftConfigError where it does not exist."""
    try:
        return Path(os.path.realpath(path, strict=True))
    except (OSError, ValueError) as error:
        raise ReftConfigError(f"There is no directory {str(path)!r}.") from error


def _from_hub(name: str, largest: int | None = None) -> Path:
    try:
        return _real(find_adapter(name, largest))
    except RunError as error:
        raise ReftConfigError(str(error)) from error
