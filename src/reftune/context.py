"""The context of a forward: what its caller says, by `reftune.options(...)`, and its precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Current(Generic[T]):
    """A value per thread and task; one per process while torch.compile traces.

    Dynamo cannot trace a ContextVar (transformers' `CompileableContextVar` has the same reason).
    """

    def __init__(self, name: str, default: T) -> None:
        self._var: ContextVar[T] = ContextVar(name, default=default)
        self._traced = default

    def get(self) -> T:
        return self._traced if torch.compiler.is_compiling() else self._var.get()

    def set(self, value: T) -> None:
        self._traced = value
        if not torch.compiler.is_compiling():
            self._var.set(value)


@dataclass(frozen=True)
class Options:
    """What a caller says about the forwards in a block; None leaves it as it was.

    Attributes:
        prompt_mask: (B, T) bool, True at the tokens of the prompt.
        prompt_lengths: (B,), how many attended tokens the prompt has, from the first.
        subspaces: the names of the subspaces that are on, for all examples or one list each.
        strength: factor on the edit: 0 the base model, 1 the adapter, -1 its negation.
        adapter_names: an adapter, or `__base__`, for each example.
    """

    prompt_mask: Tensor | None = None
    prompt_lengths: Tensor | None = None
    subspaces: Sequence[str] | Sequence[Sequence[str]] | None = None
    strength: float | None = None
    adapter_names: Sequence[str] | None = None

    @property
    def tell_prompt(self) -> bool:
        """Return whether they say where the prompt is."""
        return self.prompt_mask is not None or self.prompt_lengths is not None


FORWARD_OPTIONS = ("prompt_mask", "prompt_lengths", "subspaces")

CURRENT_OPTIONS: Current[Options] = Current("reftune_options", Options())


@contextmanager
def options(
    *,
    prompt_mask: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    subspaces: Sequence[str] | Sequence[Sequence[str]] | None = None,
    strength: float | None = None,
    adapter_names: Sequence[str] | None = None,
) -> Iterator[None]:
    """Set how ReFT adapters edit, for the forwards and `generate` calls of this thread in a block.

    See `Options` for the arguments. Blocks nest; what an inner one leaves out stays as it was.
    """
    outer = CURRENT_OPTIONS.get()
    given: dict[str, Any] = {
        "prompt_mask": prompt_mask,
        "prompt_lengths": prompt_lengths,
        "subspaces": subspaces,
        "strength": strength,
        "adapter_names": adapter_names,
    }
    CURRENT_OPTIONS.set(replace(outer, **{k: v for k, v in given.items() if v is not None}))
    try:
        yield
    finally:
        CURRENT_OPTIONS.set(outer)


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which arithmetic keeps the dtype of the adapter's parameters."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
