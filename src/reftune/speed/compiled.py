"""Decoder layers compiled for training: one graph serves all layers and all shapes of batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch._dynamo
from torch import nn

from reftune.speed.patch import forward_replaced

GRAPHS = 32
"""How many graphs of a layer's forward there may be: with and without gradient, mask, cache."""


@contextmanager
def compiling(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Compile the forward of each layer, without its hooks, in a block."""
    with (
        torch._dynamo.config.patch(recompile_limit=GRAPHS),
        forward_replaced(layers, lambda layer: torch.compile(layer.forward, dynamic=True)),
    ):
        yield
