"""Where an adapter is kept: a directory, a run's or the Hub; and what it says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from peft import PeftConfig

from reftune.errors import RunError
from reftune.hub import fetch, is_hub_name
from reftune.methods import WEIGHTS_CONFIG, WEIGHTS_FILE

ADAPTER = "adapter"
CONFIG = "config.yaml"
_MARKS = ("adapter_config.json", WEIGHTS_CONFIG)
# What loading needs of a repository, whatever else is kept in it.
_FILES = (*_MARKS, "adapter_model.*", WEIGHTS_FILE, "config.json", CONFIG)


def adapter_directory(path: str | Path) -> Path | str:
    """Return the adapter in a run's directory, else the path (or Hub name) itself."""
    inside = Path(path) / ADAPTER
    return inside if any((inside / name).is_file() for name in _MARKS) else path


def find_adapter(path: str | Path, largest: int | None = None) -> Path:
    """Return the directory of an adapter; that of a Hub name is downloaded.

    Raises RunError where the Hub has no such adapter, does not give it, or has it in files of more
    than `largest` bytes.
    """
    if not is_hub_name(path):
        return Path(adapter_directory(path))
    found = fetch(str(path), "adapter", _FILES, largest)
    if not any((found / name).is_file() for name in _MARKS):
        raise RunError(
            f"{str(path)!r} is on the Hub and is no adapter: it has no adapter_config.json. The "
            "adapter must be at the top of its repository."
        )
    return found


def template_of(path: str | Path) -> str:
    """Return the template that a run's config (beside its adapter) names, else "auto"."""
    return str(run_config(path).get("data", {}).get("template", "auto"))


def quantization_of(path: str | Path) -> str | None:
    """Return how a run's config (beside its adapter) says that its base was quantised."""
    found = run_config(path).get("quantization")
    return None if found is None else str(found)


def run_config(path: str | Path) -> dict[str, Any]:
    """Return the config in a run's directory, or beside an adapter; {} for none or another's."""
    for folder in (Path(path), Path(path).parent):
        if not (folder / CONFIG).is_file():
            continue
        try:
            values = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            continue
        if isinstance(values, dict) and isinstance(values.get("data"), dict):
            return values
    return {}


def base_of(config: PeftConfig) -> str:
    """Return the base model that an adapter was trained on, NAME or NAME@REVISION, or ""."""
    name = config.base_model_name_or_path or ""
    return f"{name}@{config.revision}" if is_hub_name(name) and config.revision else name
