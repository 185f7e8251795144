"""Checkpoints of pyreft, and of what wraps it (ms-swift, EasySteer): read as our adapters.

Formulas are compared by what they compute, not by name: see `CLASSES`. A rotation that is not
orthonormal any more (pyreft loses it in a resumed training) becomes the unconstrained method with
the same formula.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reftune.convert.adapter import (
    Adapter,
    Answers,
    Base,
    build_config,
    head_modules,
    one_shape,
    require,
    split_trained_weights,
    stack,
    verify,
)
from reftune.convert.foreign import State, materialise_orthogonal, matrix, read_json, read_tensors
from reftune.convert.keys import RECORD, Slot, by_module, find_slots, is_layer
from reftune.errors import ConversionError
from reftune.interventions import METHODS

# The published code's class -> our method. Its Direft is not the paper's DiReFT; its Nodireft is.
CLASSES = {
    "LoreftIntervention": "loreft",
    "NoreftIntervention": "noreft",
    "ConsreftIntervention": "consreft",
    "LobireftIntervention": "lobireft",
    "DireftIntervention": "direft_orthonormal",
    "NodireftIntervention": "direft",
    "BiasIntervention": "red",  # EasySteer's own: h + b
}
ORTHONORMAL_TO = 1e-5  # a loaded R within this is used as it is (interventions.py)
_UNCONSTRAINED = {
    "loreft": "noreft",
    "consreft": "noreft",
    "direft_orthonormal": "direft",
    "lobireft": "direft",
}
_LOOK_ALIKE = ("consreft", "noreft")  # without a class's name, to be asked for
_TRAINER_FOLDER = "intervenable_model"
_BASE_WEIGHTS = "pytorch_model.bin"


@dataclass(frozen=True)
class Found:
    """What a directory says: its files, the configs beside them, and which library wrote it."""

    directory: Path
    config: Mapping[str, Any]
    origin: str
    settings: Mapping[str, Any]  # more fields of our config that it records


def locate(source: Path) -> Found | None:
    """Return what a directory of pyreft's kind says, or None where it is of another kind.

    Raises ConversionError for a config that cannot be read.
    """
    for directory in (source, source / _TRAINER_FOLDER, source / "reft"):
        if not any(directory.glob("intkey_*.bin")):
            continue
        if (directory / "adapter_config.json").is_file():
            return _swift(directory)
        names = ("config.json", "reft_config.json")
        files = [directory / name for name in names if (directory / name).is_file()]
        config = read_json(files[0]) if files else {}
        record = directory / RECORD
        settings = read_json(record) if record.is_file() else {}
        origin = "pyreft" if files else "a Trainer checkpoint of pyreft"
        return Found(directory, config, origin, settings)
    return None


def read_pyreft(found: Found, answers: Answers) -> Adapter:
    """Read a checkpoint. Raises ConversionError, with the flags to give where it says too little.

    `all` positions are those of a training without unit_locations: completions are edited, too.
    """
    answers = _with_recorded(answers, found.settings)
    slots = find_slots(found.directory, found.config)
    states = {slot.file: read_tensors(slot.file) for slot in slots}
    methods = {_method(slot, states[slot.file], answers) for slot in slots}
    _require_all(found, methods, answers)
    assert answers.base is not None
    assert answers.positions is not None
    if len(methods) != 1:
        raise ConversionError(
            f"The interventions are of different kinds ({', '.join(sorted(map(str, methods)))}); "
            "an adapter has one method. Convert each kind by itself."
        )
    method = methods.pop()
    assert method is not None
    base = Base(answers.base, answers)
    act_fn = None if answers.act_fn in (None, "linear", "none") else answers.act_fn
    method, phis, notes = _phis(method, by_module(slots, base), states, act_fn)
    width, rank = one_shape(phis)
    trained = _trained_weights(found.directory, base, answers)
    groups = len(next(iter(phis.values()))["bias"])
    if groups == 2 and not _has_two_sides(answers.positions):
        raise ConversionError(
            "Each layer has two interventions, one for the prefix and one for the suffix; "
            f"positions {answers.positions!r} name one of them only. Give --positions such as "
            "f7+l7."
        )
    settings: dict[str, Any] = {
        "method": method,
        "r": rank,
        "positions": answers.positions,
        "tied": "sides" if groups == 2 else "all",
        "act_fn": act_fn if METHODS[method].has_activation else None,
        "dropout": answers.dropout or 0.0,
        "dropout_on": "output",
        "short_prompts": found.settings.get("short_prompts", "pyreft"),
        # Without locations pyreft edits the completion's tokens in training, too.
        "edit_generated": bool(found.settings.get("edit_generated", answers.positions == "all")),
        "task_type": base.task_type,
        "base_model_name_or_path": base.name,
        "modules_to_save": head_modules(trained["saved"]),
    }
    return _assemble(settings, phis, base, width, trained, notes)


def _assemble(
    settings: dict[str, Any],
    phis: dict[str, dict[str, Tensor]],
    base: Base,
    width: int,
    trained: dict[str, Any],
    notes: list[str],
) -> Adapter:
    """Name the edited modules as the config does, and have the base model say that it has them."""
    layers = [is_layer(path, base) for path in phis]
    lists = {layer[0] for layer in layers if layer is not None}
    if None not in layers and len(lists) == 1:
        settings["layers"] = sorted(layer[1] for layer in layers if layer is not None)
        settings["layers_path"] = lists.pop()
    else:
        settings["target_modules"] = sorted(phis)
    config = build_config(**settings)
    paths = base.paths(config, width)
    if set(paths) != set(phis):
        raise ConversionError(
            f"The checkpoint edits {sorted(phis)}; in {base.name!r} that would be {sorted(paths)}."
        )
    found = Adapter(config, {path: phis[path] for path in paths}, notes=notes, **trained)
    return verify(found, width)


def _method(slot: Slot, state: State, answers: Answers) -> str | None:
    """Return the method of an intervention, or None where it has to be asked for."""
    fitting = _fitting(state)
    if not fitting:
        raise ConversionError(
            f"{slot.file} holds {sorted(state)}, which is none of pyreft's interventions "
            f"({', '.join(CLASSES)})."
        )
    if slot.intervention is not None:
        method = CLASSES.get(slot.intervention)
        if method is None:
            raise ConversionError(
                f"The checkpoint has interventions of class {slot.intervention!r}; converted are "
                f"{', '.join(CLASSES)}."
            )
    else:
        method = answers.method or (None if fitting[0] in _LOOK_ALIKE else fitting[0])
    if answers.method not in (None, method) or (method is not None and method not in fitting):
        said = f"the config names {slot.intervention}" if slot.intervention else "asked for"
        raise ConversionError(
            f"{slot.file.name} has the tensors of {' or '.join(fitting)}, and not of "
            f"{answers.method or method} ({said})."
        )
    return method


def _fitting(state: State) -> list[str]:
    """Return the methods that keep such tensors, the one that pyreft means first."""
    rotated = any(key.startswith("rotate_layer") for key in state)
    if rotated and "weight" in state:
        return ["loreft", "direft_orthonormal"]  # the latter in EasySteer
    if rotated and "learned_source.weight" in state:
        return ["direft_orthonormal", "loreft"]
    if rotated and "learned_source" in state:
        return ["consreft", "lobireft"]
    if "proj_layer.weight" in state:
        return ["noreft", "direft"]
    return ["red"] if set(state) == {"bias"} else []


def _require_all(found: Found, methods: set[str | None], answers: Answers) -> None:
    missing: dict[str, str] = {}
    if answers.base is None:
        missing["base"] = "the base model, a directory or a Hub name"
    if answers.positions is None:
        missing["positions"] = (
            "which prompt tokens were edited, as in training: f7+l7 (pyreft's `position`), f3, l1, "
            "all (no unit_locations given)"
        )
    has_activation = any(m is not None and METHODS[m].has_activation for m in methods)
    if answers.act_fn is None and (has_activation or None in methods):
        missing["act_fn"] = "the act_fn given to the interventions, or linear if there was none"
    if None in methods:
        missing["method"] = (
            "which of two formulas, whose tensors look alike: noreft (NoreftIntervention) or "
            "direft (Nodireft), consreft or lobireft"
        )
    if missing:
        require(f"{found.origin.capitalize()} at {found.directory}", **missing)


def _phis(
    method: str,
    modules: Mapping[str, Sequence[Slot]],
    states: Mapping[Path, State],
    act_fn: str | None,
) -> tuple[str, dict[str, dict[str, Tensor]], list[str]]:
    """Return the method, the parameters by module, and what is to be noted."""
    groups = {
        path: [_parameters(method, states[slot.file], slot.file, act_fn) for slot in slots]
        for path, slots in modules.items()
    }
    every = [phi for own in groups.values() for phi in own]
    if method not in _UNCONSTRAINED:
        return method, {path: stack(own, path) for path, own in groups.items()}, []
    if all(not phi["R"].any() for phi in every):
        raise ConversionError(
            "Every R is zero, so the checkpoint does nothing: weight decay erases a torch "
            "orthogonal parametrization in one step. Convert a checkpoint trained without it."
        )
    error = max(_off_orthonormal(phi["R"]) for phi in every)
    if error <= ORTHONORMAL_TO:
        return method, {path: stack(own, path) for path, own in groups.items()}, []
    free = _UNCONSTRAINED[method]
    for phi in every:
        phi.setdefault("W", torch.zeros_like(phi["R"]))
    note = (
        f"The rows of R are not orthonormal (by {error:.1e}; pyreft loses that when it resumes, or "
        f"in half precision), so the adapter has method {free}, with the same formula."
    )
    return free, {path: stack(own, path) for path, own in groups.items()}, [note]


def _parameters(method: str, state: State, file: Path, act_fn: str | None) -> dict[str, Tensor]:
    """Return one Phi's parameters under our names, without the dimension of groups."""
    if method == "red":
        bias = matrix(state, "bias", file, dims=1)
        return {"scale": torch.ones_like(bias), "bias": bias}
    if "proj_layer.weight" in state:
        phi = {
            "R": matrix(state, "proj_layer.weight", file),
            "W": matrix(state, "learned_source.weight", file),
            "bias": matrix(state, "learned_source.bias", file, dims=1),
        }
        if method == "noreft" and "proj_layer.bias" in state:
            phi["bias"] = _folded(
                phi["bias"], matrix(state, "proj_layer.bias", file, dims=1), act_fn
            )
    elif "learned_source" in state:
        phi = {"R": _rotation(state, file), "bias": matrix(state, "learned_source", file, dims=1)}
    else:
        prefix = "learned_source." if "learned_source.weight" in state else ""
        phi = {
            "R": _rotation(state, file),
            "W": matrix(state, f"{prefix}weight", file),
            "bias": matrix(state, f"{prefix}bias", file, dims=1),
        }
    _check_shapes(phi, file)
    return phi


