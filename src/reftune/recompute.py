"""Edits that are recomputed in a backward, by activation checkpointing, find their forward's span.

Where a checkpointed function includes a layer's hooks, the edit is computed again when the span
of its forward is closed. So the functions that checkpoint are made to carry the span along:
transformers' own, on the modules that it checkpoints, and those of torch's `checkpoint_wrapper`,
which FSDP and accelerate put around layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from reftune.spans import SpanCarrier

_OWN = "_gradient_checkpointing_func"  # transformers' name, on every module that checkpoints
_OF_WRAPPER = "checkpoint_fn"  # of torch's CheckpointWrapper
# Attributes by which torch's wrappers (of checkpoints, of offloaded activations, FSDP1's) hold a
# module.
_WRAPPED = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def plain_name(name: str) -> str:
    """Return a module's or parameter's name as it is in state dicts: without torch's wrappers."""
    for wrapper in _WRAPPED:
        name = name.replace(f"{wrapper}.", "")
    return name


def carry_spans(modules: Iterable[nn.Module]) -> None:
    """Let what checkpoints these modules, or their children, carry the span of the forward."""
    for module, name in _places(modules):
        function = vars(module).get(name)
        if function is not None and not isinstance(function, SpanCarrier):
            object.__setattr__(module, name, SpanCarrier(function))


def drop_carriers(modules: Iterable[nn.Module]) -> None:
    """Give back the functions that `carry_spans` replaced."""
    for module, name in _places(modules):
        if isinstance(carrier := vars(module).get(name), SpanCarrier):
            object.__setattr__(module, name, carrier.function)


def _places(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str]]:
    for module in modules:
        yield module, _OWN
        for child in module._modules.values():
            inside: Iterable[Any] = child if isinstance(child, nn.ModuleList) else (child,)
            for one in inside:
                yield from _wrappers(one)


def _wrappers(module: nn.Module | None) -> Iterator[tuple[nn.Module, str]]:
    while module is not None:
        held = (module._modules.get(name) for name in _WRAPPED)
        inner = next((one for one in held if one is not None), None)
        # A reentrant one calls a function of its own in place of the module: it stays refused.
        if getattr(vars(module).get("checkpoint_impl"), "name", None) == "NO_REENTRANT":
            yield module, _OF_WRAPPER
        module = inner
