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
from torch import Tensor

from reftune.checkpoint import check_values
from reftune.config import ReftConfig
from reftune.orthonormal import is_orthonormal, orthonormalise
from reftune.serve.adapter import layer_and_name

PARAMETERS = "parameters.safetensors"
LAYERS = "layers"  # the name of the tensor with the layers' numbers


def padded_rank(config: ReftConfig) -> int:
    """Return the power of two that adapters of this rank are computed with."""
    return 1 << max((config.r or 1) - 1, 0).bit_length()


def make_parameters(
    config: ReftConfig, hidden_size: int, tensors: Mapping[str, Tensor], source: Path
) -> dict[str, Tensor]:
    """Return the parameters of a checkpoint whose shapes were checked, and LAYERS.

    R is put on its manifold where it is off it, by the tuner's rule. Ranks are padded with zeros: a
    row of R that is zero edits nothing. Raises AdapterMismatchError where values are unsound.
    """
    orthonormal, padded = config.intervention.orthonormal, padded_rank(config)
    by_layer: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, name = layer_and_name(key)
        by_layer.setdefault(layer, {})[name] = tensor
    found, own = {}, {}  # own: views of them without the padding
    for name, p in config.formula(hidden_size).named_parameters():
        groups, size, *rest = p.shape
        wide = size if config.r is None else padded
        found[name] = torch.zeros(len(by_layer), groups, wide, *rest, dtype=p.dtype)
        own[name] = found[name][:, :, :size]
        for i, layer in enumerate(sorted(by_layer)):
            own[name][i] = by_layer[layer][name]
    sound = all(t.is_floating_point() for t in tensors.values())
    sound = sound and all(bool(t.sum().isfinite()) for t in own.values())
    if not (sound and (not orthonormal or is_orthonormal(own["R"]))):  # look at each; seldom
        check_values(tensors, str(source), orthonormal)
        for R in own["R"] if orthonormal else ():
            if not is_orthonormal(R):
                R.copy_(orthonormalise(R))
    return {LAYERS: torch.tensor(sorted(by_layer)), **found}


def read_parameters(directory: Path) -> tuple[tuple[int, ...], Mapping[str, Tensor]]:
    """Return the numbers of a version's layers, and its parameters (L, G, ...), mapped, by name."""
    with safe_open(directory / PARAMETERS, framework="pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    return tuple(found.pop(LAYERS).tolist()), found