def _folded(bias: Tensor, subtracted: Tensor, act_fn: str | None) -> Tensor:
    """h + R^T (W h + b - (R h + c)) is NoReFT with the bias b - c."""
    if act_fn is not None and subtracted.any():
        raise ConversionError(
            f"NoreftIntervention with add_bias=True and act_fn={act_fn!r} subtracts a bias behind "
            "the activation, which reftune's methods do not have."
        )
    return bias if act_fn is not None else bias - subtracted


def _rotation(state: State, file: Path) -> Tensor:
    """Return R (r, d); pyreft keeps its transpose, or what torch's parametrization keeps."""
    if "rotate_layer" in state:
        return matrix(state, "rotate_layer", file).mT
    prefix = "rotate_layer.parametrizations.weight"
    base = f"{prefix}.0.base"
    original = matrix(state, f"{prefix}.original", file)
    square = matrix(state, base, file) if base in state else None
    return materialise_orthogonal(original, square).mT


def _check_shapes(phi: Mapping[str, Tensor], file: Path) -> None:
    rank, width = phi["R"].shape
    expected = {"R": (rank, width), "W": (rank, width), "bias": (rank,)}
    wrong = {n: tuple(t.shape) for n, t in phi.items() if tuple(t.shape) != expected[n]}
    if wrong or rank > width:
        raise ConversionError(
            f"{file} has a rotation of {rank} rows and width {width}, which does not go with "
            f"{wrong or 'a rank above the width'}."
        )


