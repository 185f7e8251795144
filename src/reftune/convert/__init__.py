"""Adapters of other ReFT libraries as reftune's, and back.

Read are pyreft (saved directories and Trainer checkpoints), adapters, ms-swift and EasySteer;
written are pyreft's format and EasySteer's specification. What a checkpoint does not record is
asked for; what a format cannot express is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from reftune.convert.adapter import (
    LORA,
    Adapter,
    Answers,
    read_adapter,
    write_adapter,
    write_directory,
)
from reftune.convert.adapters import is_adapters, read_adapters
from reftune.convert.easysteer import (
    SPEC,
    check_easysteer_has_words,
    easysteer_notes,
    write_easysteer,
)
from reftune.convert.pyreft import locate, read_pyreft
from reftune.convert.pyreft_out import check_pyreft_has_words, pyreft_notes, write_pyreft
from reftune.errors import ConversionError, did_you_mean

FORMATS: Final = ("reftune", "pyreft", "easysteer")

__all__ = ["FORMATS", "Answers", "Conversion", "convert"]


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        source: which library wrote what was read.
        directory: what was written.
        adapter: its config and tensors.
        notes: what its user should know, a sentence each.
    """

    source: str
    directory: Path
    adapter: Adapter
    notes: tuple[str, ...]


def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: str = "reftune",
    answers: Answers | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Convert the checkpoint in directory `source` to format `to` in a new directory `out`.

    The source's library is told by its files. `answers` is what they do not record. Nothing is
    left of a conversion that fails.

    Raises:
        ConversionError: the checkpoint cannot be read, says too little (the message names what to
            give), or cannot be expressed in the format; or `out` exists and not `overwrite`.
    """
    if to not in FORMATS:
        raise ConversionError(
            f"to is {to!r}; accepted are {', '.join(FORMATS)}.{did_you_mean(to, list(FORMATS))}"
        )
    target = Path(out).expanduser()
    if target.exists() and not overwrite:
        raise ConversionError(f"{target} exists already. Give another name, or --overwrite.")
    _check_replaceable(target, Path(source).expanduser())
    name, adapter = read(source, answers or Answers())
    notes = list(adapter.notes)
    if to == "pyreft":
        check_pyreft_has_words(adapter)
        notes += pyreft_notes(adapter)
        write_directory(target, lambda d: write_pyreft(adapter, d), overwrite=overwrite)
    elif to == "easysteer":
        check_easysteer_has_words(adapter)
        notes += easysteer_notes(adapter)
        write_directory(target, lambda d: write_easysteer(adapter, d), overwrite=overwrite)
    else:
        card = _card(adapter, name)
        write_directory(target, lambda d: write_adapter(adapter, d, card), overwrite=overwrite)
    if adapter.lora_config is not None and to == "reftune":
        notes.append(f"The LoRA beside it is an adapter of its own: {target / LORA}.")
    return Conversion(name, target, adapter, tuple(notes))


def _check_replaceable(target: Path, source: Path) -> None:
    """Raise ConversionError where a directory in the way is more than a conversion's."""
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not any(any(target.glob(mark)) for mark in ("adapter_config.json", "intkey_*.bin", SPEC)):
        raise ConversionError(
            f"{target} holds no adapter, so it is not replaced. Name a new directory in it: "
            f"{target / source.name}."
        )
    if source.resolve().is_relative_to(target.resolve()):
        raise ConversionError(
            f"{source} is in {target}, which would be replaced. Give another name."
        )


def read(source: str | Path, answers: Answers) -> tuple[str, Adapter]:
    """Return which library wrote the checkpoint in a directory, and the adapter in it.

    Raises ConversionError.
    """
    directory = Path(source).expanduser()
    if not directory.is_dir():
        raise ConversionError(f"{directory} is no directory. Convert a downloaded checkpoint.")
    found = locate(directory)
    if found is not None:
        return found.origin, read_pyreft(found, answers)
    if is_adapters(directory):
        return "adapters", read_adapters(directory, answers)
    inner = directory / "adapter"
    if any((d / "adapter_config.json").is_file() for d in (directory, inner)):
        return "reftune", read_adapter(directory)
    inside = ", ".join(sorted(p.name for p in directory.iterdir())[:8]) or "nothing"
    raise ConversionError(
        f"{directory} holds {inside}, which is no checkpoint of pyreft (intkey_*.bin, or "
        "intervenable_model/ with them), adapters (pytorch_adapter.bin, adapter.safetensors), "
        "ms-swift (reft/), EasySteer (intkey_*.bin), or reftune (adapter_config.json)."
    )


def _card(adapter: Adapter, source: str) -> str:
    config = adapter.config
    return f"""---
library_name: peft
base_model: {config.base_model_name_or_path}
tags: [reft, reftune]
---

# Converted from {source}

A representation finetuning (ReFT) adapter for `{config.base_model_name_or_path}`: method
`{config.method}`, rank {config.r}, positions `{config.positions}`, tied `{config.tied}`.

```python
import reftune  # registers ReFT with PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/directory")
```
"""
