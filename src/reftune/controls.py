"""What can be set on a model with ReFT adapters, without training: strength, subspaces, order.

None of it is saved. `reftune.options(...)` sets the like for some calls of one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from torch import nn

from reftune.context import CURRENT_OPTIONS
from reftune.errors import ReftConfigError, did_you_mean
from reftune.layer import Composition, ReftLayer


def reft_layers(model: nn.Module) -> dict[str, ReftLayer]:
    """Return the edited layers of a model (a `PeftModel` or a plain one) by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, ReftLayer)}


def set_strength(model: nn.Module, strength: float, adapter_name: str | None = None) -> None:
    """Set the factor on an adapter's edits: 0 the base model, 1 as trained, -1 negated.

    Without a name, of all adapters. It is not saved. Raises ReftConfigError for an unknown name.
    """
    for layer in _layers_with(model, adapter_name):
        for name in [adapter_name] if adapter_name else list(layer.strength):
            if name in layer.strength:
                layer.strength[name] = float(strength)


def set_subspaces(
    model: nn.Module, names: Sequence[str] | None, adapter_name: str | None = None
) -> None:
    """Set which of its named subspaces an adapter edits; None is all rows of R.

    Without an adapter name, of all adapters that have subspaces. It is not saved. Raises
    ReftConfigError for an unknown name.
    """
    for layer in _layers_with(model, adapter_name):
        for name in [adapter_name] if adapter_name else list(layer.configs):
            if name not in layer.configs:
                continue
            layer.subspaces.pop(name, None)
            if names is not None:
                layer.configs[name].subspace_rows(list(names))
                layer.subspaces[name] = list(names)


def set_composition(model: nn.Module, composition: Composition) -> None:
    """Set how several active ReFT adapters edit: "in_order" (the default) or "sum".

    In order: in that of their activation, each edits what those before have left. Sum: each sees
    the unedited hidden states of the layer, and the edits are added up; their order does not
    matter. The edits of lower layers are seen in both. It is not saved. Raises ReftConfigError.
    """
    accepted = list(get_args(Composition))
    if composition not in accepted:
        raise ReftConfigError(
            f"composition is {composition!r}; accepted are {', '.join(accepted)}."
            + did_you_mean(str(composition), accepted)
        )
    for layer in _layers_with(model, None):
        layer.composition = composition


def otherwise_than_saved(model: nn.Module, adapters: Sequence[str]) -> str:
    """Return what is set now on some adapters' edits, also by `options`, that is not saved.

    A line such as "strength=0.5", "" where nothing is. Models with the same weights and the same
    line give the same output.
    """
    now, found = CURRENT_OPTIONS.get(), set[str]()
    for layer in reft_layers(model).values():
        acting = [name for name in adapters if name in layer.configs]
        for name in acting:
            of = f"({name})" if len(adapters) > 1 else ""
            strength = layer.strength[name] if now.strength is None else now.strength
            names = layer.subspaces.get(name) if now.subspaces is None else now.subspaces
            if strength != 1.0:
                found.add(f"strength{of}={strength:g}")
            if names is not None:
                found.add(f"subspaces{of}={names}")
        if len(acting) > 1 and layer.composition != "in_order":
            found.add(f"composition={layer.composition}")
    return " ".join(sorted(found))


def _layers_with(model: nn.Module, adapter_name: str | None) -> list[ReftLayer]:
    layers = list(reft_layers(model).values())
    known = sorted({name for layer in layers for name in layer.configs})
    if adapter_name is not None and adapter_name not in known:
        raise ReftConfigError(
            f"There is no ReFT adapter {adapter_name!r}; loaded are {known or 'none'}."
            + did_you_mean(adapter_name, known)
        )
    return layers
