"""An adapter's parameters as the engine computes with them: made once, then mapped.

To put R on its manifold and to pad ranks takes a good part of a decoding step. So the front end
does it, when it reads an adapter, and writes the result beside the adapter's config; a worker maps
that file.

Shape suffixes: L edited layer, G group; the rest is the method's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from reftune.config import ReftConfig
from reftune.orthonormal import is_orthonormal, orthonormalise
from reftune.serve.adapter import layer_and_name

PARAMETERS = "parameters.safetensors"
LAYERS = "layers"  # the name of the tensor with the layers' numbers


def padded_rank(config: ReftConfig) -> int:
    """Return the power of two that adapters of this rank are computed with."""
    return 1 << max((config.r or 1) - 1, 0).bit_length()


def write_parameters(
    directory: Path, config: ReftConfig, hidden_size: int, tensors: Mapping[str, Tensor]
) -> None:
    """Write the parameters of a checkpoint that was checked, R on its manifold as the tuner has it.

    Ranks are padded with zeros: a row of R that is zero edits nothing.
    """
    rank, padded = config.r or 1, padded_rank(config)
    shapes = {name: p.shape for name, p in config.build(hidden_size).named_parameters()}
    by_layer: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, name = layer_and_name(key)
        by_layer.setdefault(layer, {})[name] = tensor
    found = {}
    for name, (groups, *rest) in shapes.items():
        if config.r is not None:
            rest[0] = padded
        value = torch.zeros(len(by_layer), groups, *rest, dtype=getattr(torch, config.dtype))
        for i, layer in enumerate(sorted(by_layer)):
            value[i, :, : shapes[name][1]] = by_layer[layer][name]
        found[name] = value
    if config.intervention.orthonormal:
        for R in found["R"][:, :, :rank]:
            if not is_orthonormal(R):
                R.copy_(orthonormalise(R))
    save_file({LAYERS: torch.tensor(sorted(by_layer)), **found}, directory / PARAMETERS)


def read_parameters(directory: Path) -> tuple[tuple[int, ...], Mapping[str, Tensor]]:
    """Return the numbers of a version's layers, and its parameters (L, G, ...), mapped, by name."""
    with safe_open(directory / PARAMETERS, framework="pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    return tuple(found.pop(LAYERS).tolist()), found
