"""The names that pyvene gives to interventions and their files, in its three generations.

    intkey_layer_15_comp_block_output_unit_pos_nunit_1#0.bin    since February 2025
    intkey_layer.15.comp.block_output.unit.pos.nunit.1#0.bin    before
    intkey_layer.15.repr.block_output.unit.pos.nunit.1#0.bin    before January 2024

A component that is named by its path has no `layer`: `comp_model_layers[15]_output_unit_...`, where
since 2025 dots and underscores look alike; the config, if there is one, has the path with its dots.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from reftune.convert.adapter import PEFT_PREFIX, Base
from reftune.errors import ConversionError, LayersNotFoundError
from reftune.layers import find_layer_list

RECORD = "reftune.json"  # beside what we write: what pyreft itself does not record
_FILE = "intkey_*.bin"
_KEY = re.compile(
    r"(?:layer[._](?P<layer>\d+)[._])?(?:comp|repr)[._](?P<component>.+?)[._]unit[._](?P<unit>.+?)"
    r"[._]nunit[._](?P<count>\d+)#(?P<number>\d+)"
)
# pyvene's abstract components that are the output of a child of a layer: the child's usual names
_CHILDREN = {
    "mlp_output": ("mlp", "feed_forward", "ffn"),
    "attention_output": ("self_attn", "attn", "attention", "self_attention"),
}


@dataclass(frozen=True)
class Slot:
    """One intervention: its file, what it edits, its number among those there, and its class."""

    file: Path
    layer: int | None
    component: str
    number: int
    intervention: str | None


def find_slots(directory: Path, config: Mapping[str, Any]) -> list[Slot]:
    """Return the interventions of a directory, in pyreft's order where a config tells it.

    Raises ConversionError where there are none, a file is missing, or a name is unknown.
    """
    files = {f.name.removeprefix("intkey_").removesuffix(".bin"): f for f in directory.glob(_FILE)}
    if not files:
        raise ConversionError(f"{directory} has no {_FILE}, as pyreft writes them.")
    keys = [str(key) for key in config.get("sorted_keys") or []]
    missing = [key for key in keys if key not in files]
    if missing:
        raise ConversionError(
            f"{directory / 'config.json'} names {len(keys)} interventions; there is no file for "
            f"{', '.join(missing[:3])}. Copy or download the directory again."
        )
    classes = [_class_name(text) for text in config.get("intervention_types") or []]
    shown = config.get("representations") or config.get("intervenable_representations") or []
    slots = []
    for i, key in enumerate(keys or sorted(files, key=_natural)):
        match = _KEY.fullmatch(key)
        if match is None or match["unit"] != "pos":
            raise ConversionError(
                f"{files[key].name} is named as no intervention on token positions is: expected is "
                "intkey_layer_15_comp_block_output_unit_pos_nunit_1#0.bin or alike."
            )
        component = match["component"]
        if match["layer"] is None and keys and i < len(shown):
            component = _component(shown[i]) or component
        slots.append(
            Slot(
                file=files[key],
                layer=None if match["layer"] is None else int(match["layer"]),
                component=component,
                number=int(match["number"]),
                intervention=classes[i] if keys and i < len(classes) else None,
            )
        )
    if keys:
        _check_order(slots)
    return slots


def by_module(slots: Sequence[Slot], base: Base) -> dict[str, list[Slot]]:
    """Return the interventions of each edited module, by its path in the base model.

    Raises ConversionError for a component that is no module's output, and where modules have
    different numbers of interventions, or more than two.
    """
    found: dict[str, list[Slot]] = {}
    for slot in slots:
        found.setdefault(_module_path(slot, base), []).append(slot)
    for path, own in found.items():
        own.sort(key=lambda slot: slot.number)
        if [slot.number for slot in own] != list(range(len(own))):
            raise ConversionError(
                f"Of the interventions at {path}, number(s) {[slot.number for slot in own]} are "
                "there; expected are 0, or 0 and 1. Copy or download the directory again."
            )
    counts = {len(own) for own in found.values()}
    if len(counts) != 1 or max(counts) > 2:
        raise ConversionError(
            f"The layers have {sorted(counts)} interventions each; converted are adapters with one "
            "for all positions of a layer, or with one for its prefix and one for its suffix."
        )
    return found


def is_layer(path: str, base: Base) -> tuple[str, int] | None:
    """Return (path of the list of layers, number) where a module is a layer; else None."""
    container, _, last = path.rpartition(".")
    if not last.isdigit():
        return None
    if base.layers_path is not None:
        return (container, int(last)) if container == base.layers_path else None
    return (container, int(last)) if isinstance(base.modules()[container], nn.ModuleList) else None


def _module_path(slot: Slot, base: Base) -> str:
    if slot.layer is not None:
        layer = f"{_layer_list(base)}.{slot.layer}"
        if slot.component == "block_output":
            return layer
        known = base.modules()
        for child in _CHILDREN.get(slot.component, ()):
            if f"{layer}.{child}" in known:
                return f"{layer}.{child}"
        raise ConversionError(_not_expressible(slot.component))
    for path in (slot.component, _dotted(slot.component, base)):
        if path is not None and re.search(r"\.output$", path):
            plain = re.sub(r"\[(\d+)\]", r".\1", path.removesuffix(".output"))
            return plain.removeprefix(PEFT_PREFIX)
    raise ConversionError(_not_expressible(slot.component))


def _layer_list(base: Base) -> str:
    if base.layers_path is not None:
        return base.layers_path
    assert base.model is not None
    try:
        return find_layer_list(base.model)
    except LayersNotFoundError as error:
        raise ConversionError(f"{error} Or give --layers-path.") from error


def _dotted(component: str, base: Base) -> str | None:
    """Return the path that a name stands for whose dots were made underscores."""
    candidates = set(base.modules())
    if base.layers_path is not None:
        candidates |= {f"{base.layers_path}.{n}" for n in re.findall(r"\[(\d+)\]", component)}
    for path in candidates:
        flat = re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", path).replace(".", "_")
        if component in (f"{flat}_output", f"base_model_model_{flat}_output"):
            return f"{path}.output"
    return None


def _not_expressible(component: str) -> str:
    return (
        f"The checkpoint edits {component!r}, which is no module's output of this base model; "
        f"converted are block_output, {', '.join(_CHILDREN)} and paths such as "
        "'model.layers[15].output'. Is it the right --base?"
    )


def _check_order(slots: Sequence[Slot]) -> None:
    """pyreft gives the first half of its list the prefix and the second half the suffix."""
    numbers = [slot.number for slot in slots]
    if max(numbers) == 1 and numbers != sorted(numbers):
        raise ConversionError(
            "The checkpoint lists its interventions layer by layer. pyreft gave the first half of "
            "the list the prefix and the second half the suffix, so its layers have different "
            "positions, which an adapter of reftune does not. Convert each half by itself, "
            "with --positions of its own."
        )


def _component(representation: Any) -> str | None:
    value = None
    if isinstance(representation, Mapping):
        value = representation.get("component")
    elif isinstance(representation, list) and len(representation) > 1:
        value = representation[1]
    return value if isinstance(value, str) else None


def _class_name(text: Any) -> str | None:
    found = re.search(r"(\w+)\W*$", str(text))
    return found[1] if found else None


def _natural(key: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", key)]
