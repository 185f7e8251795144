"""Sequence classifiers: an encoder with a head that is trained in full, and texts as its batches.

model_config(name, labels, ...) -> load_classifier(...) -> a model; Texts -> predict(...) -> logits
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftConfig, PeftModel
from torch import Tensor, nn

from reftune.decoding import longest_first
from reftune.errors import ReftConfigError, RunError
from reftune.hub import split_revision
from reftune.methods import WEIGHTS_CONFIG
from reftune.models import DType, cannot_load, ensure_pad_token, resolve
from reftune.tasks.glue import Labelled

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# What the families call their head's dropout.
_HEAD_DROPOUT = ("classifier_dropout", "cls_dropout", "seq_classif_dropout")
_CHUNK = 1000  # texts that are tokenised at once


@final
class Texts:
    """Labelled texts as tokens, a torch data set; `lengths` serve samplers that group by length."""

    def __init__(
        self, rows: Sequence[Labelled], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> None:
        self._labels = [row.label for row in rows]
        parts: dict[str, list[NDArray[np.int32]]] = {}
        lengths: list[int] = []
        for at in range(0, len(rows), _CHUNK):
            texts = zip(*(row.texts for row in rows[at : at + _CHUNK]), strict=True)
            columns = [list(column) for column in texts]
            encoded = tokenizer(*columns, truncation=True, max_length=max_length)
            lengths += map(len, encoded["input_ids"])
            for name, values in encoded.items():
                parts.setdefault(name, []).append(np.concatenate(values).astype(np.int32))
        self._inputs = {name: np.concatenate(values) for name, values in parts.items()}
        self._starts = np.append([0], np.cumsum(lengths))
        self.lengths: Sequence[int] = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, end = self._starts[index], self._starts[index + 1]
        row: dict[str, Any] = {n: ids[start:end].tolist() for n, ids in self._inputs.items()}
        return row | {"labels": self._labels[index]}


def model_config(
    name: str, labels: Sequence[str], head_dropout: float | None = None
) -> PretrainedConfig:
    """Return a model's config, with these labels; without any, it grades (regression).

    Raises RunError for a model that is not there, ReftConfigError where its head has no dropout.
    """
    from transformers import AutoConfig

    names = dict(enumerate(labels or ("grade",)))
    where, revision = split_revision(resolve(name))
    try:
        settings: PretrainedConfig = AutoConfig.from_pretrained(
            where,
            revision=revision or "main",
            id2label=names,
            label2id={label: number for number, label in names.items()},
            problem_type="single_label_classification" if labels else "regression",
        )
    except (OSError, ValueError) as error:
        raise RunError(cannot_load(name, error)) from error
    if head_dropout is not None:
        known = [key for key in _HEAD_DROPOUT if hasattr(settings, key)]
        if not known:
            raise ReftConfigError(
                f"classify.head_dropout is {head_dropout}, and a {settings.model_type} has none "
                f"of {', '.join(_HEAD_DROPOUT)}; leave it out."
            )
        for key in known:
            setattr(settings, key, head_dropout)
    return settings


def load_classifier(
    name: str,
    settings: PretrainedConfig,
    dtype: DType = "auto",
    device: str | None = None,
    attn_implementation: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load an encoder with the head that `settings` describe, and its tokenizer.

    Raises:
        RunError: it cannot be loaded, or weights are missing that are not the head's.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    where, revision = split_revision(resolve(name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, revision=revision or "main")
        with _no_load_report():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                where,
                revision=revision or "main",
                config=settings,
                dtype=dtype,
                attn_implementation=attn_implementation,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # the head of a classifier with other labels
            )
    except (OSError, ValueError) as error:
        raise RunError(cannot_load(name, error, " as a classifier")) from error
    ensure_pad_token(tokenizer, name)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    new = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    head = tuple(f"{part}." for part in head_modules(model))
    if lost := sorted(key for key in new if not key.startswith(head)):
        raise RunError(
            f"{name!r} has no weights for {', '.join(lost[:3])} and {max(len(lost) - 3, 0)} more "
            "that a classifier needs besides its head. Name a pretrained encoder."
        )
    # Its loss is the mean over a batch; with this, transformers' Trainer divides the losses of
    # batches whose gradients are accumulated, which it does not for whatever takes **kwargs.
    model.accepts_loss_kwargs = False
    if device is not None:
        model.to(device)
    return model, tokenizer


def classifier_config(adapter: str | Path) -> PretrainedConfig | None:
    """Return the config that was saved with an adapter of a classifier; None: it is of another.

    Raises RunError for an adapter of a classifier without it.
    """
    from transformers import AutoConfig

    is_weights = (Path(adapter) / WEIGHTS_CONFIG).is_file()
    if not is_weights and PeftConfig.from_pretrained(str(adapter)).task_type != "SEQ_CLS":
        return None
    if is_weights and not (Path(adapter) / "config.json").is_file():
        return None
    try:
        settings: PretrainedConfig = AutoConfig.from_pretrained(str(adapter))
    except (OSError, ValueError) as error:
        raise RunError(
            f"{adapter} is an adapter of a classifier and has no config.json, which says what its "
            f"labels are: {error}"
        ) from error
    return settings


def save_classifier_config(model: Any, directory: Path) -> None:
    """Save a classifier's config beside its adapter: it names the labels."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if type(base).__name__.endswith("ForSequenceClassification"):
        base.config.save_pretrained(str(directory))


def head_modules(model: Any) -> tuple[str, ...]:
    """Return the modules between a classifier's encoder and its logits.

    In BERT and its like that includes the pooler, which is inside the encoder: it is the first
    layer of the paper's head, softmax(W_o tanh(W_d h + b_d) + b_o), and new in many checkpoints.
    """
    encoder = model.base_model_prefix
    children = model.named_children()
    names = [n for n, child in children if n != encoder and any(True for _ in child.parameters())]
    pooler = getattr(getattr(model, encoder, None), "pooler", None)  # some families have one
    return (*names, f"{encoder}.pooler") if isinstance(pooler, nn.Module) else tuple(names)


def check_length(max_length: int, settings: Any, tokenizer: Any) -> None:
    """Raise ReftConfigError for texts of more tokens than a model has positions for."""
    limits = [tokenizer.model_max_length, getattr(settings, "max_position_embeddings", None)]
    limit = min(int(number) for number in limits if number)
    if max_length > limit:
        raise ReftConfigError(
            f"data.max_length is {max_length}; this model reads at most {limit} tokens. The "
            "paper's is 256."
        )


def predict(
    model: Any,
    tokenizer: Any,
    data: Texts,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Return the logits (N, labels) of texts in float32, on the CPU and in the texts' order."""
    collate = collator(tokenizer)
    device = next(model.parameters()).device
    found: dict[int, Tensor] = {}
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for batch in longest_first(data.lengths, batch_size):
                inputs = collate([data[i] for i in batch])
                logits = model(**{k: v.to(device) for k, v in inputs.items() if k != "labels"})
                found.update(zip(batch, logits.logits.float().cpu(), strict=True))
                if progress is not None:
                    progress(len(found), len(data))
    finally:
        model.train(was_training)
    return torch.stack([found[i] for i in range(len(data))])


def collator(tokenizer: Any) -> Any:
    """Return what makes a padded batch of rows of `Texts`."""
    from transformers import DataCollatorWithPadding

    return DataCollatorWithPadding(tokenizer)


@contextmanager
def _no_load_report() -> Iterator[None]:
    """Keep transformers from listing the head's weights as missing: the caller looks itself."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(before)
