"""A module's forward replaced for a block, on the instance: its hooks and class stay."""

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
