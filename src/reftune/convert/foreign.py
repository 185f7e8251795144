"""Reading files of other libraries: tensors and JSON, and nothing that could run.

A torch pickle is read with `weights_only=True`: anything in it but tensors and containers is an
error, before any of it is executed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from reftune.errors import ConversionError

State = Mapping[str, Tensor]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ConversionError where the file is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ConversionError(
            f"{path} cannot be read as JSON ({error}). Copy or download it again."
        ) from error
    if not isinstance(value, dict):
        raise ConversionError(f"{path} holds a {type(value).__name__}; expected is a JSON object.")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read named tensors from a safetensors file or a torch pickle.

    Raises ConversionError where the file is truncated, holds anything but named tensors, or a
    tensor whose shape claims more numbers than the file has.
    """
    state = _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise ConversionError(f"{path}: {name!r} is no plain dense tensor.")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ConversionError(
                f"{path}: {name!r} claims shape {tuple(tensor.shape)}, which is more than the file "
                "holds."
            )
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ConversionError(
                f"{path}: {name!r} has values that are not finite. The training diverged: convert "
                "an earlier checkpoint."
            )
    return state


def matrix(state: State, key: str, path: Path, *, dims: int = 2) -> Tensor:
    """Return a tensor of a state dict in float32. Raises ConversionError where it is not there."""
    tensor = state.get(key)
    if tensor is None:
        raise ConversionError(f"{path} has no {key!r}; it has {sorted(state)}.")
    if tensor.dim() != dims or not tensor.is_floating_point():
        raise ConversionError(
            f"{path}: {key!r} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}; expected "
            f"are {dims} dimension(s) of floating-point numbers."
        )
    return tensor.detach().float()


def materialise_orthogonal(original: Tensor, base: Tensor | None) -> Tensor:
    """Return the matrix behind a parameter of torch's `parametrizations.orthogonal`.

    Args:
        original: what is trained, (n, k). Wide ones (n < k) are worked on transposed.
        base: the square orthogonal matrix that the trivialised form keeps, or None.
    """
    X = original.detach().double()
    wide = X.shape[0] < X.shape[1]
    X = X.mT if wide else X
    lower = X.tril(-1)
    if X.shape[0] == X.shape[1]:
        lower = X.tril()
        Q = torch.matrix_exp(lower - lower.mT)
    else:
        tau = 2.0 / (1.0 + (lower * lower).sum(-2))
        # torch casts the diagonal to int: a decayed -0.99 counts as 0, and erases its column.
        Q = torch.linalg.householder_product(lower, tau) * X.diagonal().int()
    if base is not None:
        if base.shape != (Q.shape[0], Q.shape[0]):
            raise ConversionError(
                f"The `base` of an orthogonal matrix has shape {tuple(base.shape)}; expected is "
                f"{(Q.shape[0], Q.shape[0])}."
            )
        Q = base.double() @ Q
    return (Q.mT if wide else Q).float()


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConversionError(
            f"{path} cannot be read as safetensors ({error}). It may be truncated: copy or "
            "download it again."
        ) from error


def _pickled(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken archive fails in many ways, each with its own class
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConversionError(
            f"{path} cannot be read as torch tensors: it is truncated, or holds something other "
            f"than tensors. Nothing in it was run. ({type(error).__name__}: {reason})"
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    ):
        raise ConversionError(
            f"{path} holds a {type(state).__name__}; expected are tensors by name, as "
            "torch.save(module.state_dict()) writes them."
        )
    return dict(state)
