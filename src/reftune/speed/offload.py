"""A frozen base that stays in the host's memory: each layer's weights visit the device.

For models that do not fit beside their activations. With gradient checkpointing a layer's weights
are on the device for its forward, and again for its recomputation and backward; without, every
layer's would be kept until the backward, so nothing would be won. Modules that hold weights fetch
them themselves: the recomputation calls those and not the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from reftune.speed.patch import forward_replaced


def frozen_parameters(layers: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Yield the frozen parameters in layers, with the module and the name that hold each."""
    for layer in layers:
        for module in layer.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and not parameter.requires_grad:
                    yield module, name, parameter


@contextmanager
def offloading(layers: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Keep the layers' frozen weights on the host in a block, and bring them as they are needed."""
    held: dict[nn.Module, list[str]] = {}
    where = []
    for module, name, parameter in frozen_parameters(layers):
        held.setdefault(module, []).append(name)
        where.append((parameter, parameter.device))
        parameter.data = _on_host(parameter.data, device)
    try:
        with forward_replaced(list(held), lambda m: _visiting(m, held[m], device)):
            yield
    finally:
        for parameter, before in where:
            parameter.data = parameter.data.to(before)


@contextmanager
def left_where_they_are(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Hide the layers' frozen weights in a block, so that moving the model does not move them."""
    places = list(frozen_parameters(layers))
    for module, name, _ in places:
        module._parameters[name] = None
    try:
        yield
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter


def place(model: nn.Module, device: torch.device, host: Sequence[nn.Module] = ()) -> None:
    """Move a model to a device, but for the frozen weights of the layers `host`.

    A model that is quantised, or spread over devices, has its place already.
    """
    if getattr(model, "hf_device_map", None) is None:
        with left_where_they_are(host):
            model.to(device)


@contextmanager
def placed(
    model: nn.Module, device: torch.device, host: Sequence[nn.Module] = ()
) -> Iterator[None]:
    """Move a model as `place` does; bring it together again after the block, however it ends."""
    try:
        place(model, device, host)
        yield
    except BaseException:
        with suppress(RuntimeError):  # what ended training is what is to be told
            if host:
                reunite(model, device)
        raise
    if host:
        reunite(model, device)


def reunite(model: nn.Module, device: torch.device) -> None:
    """Move a model whose layers were on the host to a device, or to the host if it is too large."""
    try:
        place(model, device)
    except torch.OutOfMemoryError:
        place(model, torch.device("cpu"))


def _on_host(data: Tensor, device: torch.device) -> Tensor:
    host = data.to("cpu")
    return host.pin_memory() if device.type == "cuda" else host


def _visiting(module: nn.Module, names: Sequence[str], device: torch.device) -> Callable[..., Any]:
    forward = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        host = {name: module._parameters[name] for name in names}
        # Copies of their own, not `parameter.data`: a backward finds the ones its forward used.
        module._parameters.update(
            {name: _visitor(p, device) for name, p in host.items() if p is not None}
        )
        try:
            return forward(*args, **kwargs)
        finally:
            module._parameters.update(host)

    return run


def _visitor(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    copy = parameter.detach().to(device, non_blocking=True, copy=True)
    return nn.Parameter(copy, requires_grad=False)
