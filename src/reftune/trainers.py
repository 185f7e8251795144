"""What trainers tell about the prompt; where they do not, an error and not a wrong edit.

A causal language model's prompt is the tokens before its first label. Labels may be missing, leave
no token to be the prompt, or stand in a row that holds several texts and does not say so.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from reftune.errors import PositionError, ReftConfigError
from reftune.layer import ReftLayer
from reftune.masks import Entry
from reftune.positions import SlotKey, before_first_label, segment_ids
from reftune.spans import PAGED, Span

log = logging.getLogger("reftune")

_LOOKS = 64  # on an accelerator, every how many forwards what was found is read from the device

UNTOLD = (
    "A causal language model with a ReFT is being trained without labels, so the whole sequence is "
    "taken for the prompt. If it is not, say where the prompt ends: labels, or prompt_mask / "
    "prompt_lengths. (label_smoothing_factor and compute_loss_func of transformers' Trainer take "
    "the labels away from the model.)"
)
UNTOLD_BY_TRL = (
    "A trainer of TRL called the model without labels, so ReFT cannot tell where the prompts end. "
    "compute_loss_func, label_smoothing_factor and compute_metrics make the trainer do so: leave "
    "them out. Trainers that always do so (of trl.experimental) need a subclass whose compute_loss "
    "calls the model inside `with reftune.options(prompt_lengths=...)`."
)
NO_PROMPT = (
    "In {where}, labels begin at the first token: there is no prompt, and ReFT edits the prompt's "
    "tokens. Labels must be -100 at the prompt. With TRL's SFTTrainer, use rows with `prompt` and "
    "`completion`, or assistant_only_loss=True for rows with `messages`; a prompt that was cut off "
    "(truncation_mode='keep_end', packing_strategy='bfd_split') needs a larger max_length. To edit "
    "every token instead: ReftConfig(positions='all', edit_generated=True)."
)
PACKED = (
    " (In packed rows a prompt of one token looks the same: the collators mask each text's first "
    "label.)"
)
SEVERAL = (
    "A text has several replies with labels (several turns of the assistant). ReFT edits what "
    "comes before the first one; when generating a later reply, it edits the end of all that comes "
    "before that one. To train every reply as it will be generated, make an example of each."
)
DATA_PARALLEL = (
    "This process has several GPUs, and a Trainer would copy the model to each (DataParallel): the "
    "copies have no parameters that a ReFT could read. Start a process for each GPU (torchrun "
    "--nproc-per-node N, or accelerate launch), or let it see one: CUDA_VISIBLE_DEVICES=0."
)
WRAPPED = (
    "packing_strategy='wrapped' cuts texts anywhere and does not say where they begin, so ReFT "
    "cannot tell what is prompt. Use packing_strategy='bfd' (the default)."
)


@dataclass(eq=False)
class PromptWatch:
    """Looks at what the forwards of a model are told, and remembers what it warned about.

    On an accelerator the verdict on labels stays there and is read in the forwards 1, 2, 4, ... and
    every 64th, which wait for it: an error may come up to 63 forwards late.
    """

    base: nn.Module
    warned_untold: bool = False
    warned_several: bool = False
    forwards: int = 0
    found: Tensor | None = None  # (2,) bool: a row without a prompt, one with several replies

    def look(
        self, span: Span, entry: Entry, call: dict[str, Any], keys: Sequence[SlotKey], trained: bool
    ) -> None:
        """Look at a forward with active adapters of these keys, before it runs.

        Raises PositionError where the rows that it would edit are not the prompt's.
        """
        keys = [key for key in keys if not (key.positions.everything and key.edit_generated)]
        if not keys or span.options.adapter_names is not None:
            return
        # Every trainer of TRL tags its model. Without gradients, TRL's forwards are told from the
        # user's own by an argument that TRL always gives.
        tags = getattr(self.base, "model_tags", None) or ()  # of transformers' models
        by_trl = "trl" in tags and (
            trained or call.get("use_cache") is False or "fused_lm_head" in call
        )
        if not trained and not by_trl:
            return
        if span.tells_no_prompt(entry):
            if by_trl:
                raise PositionError(UNTOLD_BY_TRL)
            if not self.warned_untold:
                self.warned_untold = True
                log.warning(UNTOLD)
        elif span.labels is not None and not span.options.tell_prompt:
            if tuple(span.labels.shape) != span.shape:
                return  # then they do not tell the prompt, either
            several = any(key.positions.everything or key.positions.suffix for key in keys)
            self._look_at_labels(span, several)

    def _look_at_labels(self, span: Span, several: bool) -> None:
        found = torch.stack(judge_labels(span))
        self.found = found if self.found is None else self.found | found
        self.forwards += 1
        n = self.forwards
        if found.device.type != "cpu" and n % _LOOKS and n & (n - 1):
            return
        no_prompt, has_several = self.found.tolist()
        self.found = None
        if no_prompt:
            where = "a text of this batch" if found.device.type == "cpu" else "a text of late"
            raise PositionError(NO_PROMPT.format(where=where) + (PACKED if span.is_packed else ""))
        if has_several and several and not self.warned_several:
            self.warned_several = True
            log.warning(SEVERAL)


def judge_labels(span: Span) -> tuple[Tensor, Tensor]:
    """Return whether any text of a forward has no token before its labels, and several replies.

    Two booleans on the device of the labels. Where texts are packed, their first label counts for
    none: the collators mask it, whatever it was.
    """
    labels_BS, position_ids, mask = span.labels, span.position_ids, span.mask
    assert labels_BS is not None
    labelled_BS = labels_BS.ne(-100)
    segments_BS = None
    if span.is_packed and position_ids is not None and position_ids.shape == labels_BS.shape:
        segments_BS = segment_ids(position_ids.to(labels_BS.device), span.packed_ends)
        first_BS = segments_BS.diff(dim=-1, prepend=segments_BS[:, :1] - 1).ne(0)
        second_BS = torch.nn.functional.pad(first_BS, (1, 0))[:, :-1] & ~first_BS
        bare_BS = labelled_BS & (first_BS | second_BS)
    else:
        attended_BS = torch.ones_like(labelled_BS)
        if mask is not None and mask.shape == labels_BS.shape:
            attended_BS = mask.to(labels_BS.device).ne(0)
        first_BS = attended_BS & (attended_BS.long().cumsum(-1) == 1)
        bare_BS = labelled_BS & first_BS
    unlabelled_BS = before_first_label(labels_BS, segments_BS)
    resumed_BS = labelled_BS[:, 1:] & ~labelled_BS[:, :-1] & ~unlabelled_BS[:, :-1]
    return bare_BS.any(), (resumed_BS & ~first_BS[:, 1:]).any()


def active_keys(layers: Sequence[ReftLayer]) -> list[SlotKey]:
    """Return the positions of the adapters that edit, one for each layer and adapter."""
    return [
        layer.keys[name]
        for layer in layers
        if not layer.disable_adapters
        for name in layer.names_active()
        if name in layer.keys
    ]


def watch_trainers() -> None:
    """Have every Trainer that is made from now on look at its arguments, if it trains a ReFT.

    A forward cannot tell rows that are cut out of a stream of texts from rows of one text each;
    the Trainer's arguments can. The list is transformers' own, of what all Trainers call.
    """
    trainer = sys.modules.get("transformers.trainer")
    if trainer is not None and _look_at_arguments() not in trainer.DEFAULT_CALLBACKS:
        trainer.DEFAULT_CALLBACKS.append(_look_at_arguments())


@cache
def _look_at_arguments() -> type:
    from transformers import TrainerCallback  # imports much, and only trainers need it

    class ReftArguments(TrainerCallback):
        """Refuse arguments of a trainer that leave ReFT without the prompt."""

        def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            model = kwargs.get("model")
            modules = model.modules() if isinstance(model, nn.Module) else ()
            if not any(isinstance(module, ReftLayer) for module in modules):
                return
            if getattr(args, "n_gpu", 0) > 1:
                raise ReftConfigError(DATA_PARALLEL)
            # Names of TRL's arguments; other trainers have none of them.
            packs = getattr(args, "packing", False) or getattr(args, "eval_packing", False)
            if packs and getattr(args, "packing_strategy", "") == "wrapped":
                raise PositionError(WRAPPED)
            if getattr(args, "use_transformers_continuous_batching", False):
                raise PositionError(PAGED)

    return ReftArguments
