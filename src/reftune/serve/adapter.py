"""An adapter directory as a server sees it: checked against the model, without building the model.

What the HF tuner checks when it loads an adapter is checked here by the same function.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

from torch import Tensor

from reftune.checkpoint import WEIGHTS, check_shapes
from reftune.config import ReftConfig
from reftune.errors import AdapterMismatchError, ReftConfigError

CONFIG = "adapter_config.json"
_KEY = re.compile(r"(?P<path>.+)\.(?P<layer>\d+)\.reft\.reft_phi\.(?P<name>\w+)")


@final
@dataclass(frozen=True)
class ModelShape:
    """What an adapter has to fit."""

    hidden_size: int
    num_layers: int


@final
@dataclass(frozen=True, eq=False)
class Adapter:
    """One immutable version of an adapter: `digest` names its content.

    `layers` are the numbers of the layers it edits.
    """

    digest: str
    directory: Path
    config: ReftConfig
    layers: tuple[int, ...]


def is_reft(path: str) -> bool:
    """Return whether a directory is not known to hold an adapter of another kind (a LoRA)."""
    try:
        text = (Path(path) / CONFIG).read_text(encoding="utf-8")
        return bool(json.loads(text).get("peft_type") == "REFT")
    except (OSError, ValueError, AttributeError):
        return True  # what is wrong with it is said where it is read


def read_config(directory: Path) -> ReftConfig:
    """Return the config of an adapter directory.

    Raises AdapterMismatchError where it cannot be read or is no ReFT, ReftConfigError where it
    asks for what a server cannot do.
    """
    try:
        raw = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        kind = raw.get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise AdapterMismatchError(
            f"{directory / CONFIG} cannot be read ({error}). An adapter is a directory with an "
            f"{CONFIG} and an {WEIGHTS}, as save_pretrained writes it."
        ) from error
    if kind != "REFT":
        raise AdapterMismatchError(
            f"{directory} holds an adapter of type {kind!r}; served here are those of type 'REFT'."
        )
    try:
        config = ReftConfig.from_pretrained(str(directory))
    except (TypeError, KeyError) as error:
        raise AdapterMismatchError(f"{directory / CONFIG} is no ReFT config: {error}") from error
    for name in ("target_modules", "modules_to_save"):
        if getattr(config, name) is not None:
            raise ReftConfigError(
                f"{name} is {getattr(config, name)!r}; a server edits the outputs of decoder "
                "layers and nothing else. Use the adapter with transformers."
            )
    return config


def read_adapter(
    directory: Path, digest: str, model: ModelShape, tensors: Mapping[str, Tensor], source: Path
) -> Adapter:
    """Return the adapter of a config in a directory and of tensors, if they fit the model.

    Values are not looked at. `source` is the file that the tensors were read from. Raises
    AdapterMismatchError or ReftConfigError.
    """
    config = read_config(directory)
    keys = [_KEY.fullmatch(key) for key in tensors]
    paths = sorted({match["path"] for match in keys if match})
    if len(paths) != 1 or None in keys:
        raise AdapterMismatchError(
            f"{source} has tensors that are no edit of a decoder layer, or of more "
            f"than one stack of layers ({', '.join(paths) or 'none'})."
        )
    every = range(model.num_layers)
    layers = tuple(every) if config.layers == "all" else tuple(int(i) for i in config.layers)
    for layer in layers:
        if layer not in every:
            raise AdapterMismatchError(
                f"The adapter edits layer {layer}; the model has layers 0 to {model.num_layers - 1}"
                ". Serve it on the base model it was trained for."
            )
    widths = {f"{paths[0]}.{i}": model.hidden_size for i in layers}
    check_shapes(config, widths, tensors, str(source))
    return Adapter(digest, directory, config, layers)


def layer_and_name(key: str) -> tuple[int, str]:
    """Return the number of the layer and the parameter's name in a checked checkpoint's key."""
    match = _KEY.fullmatch(key)
    assert match is not None
    return int(match["layer"]), match["name"]
