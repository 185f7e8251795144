"""Checkpoints of AdapterHub's `adapters`, in both of its formats (torch pickle and safetensors).

Its config says nearly all. What it leaves out is whether R h is subtracted, so that its NoReFT and
its DiReFT look alike. Each intervention also keeps a buffer of d x d, from which R is made.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from reftune.convert.adapter import (
    Adapter,
    Answers,
    Base,
    build_config,
    head_modules,
    one_shape,
    require,
    stack,
    verify,
)
from reftune.convert.foreign import State, materialise_orthogonal, matrix, read_json, read_tensors
from reftune.errors import ConversionError

_WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
_HEADS = ("model_head.safetensors", "pytorch_model_head.bin")
_UNIT = re.compile(r"(.*?)\.?(\d+)\.reft_layer\.refts\.(.+)\.units\.(\d+)\.(.+)")
# its names of activations that transformers has under another
_ACTIVATIONS = {"leakyrelu": "leaky_relu"}


def is_adapters(source: Path) -> bool:
    """Return whether a directory holds a checkpoint of adapters."""
    return any((source / name).is_file() for name in _WEIGHTS)


def read_adapters(directory: Path, answers: Answers) -> Adapter:
    """Read a checkpoint. Raises ConversionError, naming the flags to give if it says too little."""
    stated = read_json(directory / "adapter_config.json")
    config = stated.get("config")
    if not isinstance(config, dict) or config.get("architecture") != "reft":
        kind = config.get("architecture") if isinstance(config, dict) else config
        raise ConversionError(
            f"{directory} holds an adapter of architecture {kind!r}; converted is 'reft'. Of a "
            "union, save the ReFT under a name of its own."
        )
    file = next(directory / name for name in _WEIGHTS if (directory / name).is_file())
    units = _units(read_tensors(file), file)
    method = _method(config, directory, answers)
    name = answers.base or stated.get("model_name")
    if not name:
        require(f"{directory}", base="the base model, a directory or a Hub name")
    base = Base(str(name), answers)
    phis = {
        layer: stack([_parameters(method, u, file) for u in _used(own, config)], f"layer {layer}")
        for layer, own in units.items()
    }
    width, rank = one_shape({str(layer): phi for layer, phi in phis.items()})
    saved, notes = _head(directory, base)
    activation = config.get("non_linearity")
    reft = build_config(
        method=method,
        r=rank,
        layers=sorted(phis),
        layers_path=answers.layers_path,
        positions=_positions(config),
        tied="all" if config.get("tied_weights") else "sides",
        act_fn=_ACTIVATIONS.get(str(activation).lower(), activation),
        dropout=config.get("dropout", 0.0),
        dropout_on="output",
        short_prompts="overlap",
        task_type=base.task_type,
        base_model_name_or_path=base.name,
        modules_to_save=head_modules(saved),
    )
    paths = base.paths(reft, width)
    named = {path: phis[layer] for path, layer in zip(paths, sorted(phis), strict=True)}
    return verify(Adapter(reft, named, saved, notes=notes), width)


def _units(state: State, file: Path) -> dict[int, list[dict[str, Tensor]]]:
    """Return the tensors of the units of each layer. Raises ConversionError."""
    layers: dict[int, dict[int, dict[str, Tensor]]] = {}
    stems, names = set(), set()
    for key, tensor in state.items():
        match = _UNIT.fullmatch(key)
        if match is None:
            raise ConversionError(f"{file} holds {key!r}, which is no tensor of a ReFT.")
        stems.add(match[1])
        names.add(match[3])
        layers.setdefault(int(match[2]), {}).setdefault(int(match[4]), {})[match[5]] = tensor
    if len(stems) != 1 or len(names) != 1:
        raise ConversionError(
            f"{file} has interventions in {sorted(stems) or 'no layers'} of adapters "
            f"{sorted(names)}; converted is one adapter in one list of layers. (adapters edits the "
            "decoder of an encoder-decoder too, whose tokens are generated; reftune edits prompts.)"
        )
    found = {}
    for layer, units in sorted(layers.items()):
        if sorted(units) != list(range(len(units))) or len(units) > 2:
            raise ConversionError(f"{file}: layer {layer} has units {sorted(units)}.")
        found[layer] = [units[i] for i in range(len(units))]
    return found


def _used(units: list[dict[str, Tensor]], config: Mapping[str, Any]) -> list[dict[str, Tensor]]:
    """Return the units that edit something: untied, the first has the prefix alone."""
    sides = [config.get("prefix_positions"), config.get("suffix_positions")]
    if len(units) == 1 or all(sides):
        return units
    return [unit for unit, count in zip(units, sides, strict=True) if count]


def _method(config: Mapping[str, Any], directory: Path, answers: Answers) -> str:
    fitting = (
        ("loreft", "direft_orthonormal") if config.get("orthogonality") else ("noreft", "direft")
    )
    subtracts = config.get("subtract_projection")  # not saved by adapters up to 1.3, at least
    method = answers.method
    if method is None and isinstance(subtracts, bool):
        method = fitting[0] if subtracts else fitting[1]
    if method is None and config.get("orthogonality"):
        method = "loreft"  # the only orthogonal one of its three configs
    if method is None:
        require(f"{directory}", method="noreft for its NoReftConfig or direft for its DiReftConfig")
    if method not in fitting:
        raise ConversionError(
            f"method is {method!r}; with orthogonality={bool(config.get('orthogonality'))} the "
            f"checkpoint has the tensors of {' or '.join(fitting)}."
        )
    assert method is not None
    return method


def _positions(config: Mapping[str, Any]) -> str:
    counts = (("f", config.get("prefix_positions")), ("l", config.get("suffix_positions")))
    parts = [f"{side}{n}" for side, n in counts if n]
    if not parts:
        raise ConversionError("The checkpoint's config has neither prefix nor suffix positions.")
    return "+".join(parts)


def _parameters(method: str, unit: State, file: Path) -> dict[str, Tensor]:
    original = "projection.parametrizations.weight.original"
    square = "projection.parametrizations.weight.0.base"
    if original in unit:
        base = matrix(unit, square, file) if square in unit else None
        R = materialise_orthogonal(matrix(unit, original, file), base)
    else:
        R = matrix(unit, "projection.weight", file)
    phi = {
        "R": R,
        "W": matrix(unit, "learned_source.weight", file),
        "bias": matrix(unit, "learned_source.bias", file, dims=1),
    }
    if phi["W"].shape != R.shape or phi["bias"].shape != R.shape[:1]:
        shapes = {name: tuple(tensor.shape) for name, tensor in phi.items()}
        raise ConversionError(f"{file} has tensors that do not go together: {shapes}.")
    return phi


def _head(directory: Path, base: Base) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights of a prediction head, and a note where it is not converted.

    The head of a language model is the base's own and was not trained.
    """
    file = next((directory / name for name in _HEADS if (directory / name).is_file()), None)
    if file is None or base.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        return {}, []
    state = read_tensors(file)
    known = set() if base.model is None else {name for name, _ in base.model.named_parameters()}
    if state and set(state) <= known:
        return {name: tensor.contiguous() for name, tensor in state.items()}, []
    return {}, [
        f"The prediction head in {file.name} is not converted: it is one of adapters' flexible "
        "heads, or of another class than the base model's. Train a head, or give --task-type."
    ]