def _off_orthonormal(R: Tensor) -> float:
    gram = R.double() @ R.double().mT
    return (gram - torch.eye(len(gram), dtype=gram.dtype)).abs().max().item()


def _trained_weights(directory: Path, base: Base, answers: Answers) -> dict[str, Any]:
    file = directory / _BASE_WEIGHTS
    if not file.is_file():
        return {"saved": {}}
    return split_trained_weights(read_tensors(file), base, answers)


def _has_two_sides(positions: str) -> bool:
    return "f" in positions and "l" in positions and "+" in positions


def _with_recorded(answers: Answers, settings: Mapping[str, Any]) -> Answers:
    """Fill in what the directory does record; what the user says goes first."""
    names = ("base", "positions", "act_fn", "dropout", "task_type")
    unsaid = {n: settings[n] for n in names if n in settings and vars(answers)[n] is None}
    return replace(answers, **unsaid)


def _swift(directory: Path) -> Found:
    """ms-swift: pyreft's files, and a config of its own that has what pyreft leaves out.

    It gives pyreft no locations, so that every token is edited, completions included.
    """
    config = read_json(directory / "adapter_config.json")
    if config.get("swift_type") not in ("REFT", "reft"):
        raise ConversionError(
            f"{directory} has pyreft's files beside an adapter_config.json that is not ms-swift's "
            "(no swift_type REFT)."
        )
    args = config.get("args") or {}
    settings: dict[str, Any] = {
        "positions": "all",
        "edit_generated": True,
        "act_fn": args.get("act_fn") or "linear",
        "dropout": args.get("dropout") or 0.0,
    }
    for name in ("args.json", "../args.json", "../../args.json"):
        if (directory / name).is_file():
            model = read_json(directory / name).get("model")
            settings |= {"base": model} if isinstance(model, str) else {}
            break
    files = sorted(directory.glob("intkey_*.bin"))
    names = [config.get("intervention_type")] * len(files)
    keys = [f.name.removeprefix("intkey_").removesuffix(".bin") for f in files]
    return Found(
        directory, {"sorted_keys": keys, "intervention_types": names}, "ms-swift", settings
    )
