"""How a run writes: adapters, directories and texts are whole, or as they were before."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from reftune.distributed import is_sharded, processes, trained_state
from reftune.encoder import save_classifier_config
from reftune.methods import save_weights, weights_of


def save_adapter(model: Any, directory: Path, base: str, revision: str | None = None) -> None:
    """Save what was trained so that the directory is whole or as it was before.

    Of several processes the first one writes; all have to come here if they share the model.
    """
    state = trained_state(model) if is_sharded(model) else None
    if not processes().is_main:
        return
    part = directory.with_name(f".{directory.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    if weights_of(model) is not None:
        save_weights(model, part, base)
    else:
        # Until now it names the directory that the base was loaded from.
        config = model.peft_config["default"]
        config.base_model_name_or_path = base
        config.revision = revision or config.revision
        # Embeddings are never trained here; to find that out PEFT would ask the Hub for the base.
        model.save_pretrained(str(part), save_embedding_layers=False, state_dict=state)
    save_classifier_config(model, part)
    replace_directory(part, directory)


def replace_directory(new: Path, directory: Path) -> None:
    """Put a finished directory in the place of another."""
    old = _aside(directory)
    os.replace(new, directory)
    shutil.rmtree(old, ignore_errors=True)


def discard_directory(directory: Path) -> None:
    """Remove a directory; one that is half removed does not bear its name."""
    shutil.rmtree(_aside(directory))


def _aside(directory: Path) -> Path:
    """Give a directory that is to go another name, and return that."""
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        os.replace(directory, old)
    return old


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
