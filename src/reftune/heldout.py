"""The loss on examples that were held out, with logits only where there is a label.

With a vocabulary of 256k words, the logits of 16 examples of 512 tokens take 8 GB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

from reftune.distributed import is_sharded
from reftune.prompts import IGNORED_LABEL
from reftune.tokens import Collator, TokenDataset

ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-6}
"""How far the loss may be from the model's own; in other dtypes a hundredth."""


MOST_LABELS = 2048
"""Labels in one forward, unless a single example has more: of 128k words, 1 GB of logits."""


def heldout_cross_entropy(
    model: Any, data: TokenDataset, collator: Collator, batch_size: int
) -> float:
    """Return the mean cross-entropy (nats per completion token) of a model on a data set."""
    was_training, total, count = model.training, 0.0, 0
    model.eval()
    order = sorted(range(len(data)), key=lambda i: data.lengths[i])
    loss = None
    try:
        # FSDP's shards are gathered into tensors that training goes on with
        with torch.no_grad() if is_sharded(model) else torch.inference_mode():
            for rows in _batches((data[i] for i in order), batch_size):
                collated = collator(rows)
                n = int(_labelled(collated).sum())  # before a GPU has it
                if n == 0:
                    continue
                batch = {k: t.to(model.device) for k, t in collated.items()}
                if loss is None:  # by the shortest examples, whose logits are the fewest
                    loss = labelled_loss if _agree(model, batch) else _own_loss
                total += float(loss(model, batch)) * n
                count += n
    finally:
        model.train(was_training)
    return total / max(count, 1)


def _batches(rows: Iterable[Any], batch_size: int) -> Iterator[list[Any]]:
    batch: list[Any] = []
    labels = 0
    for row in rows:
        own = int((torch.as_tensor(row["labels"]) != IGNORED_LABEL).sum())
        if batch and (len(batch) == batch_size or labels + own > MOST_LABELS):
            yield batch
            batch, labels = [], 0
        batch.append(row)
        labels += own
    if batch:
        yield batch


def labelled_loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return a causal model's mean loss, with logits only of the tokens before a labelled one.

    The model's head is given those rows alone, (1, N, d), and its loss their labels (1, N).
    """
    wanted = _labelled(batch)
    targets = batch["labels"][:, 1:][wanted][None]
    head = model.get_base_model().get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, given: (given[0][:, :-1][wanted][None],))
    try:
        return model(**batch, shift_labels=targets).loss  # type: ignore[no-any-return]
    finally:
        handle.remove()


def _own_loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    return model(**batch).loss  # type: ignore[no-any-return]


def _labelled(batch: Mapping[str, Tensor]) -> Tensor:
    return batch["labels"][:, 1:] != IGNORED_LABEL


def _agree(model: Any, batch: Mapping[str, Tensor]) -> bool:
    """Return whether a model's own loss is that of its labelled rows alone."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else None
    if base is None or getattr(base, "loss_function", None) is not ForCausalLMLoss:
        return False
    try:
        found = float(labelled_loss(model, batch))
    except Exception:  # whatever a model does that we do not know of: its own loss is right
        return False
    own = float(_own_loss(model, batch))
    return abs(found - own) <= ROUNDING.get(model.dtype, 0.01) * max(abs(own), 1e-3)
