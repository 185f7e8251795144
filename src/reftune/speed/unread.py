"""Layers that compute only the tokens that count, and the last one only what something reads.

Padding is computed by attention alone: what acts on each token by itself (projections, MLP) is
computed for real tokens, where a batch has enough padding to gain from it.

Above the last layer only the tokens that predict a label are read, or the one token that a
classifier looks at. Of the other tokens the last layer's keys and values are needed, and nothing
else: its query and output projections and its MLP are computed for the rows that are read.

The other rows are zero there, and no row that is read depends on them.

Where examples of a batch begin alike, the shared beginning is computed for the first of them, and
its rows are copied to the others: in a causal model the same tokens, edited alike, have the same
states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from reftune.speed.patch import forward_replaced

# Modules that act on each token alone, by the names that transformers gives them.
_READ = ("mlp", "intermediate", "q_proj", "query", "o_proj", "out_proj", "dense")
_ATTENDED = ("k_proj", "v_proj", "key", "value", "qkv_proj", "query_key_value", "c_attn")


class Rows:
    """Which rows of the flattened (B*S) hidden states are computed, `index` (N,); None is all.

    `place` (B*S,) tells which of these each row is a copy of; None: rows not computed are zero.
    """

    def __init__(self) -> None:
        self.index: Tensor | None = None
        self.place: Tensor | None = None
        self._last: tuple[Tensor, tuple[Any, ...], Tensor, int] | None = None

    def set(self, index: Tensor | None, place: Tensor | None) -> None:
        """Compute these rows from now on."""
        self.index, self.place, self._last = index, place, None

    def pick(self, x: Tensor) -> Tensor:
        """Return the rows (1, N, d) of x (B, S, d); for query, key and value the same tensor.

        Their gradients are then added up where the rows are few and close, and put back once.
        """
        assert self.index is not None
        if x.is_inference():  # has no version
            return x.reshape(1, -1, x.shape[-1]).index_select(1, self.index)
        state = (x._version, x.requires_grad, torch.is_grad_enabled())
        if self._last is not None:
            given, before, picked, version = self._last
            if given is x and before == state and picked._version == version:
                return picked
        picked = x.reshape(1, -1, x.shape[-1]).index_select(1, self.index)
        self._last = (x, state, picked, picked._version)
        return picked


class Computed:
    """Which rows the layers of a model compute in a block, and which the last one."""

    def __init__(self) -> None:
        self.real, self.read = Rows(), Rows()

    @contextmanager
    def only(
        self, real: Tensor | None, read: Tensor | None, place: Tensor | None = None
    ) -> Iterator[None]:
        """Compute the rows (N,) of real tokens, and those that are read, in a block; None: all.

        `place` (B*S,) tells which of the real ones the others are copies of.
        """
        self.real.set(real, place)
        self.read.set(*((real, place) if read is None else (read, None)))
        try:
            yield
        finally:
            self.real.set(None, None)
            self.read.set(None, None)


@contextmanager
def restricting(
    layers: Sequence[nn.Module], *, padding: bool, unread: bool
) -> Iterator[Computed | None]:
    """Let layers leave out rows of padding, and the last one also those that nothing reads."""
    if not (padding or unread):
        yield None
        return
    computed = Computed()
    last = layers[-1]
    with ExitStack() as stack:
        for layer in layers if padding else [last]:
            is_read = layer is last and unread
            rows = computed.read if is_read else computed.real
            stack.enter_context(_restricted(layer, _READ, rows))
            if padding:
                stack.enter_context(_restricted(layer, _ATTENDED, computed.real))
        yield computed


def _restricted(layer: nn.Module, names: Sequence[str], rows: Rows) -> Any:
    modules = list(_named(layer, names))
    return forward_replaced(modules, lambda module: _on_rows(module.forward, rows))


def _named(module: nn.Module, names: Sequence[str]) -> Iterator[nn.Module]:
    """Yield the outermost modules of these names, not those of an adapter."""
    for name, child in module.named_children():
        if name in names:
            yield child
        elif name != "reft":
            yield from _named(child, names)


def _on_rows(forward: Callable[..., Any], rows: Rows) -> Callable[..., Any]:
    def run(x: Tensor) -> Any:
        index = rows.index
        if index is None:
            return forward(x)
        B, S, _ = x.shape
        out = forward(rows.pick(x))
        if not isinstance(out, Tensor):
            raise TypeError(f"a module that acts per token returned {type(out).__name__}")
        if rows.place is not None:
            return out.index_select(1, rows.place).view(B, S, -1)
        full = out.new_zeros(B * S, out.shape[-1])
        return full.index_copy_(0, index, out.squeeze(0)).view(B, S, -1)

    return run
