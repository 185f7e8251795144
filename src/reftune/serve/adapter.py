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

import torch
from safetensors import safe_open
from torch import Tensor

from reftune.checkpoint import WEIGHTS, check_before_injection, read_shapes
from reftune.config import ReftConfig
from reftune.errors import AdapterMismatchError, ReftConfigError
from reftune.interventions import Intervention

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


def read_adapter(directory: Path, digest: str, model: ModelShape) -> Adapter:
    """Return the adapter in a directory after checking that it fits the model.

    Raises AdapterMismatchError or ReftConfigError.
    """
    config = read_config(directory)
    if not (directory / WEIGHTS).is_file():
        raise AdapterMismatchError(
            f"{directory} has an {CONFIG} and no {WEIGHTS}. Only safetensors are served."
        )
    keys = [_KEY.fullmatch(key) for key in read_shapes(directory / WEIGHTS)]
    paths = sorted({match["path"] for match in keys if match})
    if len(paths) != 1 or None in keys:
        raise AdapterMismatchError(
            f"{directory / WEIGHTS} has tensors that are no edit of a decoder layer, or of more "
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
    check_before_injection(config, {f"{paths[0]}.{i}": model.hidden_size for i in layers})
    return Adapter(digest, directory, config, layers)


def load_tensors(
    directory: Path, config: ReftConfig, hidden_size: int
) -> tuple[Intervention, Mapping[int, dict[str, Tensor]]]:
    """Return the method's formula, and the parameters (G, ...) of each layer by its number.

    R is put on its manifold exactly as the tuner does. The formula's own parameters are no one's.
    """
    phi = config.build(hidden_size)
    found: dict[int, dict[str, Tensor]] = {}
    with safe_open(directory / WEIGHTS, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - no mapping
            match = _KEY.fullmatch(key)
            assert match is not None
            found.setdefault(int(match["layer"]), {})[match["name"]] = file.get_tensor(key)
    with torch.no_grad():
        for layer, tensors in found.items():
            phi.load_state_dict(tensors)
            found[layer] = {k: t.detach().clone() for k, t in phi.named_parameters()}
    return phi.requires_grad_(False).eval(), found
