"""Heads: what a checkpoint has no weights for has to be trained and saved beside the adapter.

PEFT does so for modules named `classifier`, `score` and `qa_outputs`. Other families call theirs
`classification_head` (BART, T5), have two (`pooler`, `head`, `pre_classifier`), or a pooler inside
of the encoder: left alone they would be frozen as they were drawn, and drawn anew when loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from torch import nn

from reftune.config import ReftConfig

log = logging.getLogger("reftune")

# Labels of these tasks are class ids, tags or spans, whatever the model's class.
WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_LOADED = "_is_hf_initialized"  # transformers' mark on parameters that a checkpoint had


def add_heads(model: nn.Module, config: ReftConfig) -> None:
    """Name a task's head in `config.modules_to_save`, as far as it is not named there.

    A config that was loaded says already what was saved. Without a `task_type` nothing is added, as
    with LoRA, and a head that would stay as it was drawn is warned about.
    """
    if config.is_loaded or (config.task_type is not None and config.task_type not in WITH_HEAD):
        return
    saved = config.modules_to_save or []
    missing = [name for name in head_modules(model) if not any(map(name.endswith, saved))]
    if not missing:
        return
    if config.task_type is not None:
        config.modules_to_save = [*saved, *(_only(model, name) for name in missing)]
    elif _has_marks(model):
        log.warning(
            "The checkpoint has no weights for %s of %s: they are random, and neither trained nor "
            "saved. Give ReftConfig a task_type, or modules_to_save=%s.",
            ", ".join(missing),
            type(model).__name__,
            missing,
        )


def head_modules(model: nn.Module) -> list[str]:
    """Return the paths of the modules of a transformers model that make up a new head.

    Those are beside the backbone, and the checkpoint lacked some weight of them (of another number
    of classes, for instance), or children of the backbone (a pooler) that it had no weight of; in a
    model that was not loaded, all that are beside the backbone.
    """
    prefix = getattr(model, "base_model_prefix", "")  # of transformers' models
    backbone = getattr(model, prefix, None) if prefix else None
    if not isinstance(backbone, nn.Module) or backbone is model:
        return []
    known = _has_marks(model)
    beside = [n for n, child in _with_weights(model) if n != prefix]
    beside = [n for n in beside if not known or _is_partly_new(model.get_submodule(n))]
    inside = [n for n, child in _with_weights(backbone) if known and _is_new(child)]
    return [*(f"{prefix}.{name}" for name in inside), *beside]


def _with_weights(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if next(child.parameters(), None) is not None:
            yield name, child


def _has_marks(model: Any) -> bool:
    """Return whether it can be told what a checkpoint had; quantisation makes parameters anew."""
    if getattr(model, "hf_quantizer", None) is not None:
        return False
    return any(hasattr(parameter, _LOADED) for parameter in model.parameters())


def _is_new(module: nn.Module) -> bool:
    return not any(getattr(parameter, _LOADED, False) for parameter in module.parameters())


def _is_partly_new(module: nn.Module) -> bool:
    return not all(getattr(parameter, _LOADED, False) for parameter in module.parameters())


def _only(model: nn.Module, name: str) -> str:
    """Return a name that matches this module alone: PEFT takes every module that ends with it."""
    alike = [other for other, _ in model.named_modules() if other.endswith(name)]
    return name if len(alike) == 1 else f"base_model.model.{name}"
