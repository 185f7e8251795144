"""Which shortcuts a training run can take; each gives the loss and gradients that the model gives.

Whatever model it is, the first batch is computed with and without them (`speed.training`), so a
model that does something unheard of costs speed and never exactness.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from reftune.config import ReftConfig
from reftune.controls import reft_layers
from reftune.errors import LayersNotFoundError
from reftune.layers import find_layer_list
from reftune.methods import is_prompt_learning, is_trained_in_full
from reftune.speed.frozen import Frozen, Store, first_edited, free_disk, free_memory

# Configs of models that do something to their logits, by the names that transformers gives it.
_AFTER_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
# How the names of settings end that tell how far a token sees.
_WINDOWS = ("window", "window_size", "attention_chunk_size", "local_attention")
# In the names of settings for dropout, for skipping a layer, for a router's noise.
_RANDOM = ("drop", "jitter", "noise")
WORTH = 0.03
"""The share of a step's arithmetic that reuse must save to be on by itself."""
MINUTES_TO_COMPILE = 10
"""Runs that would take less are not compiled: it takes half a minute, and gains a tenth or two."""
MUCH_PADDING = 0.15
"""The share of padding from which not computing it gains more than compilation."""
ACCELERATOR_RATE = 1e14
"""Operations per second, roughly."""
GiB = 1 << 30


class SpeedSettings(BaseModel):
    """Which shortcuts training takes; none changes what is learned."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shortcuts: bool = Field(True, description="whether to take any: logits where there is a label")
    skip_unread: bool = Field(True, description="do not compute padding, nor what nothing reads")
    share_beginnings: bool = Field(
        True, description="compute what examples of a batch begin with alike once, where it pays"
    )
    reuse: bool | Literal["auto"] = Field(
        "auto", description="keep what the adapter cannot change; auto: on CPUs, where it pays"
    )
    reuse_memory_gb: float | None = Field(
        None, ge=0, description="memory for what is kept; default: a quarter of what is free"
    )
    reuse_disk_gb: float | None = Field(
        None, ge=0, description="disk for what memory has no room for; default: a quarter, too"
    )
    packing: bool | Literal["auto"] = Field(
        "auto", description="examples in one row, no padding; auto: with flash attention"
    )
    offload_base: bool = Field(
        False,
        description="keep the base's layers in the host's memory, for models that barely fit; "
        "needs gradient_checkpointing",
    )
    compile: bool | Literal["auto"] = Field(
        "auto", description="compile the layers; auto: for long runs on an accelerator"
    )


@dataclass(frozen=True)
class Shortcuts:
    """Which shortcuts a step takes.

    Attributes:
        on: whether it takes any. A causal model then computes logits only where there is a label.
        unread: the last layer computes what is read.
        padding: what acts on each token alone is not computed for padding.
        frozen: keeps what does not change, or at least its gradient is not computed.
        heads: whether the tokens before the first edited one are computed apart.
        sharing: beginnings that examples share are computed once.
        packed: no padding, all examples in one row.
        compile: the layers are compiled.
        whole: also the last token of an example, which predicts nothing, is an input.
        offload: the device that the layers' frozen weights visit; they stay on the host.
    """

    on: bool = False
    unread: bool = False
    padding: bool = False
    sharing: bool = False
    frozen: Frozen | None = None
    heads: bool = False
    packed: bool = False
    compile: bool = False
    whole: bool = False
    offload: torch.device | None = None

    @property
    def names(self) -> list[str]:
        """Return the names of those taken, as the settings have them."""
        kept = self.frozen is not None and self.frozen.store is not None
        taken = {
            "shortcuts": self.on,
            "skip_unread": self.unread or self.padding,
            "share_beginnings": self.sharing,
            "reuse": kept,
            "packing": self.packed,
            "compile": self.compile,
            "offload_base": self.offload is not None,
        }
        return [name for name, is_taken in taken.items() if is_taken]


@dataclass(frozen=True)
class Model:
    """A causal language model, or a sequence classifier, as the shortcuts see it.

    Attributes:
        whole: the transformers model inside a `PeftModel`.
        causal: whether it is a language model.
        decoder: what returns its last hidden states.
        layers: the decoder's layers, in order.
        edited: which of them are edited, by number.
        config: the one active ReFT's; None where something else is trained, and nothing is edited.
    """

    whole: PreTrainedModel
    causal: bool
    decoder: nn.Module
    layers: Sequence[nn.Module]
    edited: tuple[int, ...]
    config: ReftConfig | None

    @property
    def head(self) -> nn.Linear | None:
        """Return the layer whose product with the hidden states is the logits, if it is that."""
        head = self.whole.get_output_embeddings()  # type: ignore[no-untyped-call]
        text = self.whole.config.get_text_config()
        scaled = any(getattr(text, name, None) not in (None, 1.0) for name in _AFTER_HEAD)
        if type(head) is not nn.Linear or scaled or any(p.requires_grad for p in head.parameters()):
            return None
        return head if head.weight.is_floating_point() else None


def describe(model: Any) -> Model | None:
    """Return a `PeftModel` as the shortcuts see it; None for what they do not know."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(whole, PreTrainedModel) or whole.config.is_encoder_decoder:
        return None
    if is_prompt_learning(model) or is_trained_in_full(whole):
        return None
    causal = isinstance(whole, GenerationMixin)
    if not (_is_plain_causal(whole) if causal else _is_classifier(whole)):
        return None
    reft = reft_layers(whole)
    names = {name for layer in reft.values() for name in layer.names_active()}
    try:
        path = find_layer_list(whole)
    except LayersNotFoundError:
        return None
    decoder = whole.get_submodule(path.rpartition(".")[0])
    layers = list(whole.get_submodule(path).children())
    if not reft:
        return Model(whole, causal, decoder, layers, (), None)
    if len(names) != 1:
        return None
    (name,) = names
    numbers = [_number(key, path) for key, layer in reft.items() if name in layer.configs]
    if not numbers or None in numbers:
        return None
    config = next(layer.configs[name] for layer in reft.values() if name in layer.configs)
    return Model(
        whole,
        causal,
        decoder,
        layers,
        tuple(sorted(number for number in numbers if number is not None)),
        config,
    )


