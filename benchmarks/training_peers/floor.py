"""The floor: arithmetic that no trainer of these adapters can do without. Standard library only.

Counted are the matrix products of the frozen model, two operations per multiplication and addition:

forward   each linear layer, attention's scores and weighted sums (causal: only over earlier
          tokens), and the output matrix where there is a label
backward  the same with respect to activations (no weight of the model has a gradient), in the
          layers above the first edited one, at the tokens from the first edited one on; attention
          costs twice its forward, as both factors of both products have a gradient

of exactly the tokens that something reads:

- a causal model's last token predicts nothing and no other token sees it, so it is left out;
- the last layer has keys and values of all tokens, but queries, output projection and MLP only at
  the tokens whose states are read: those that predict a label, or the one that a classifier reads;
- in later epochs the hidden states at the first edited layer, and keys and values above it of the
  (causal) tokens before the first edited one, are those of the first epoch.

Left out: embeddings, norms, softmax, a classifier's few rows, and the edits themselves (rank 8 of
width 576 on 14 tokens is a thousandth of a layer). At the rate of large matrix products this is a
time that cannot be reached quite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """The sizes of a transformer; `vocabulary` is 0 for a model without an output matrix."""

    hidden_size: int
    num_layers: int
    query_size: int
    key_size: int
    mlp_size: int
    mlp_matrices: int
    vocabulary: int
    causal: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """Return the shape of a Llama, Qwen2 or BERT from its config.json."""
        causal = config["model_type"] != "bert"
        heads = config["num_attention_heads"]
        head_size = config.get("head_dim") or config["hidden_size"] // heads
        return cls(
            hidden_size=config["hidden_size"],
            num_layers=config["num_hidden_layers"],
            query_size=heads * head_size,
            key_size=config.get("num_key_value_heads", heads) * head_size,
            mlp_size=config["intermediate_size"],
            mlp_matrices=3 if causal else 2,
            vocabulary=config["vocab_size"] if causal else 0,
            causal=causal,
        )

    @property
    def keys_and_values(self) -> int:
        """Return the operations of a token's key and value."""
        return 2 * self.hidden_size * 2 * self.key_size

    @property
    def reading(self) -> int:
        """Return the operations of a token's query, output projection and MLP."""
        d = self.hidden_size
        return 2 * d * 2 * self.query_size + 2 * d * self.mlp_matrices * self.mlp_size

    @property
    def attention(self) -> int:
        """Return the operations of one query with one key: score and weighted value."""
        return 4 * self.query_size


@dataclass(frozen=True)
class Needed:
    """The tokens of one example: `count` are computed, those from `edited` on have a gradient,
    those from `read` up to `read_end` are read in the end."""

    count: int
    edited: int
    read: int
    read_end: int
    causal: bool

    def keys(self, start: int, stop: int) -> int:
        """Return how many keys the queries of these tokens see, in all."""
        if not self.causal:
            return (stop - start) * self.count
        return (stop - start) * (start + 1 + stop) // 2

    def keys_with_gradient(self, start: int, stop: int) -> int:
        """Return how many of these keys have a gradient themselves."""
        return self.keys(start, stop) - (stop - start) * self.edited


def needed(length: int, prompt_length: int, prefix: int, suffix: int, causal: bool) -> Needed:
    """Return which of an example's tokens are needed."""
    if not causal:  # every token sees every other; the head reads the first
        return Needed(length, 0, 0, 1, causal)
    edited = 0 if prefix else max(prompt_length - suffix, 0)
    return Needed(length - 1, edited, prompt_length - 1, length - 1, causal)


def floor_flops(
    shape: Shape,
    examples: Sequence[tuple[int, int]],
    layers: Sequence[int],
    prefix: int,
    suffix: int,
    epochs: int = 1,
) -> int:
    """Return the operations of `epochs` passes over examples given as (length, prompt length)."""
    first = min(layers)
    total = 0
    for length, prompt_length in examples:
        tokens = needed(length, prompt_length, prefix, suffix, shape.causal)
        whole = _forward(shape, tokens, 0, 0)
        later = _forward(shape, tokens, first + 1, tokens.edited)
        total += whole + (epochs - 1) * later + epochs * _backward(shape, tokens, first + 1)
    return total


def _forward(shape: Shape, tokens: Needed, from_layer: int, from_token: int) -> int:
    """Return the operations of the layers from one on, for the tokens from one on, and the head."""
    count = tokens.count - from_token
    full = (
        count * (shape.keys_and_values + shape.reading)
        + tokens.keys(from_token, tokens.count) * shape.attention
    )
    read = tokens.read_end - tokens.read
    last = (
        count * shape.keys_and_values
        + read * shape.reading
        + tokens.keys(tokens.read, tokens.read_end) * shape.attention
    )
    return _stack(shape, from_layer, full, last) + _head(shape, read)


def _backward(shape: Shape, tokens: Needed, from_layer: int) -> int:
    """Return the operations of the gradient with respect to activations, down to a layer."""
    start, stop, read, read_end = tokens.edited, tokens.count, tokens.read, tokens.read_end
    # dQ and dP = dO V^T go over all keys, dK and dV only to those that have a gradient.
    seen = tokens.keys(start, stop) + tokens.keys_with_gradient(start, stop)
    seen_last = tokens.keys(read, read_end) + tokens.keys_with_gradient(read, read_end)
    full = (stop - start) * (shape.keys_and_values + shape.reading) + seen * shape.attention
    last = (
        (stop - start) * shape.keys_and_values
        + (read_end - read) * shape.reading
        + seen_last * shape.attention
    )
    return _stack(shape, from_layer, full, last) + _head(shape, read_end - read)


def _stack(shape: Shape, from_layer: int, full: int, last: int) -> int:
    layers = shape.num_layers - from_layer
    return (layers - 1) * full + last if layers > 0 else 0


def _head(shape: Shape, tokens: int) -> int:
    return 2 * shape.hidden_size * shape.vocabulary * tokens
