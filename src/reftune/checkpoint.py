"""Does a checkpoint fit its config and the model? Asked before the model is touched.

PEFT loads what matches and reports the rest; a ReFT with a missing tensor computes another
function, so here it is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor, nn

from reftune.config import ReftConfig
from reftune.errors import AdapterMismatchError
from reftune.layer import ReftLayer
from reftune.orthonormal import is_orthonormal, rows_of
from reftune.recompute import plain_name

WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"  # an old PEFT's; it is checked when PEFT has read it
_PREFIX = "base_model.model."
_MARK = ".reft.reft_phi."

Shapes = Mapping[str, tuple[int, ...]]
T = TypeVar("T")


def check_before_injection(config: ReftConfig, targets: Mapping[str, int]) -> None:
    """Check the weights beside a config that was loaded from a directory; nothing otherwise.

    Raises AdapterMismatchError.
    """
    path = config.checkpoint
    if path is None or (path / PICKLED).is_file():
        return
    if not (path / WEIGHTS).is_file():
        raise AdapterMismatchError(
            f"{path} has an adapter_config.json and no {WEIGHTS}. Copy or download the adapter "
            "again. (For a fresh adapter with this config: dataclasses.replace(config).)"
        )
    tensors: dict[str, Tensor] = _from_file(path / WEIGHTS, lambda file, key: file.get_tensor(key))
    check_shapes(config, targets, tensors, str(path / WEIGHTS))
    check_values(tensors, str(path / WEIGHTS), config.intervention.orthonormal)


def check_shapes(
    config: ReftConfig, targets: Mapping[str, int], tensors: Mapping[str, Tensor], what: str
) -> None:
    """Check that the tensors of a checkpoint are those of its config, by their shapes alone.

    Keys are without PEFT's prefix, `targets` the widths of the layers that are edited by their
    names, `what` the file's name for an error. Raises AdapterMismatchError.
    """
    expected: dict[str, tuple[int, ...]] = {}
    for width in set(targets.values()):
        shapes = {k: tuple(p.shape) for k, p in config.formula(width).named_parameters()}
        for name in (n for n, w in targets.items() if w == width):
            expected |= {f"{name}{_MARK}{k}": shape for k, shape in shapes.items()}
    _compare(expected, {k: tuple(t.shape) for k, t in tensors.items() if _MARK in k}, what)


def check_state_dict(
    model: nn.Module, config: ReftConfig, adapter_name: str, state_dict: Mapping[str, Tensor]
) -> None:
    """Check a state dict with the model's key names. Raises AdapterMismatchError."""
    expected = {
        f"{plain_name(layer_name)}.reft_phi.{adapter_name}.{k}": tuple(p.shape)
        for layer_name, layer in model.named_modules()
        if isinstance(layer, ReftLayer) and adapter_name in layer.reft_phi
        for k, p in layer.reft_phi[adapter_name].named_parameters()
    }
    found = {plain_name(k): tuple(t.shape) for k, t in state_dict.items() if _MARK in k}
    _compare(_without_prefix(expected), _without_prefix(found), f"adapter {adapter_name!r}")
    own = {k: rows_of(t).cpu() for k, t in state_dict.items()}  # of a sharded one, what is here
    check_values(own, f"adapter {adapter_name!r}", config.intervention.orthonormal)


def check_values(tensors: Mapping[str, Tensor], what: str, orthonormal: bool) -> None:
    """Check that values are finite and, where R is `orthonormal`, its rows independent.

    Raises AdapterMismatchError.
    """
    for key, tensor in tensors.items():
        name = f"{what}: {key.removeprefix(_PREFIX)}"
        if not tensor.is_floating_point():
            if _MARK not in key:
                continue  # of a module that is saved beside the edits: a counter of BatchNorm
            raise AdapterMismatchError(f"{name} has dtype {tensor.dtype}, not a floating one.")
        # A sum that is finite takes a sixth of the time; one that overflows says nothing.
        if not (tensor.sum().isfinite() or tensor.isfinite().all()):
            raise AdapterMismatchError(
                f"{name} has values that are not finite. The training diverged: load an earlier "
                "checkpoint."
            )
        is_R = orthonormal and _MARK in key and key.split(".")[-1] == "R" and tensor.numel()
        if is_R and not is_orthonormal(tensor):
            rows = tensor.double()
            if torch.linalg.eigvalsh(rows @ rows.mT).min() < 1e-6:
                raise AdapterMismatchError(f"{name} has rows that are zero or depend on another.")


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes in a safetensors file, from its header alone, without PEFT's key prefix.

    Raises AdapterMismatchError where the file is no safetensors or is truncated.
    """
    return _from_file(path, lambda file, key: tuple(file.get_slice(key).get_shape()))


def parse_tensors(data: bytes, path: Path) -> dict[str, Tensor]:
    """Return the tensors in the bytes of a safetensors file, without PEFT's key prefix.

    `path` is where they were read, for an error. Raises AdapterMismatchError as `read_shapes`.
    """
    try:
        return _without_prefix(load(data))
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:  # or of a strange dtype
        raise _unreadable(path, error) from error


def _from_file(path: Path, get: Callable[[Any, str], T]) -> dict[str, T]:
    try:
        with safe_open(path, framework="pt") as file:
            found = {key: get(file, key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error
    return _without_prefix(found)


def _unreadable(path: Path, error: Exception) -> AdapterMismatchError:
    return AdapterMismatchError(
        f"{path} cannot be read as safetensors ({error}). It may be truncated: copy or download "
        "it again."
    )


def _without_prefix(named: Mapping[str, T]) -> dict[str, T]:
    return {key.removeprefix(_PREFIX): value for key, value in named.items()}


def _compare(expected: Shapes, found: Shapes, what: str) -> None:
    problems = [
        f"missing {_some(sorted(set(expected) - set(found)))}"
        if set(expected) - set(found)
        else "",
        f"too many {_some(sorted(set(found) - set(expected)))}"
        if set(found) - set(expected)
        else "",
    ]
    for key in sorted(set(expected) & set(found)):
        if expected[key] != found[key]:
            problems.append(
                f"{key} has shape {found[key]}, this model and config need {expected[key]}"
                + _width_hint(expected[key], found[key])
            )
            break
    problems = [p for p in problems if p]
    if problems:
        raise AdapterMismatchError(
            f"{what} does not fit: {'; '.join(problems)}. The model was not changed. Load the "
            "adapter on the base model it was trained for, with the adapter_config.json it was "
            "saved with."
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"tensors {shown}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _width_hint(expected: tuple[int, ...], found: tuple[int, ...]) -> str:
    if len(expected) == len(found) and expected[:-1] == found[:-1]:
        return f": it was trained on a model of width {found[-1]}, this one has {expected[-1]}"
    return ""