def _is_plain_causal(whole: Any) -> bool:
    """Return whether a model's loss is the cross-entropy of its logits, and nothing else."""
    routed = getattr(whole.config.get_text_config(), "output_router_logits", False)
    has_head = whole.get_output_embeddings() is not None
    return has_head and not routed and whole.loss_function is ForCausalLMLoss


def _is_classifier(whole: PreTrainedModel) -> bool:
    return type(whole).__name__.endswith("ForSequenceClassification")


def _number(key: str, path: str) -> int | None:
    """Return which layer of a list a `ReftLayer` (…layers.3.reft) edits; None for one inside."""
    before, _, rest = key.partition(f"{path}.")
    number, _, child = rest.partition(".")
    return int(number) if not before and number.isdigit() and child == "reft" else None


def can_reuse(model: Model, adapted: nn.Module) -> bool:
    """Return whether there are edits, and nothing but the edits is trained or random."""
    if model.config is None:
        return False
    dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.whole.modules())
    values = model.whole.config.get_text_config().to_dict()
    random = any(
        any(word in name for word in _RANDOM) and isinstance(value, float) and value > 0
        for name, value in values.items()
        if not name.startswith(("classifier", "summary"))  # heads of other models
    )
    own = {id(p) for layer in reft_layers(adapted).values() for p in layer.parameters()}
    others = any(p.requires_grad and id(p) not in own for p in adapted.parameters())
    return not (dropout or random or others)


def saved_share(
    model: Model,
    lengths: Tensor,
    prompt_lengths: Tensor,
    *,
    keeps: bool,
    apart: bool,
    gradient_checkpointing: bool,
) -> float:
    """Return which share of an epoch's arithmetic need not be done, about.

    With states that are kept (`keeps`) of a later epoch's. Heads that are computed `apart` need no
    backward even the first time, nor have layers below the edits a checkpoint to recompute.
    """
    assert model.config is not None
    starts = first_edited(prompt_lengths, model.config)
    heads, tokens = float(starts.sum()) if apart else 0.0, float(lengths.sum())
    below, L = min(model.edited) + 1, len(model.layers)
    step = tokens * (L + (L - below))
    if keeps:
        return (heads * (2 * L - below) + (tokens - heads) * below) / step
    recomputed = 2 * tokens * (below - 1) if gradient_checkpointing else 0.0
    return (heads * (L - below) + recomputed) / step


