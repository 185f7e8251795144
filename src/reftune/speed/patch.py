"""What of a module is another for a block, on the instance: its forward, or its mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def forward_replaced(
    modules: Sequence[nn.Module], make: Callable[[nn.Module], Callable[..., Any]]
) -> Iterator[None]:
    """Give each module `make(module)` as its forward; what it had before comes back."""
    before: list[tuple[nn.Module, Any]] = []
    try:
        for module in modules:
            replacement = make(module)
            before.append((module, vars(module).get("forward")))
            object.__setattr__(module, "forward", replacement)
        yield
    finally:
        for module, forward in reversed(before):  # a module may be shared, and come twice
            if forward is None:
                object.__delattr__(module, "forward")
            else:
                object.__setattr__(module, "forward", forward)


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Have a module in evaluation mode in a block; then each part has its own mode back."""
    was_training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in was_training:
            part.training = True