def padding_share(lengths: Tensor, batch_size: int, grouped: bool) -> float:
    """Return which share of the columns of an epoch's batches is padding, about."""
    at_random = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0))
    order = lengths.sort().values if grouped else lengths[at_random]
    whole = order[: len(order) // batch_size * batch_size].view(-1, batch_size)
    columns = int(whole.max(1).values.sum()) * batch_size if len(whole) else 0
    return 1 - float(whole.sum()) / columns if columns else 0.0


def compiles(model: Model, tokens: float, device: torch.device) -> bool:
    """Return whether a run of so many tokens is long enough to gain from compilation.

    On a CPU it may lose: matrix products are nearly all of the time there.
    """
    parameters = sum(p.numel() for layer in model.layers for p in layer.parameters())
    seconds = 4 * parameters * tokens / ACCELERATOR_RATE
    return device.type != "cpu" and seconds > MINUTES_TO_COMPILE * 60


def choose(
    model: Model,
    adapted: nn.Module,
    settings: SpeedSettings,
    *,
    lengths: Tensor,
    prompt_lengths: Tensor,
    epochs: float,
    gradient_checkpointing: bool,
    device: torch.device,
    folder: Path,
    padding: float = 0.0,
) -> Shortcuts:
    """Return the shortcuts that a run takes, for examples of such lengths (N,) each.

    `padding` is the share of its batches that is; compiled layers compute it.
    """
    offload = device if settings.offload_base else None
    if not settings.shortcuts:
        return Shortcuts(offload=offload)
    flash = "flash" in str(model.whole.config._attn_implementation)
    packed = flash if settings.packing == "auto" else settings.packing
    compile_it = settings.compile
    if compile_it == "auto":
        compile_it = (
            not gradient_checkpointing
            and (padding < MUCH_PADDING or packed or not settings.skip_unread)
            and compiles(model, float(lengths.sum()) * epochs, device)
        )
    frozen, heads = None, False
    stretches = model.causal and _stretches(model, int(lengths.max()))
    may_reuse = model.causal and not packed and can_reuse(model, adapted)
    pools = model.config is not None and model.config.intervention.pools_tokens
    dropout = model.config is not None and model.config.dropout > 0
    if settings.reuse and may_reuse and not stretches:
        frozen, heads = _reused(
            model,
            settings,
            lengths=lengths,
            prompt_lengths=prompt_lengths,
            # To bring an accelerator what was kept may take longer than to compute it.
            keeps=epochs > 1 and (device.type == "cpu" or settings.reuse is True),
            gradient_checkpointing=gradient_checkpointing,
            folder=folder,
        )
    skips = settings.skip_unread and not gradient_checkpointing  # a recomputation would not know
    compile_it = compile_it and not (heads or settings.offload_base)
    picks_rows = skips and not packed and not compile_it
    return Shortcuts(
        on=True,
        unread=skips and not pools,
        padding=picks_rows,
        sharing=picks_rows and may_reuse and settings.share_beginnings and not (pools or dropout),
        frozen=frozen,
        heads=heads,
        packed=packed and model.causal,
        compile=compile_it,
        whole=stretches,
        offload=offload,
    )


def _reused(
    model: Model,
    settings: SpeedSettings,
    *,
    lengths: Tensor,
    prompt_lengths: Tensor,
    keeps: bool,
    gradient_checkpointing: bool,
    folder: Path,
) -> tuple[Frozen | None, bool]:
    """Return what runs the layers below the edits, and whether heads are computed apart.

    None where that would save too little.
    """
    apart = not gradient_checkpointing and not _slides(model, int(lengths.max()))
    share = saved_share(
        model,
        lengths,
        prompt_lengths,
        keeps=keeps,
        apart=apart,
        gradient_checkpointing=gradient_checkpointing,
    )
    if share <= WORTH and settings.reuse is not True:
        return None, False
    store = _store(settings, folder) if keeps else None
    return Frozen(model.decoder, model.layers, min(model.edited), store), apart


def _stretches(model: Model, longest: int) -> bool:
    """Return whether a batch's longest example changes the rotary embedding of the others."""
    text = model.whole.config.get_text_config()
    rotary = getattr(text, "rope_parameters", None) or {}
    kinds = [rotary, *(kind for kind in rotary.values() if isinstance(kind, dict))]
    return any(
        longest > (kind.get("original_max_position_embeddings") or text.max_position_embeddings)
        for kind in kinds
        if any(word in str(kind.get("rope_type")) for word in ("dynamic", "longrope"))
    )


def _slides(model: Model, longest: int) -> bool:
    """Return whether a window, sliding or not, is shorter than an example."""
    text = model.whole.config.get_text_config()
    values = {**text.to_dict(), "sliding_window": getattr(text, "sliding_window", None)}
    windows = [value for name, value in values.items() if name.endswith(_WINDOWS)]
    return any(type(window) is int and window < longest for window in windows)


def examples_to_try(
    model: Model, lengths: Tensor, prompt_lengths: Tensor, much: float = 1.5
) -> list[int]:
    """Return the numbers of a few short examples: a batch with padding, and heads if any has one.

    Of the shortest alone, each might be as long as the other, or have no token that is not edited.
    One comes twice, for the beginnings that are shared.
    """
    edits = model.causal and model.config is not None
    starts = first_edited(prompt_lengths, model.config) if edits else lengths * 0  # type: ignore[arg-type]
    tails = lengths - starts
    kinds = (lengths > 0, lengths >= much * lengths.min(), starts > 0, tails >= much * tails.min())
    longest = int(lengths.max())
    found = {int(lengths.masked_fill(~k, longest + 1).argmin()) for k in kinds if bool(k.any())}
    return [*sorted(found), max(found, key=lambda number: int(prompt_lengths[number]))]


def _store(settings: SpeedSettings, folder: Path) -> Store:
    memory, disk = settings.reuse_memory_gb, settings.reuse_disk_gb
    return Store(
        free_memory() if memory is None else int(memory * GiB),
        free_disk(folder) if disk is None else int(disk * GiB),
        folder,
    )
