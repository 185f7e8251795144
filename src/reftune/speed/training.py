"""The forward of a training step, with its shortcuts: `with shortcuts(...) as step`."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from reftune.data import Collator
from reftune.speed import attention, compiled, dropout, norms
from reftune.speed.batches import CausalBatches, SequenceBatches
from reftune.speed.frozen import Frozen, edited_alike, first_edited
from reftune.speed.loss import cross_entropy, linear_cross_entropy
from reftune.speed.offload import offloading
from reftune.speed.patch import forward_replaced
from reftune.speed.plan import Model, Shortcuts
from reftune.speed.unread import Computed, restricting

log = logging.getLogger("reftune")

# Rounding is a hundredth of it in float32, a quarter in bfloat16 (SmolLM2); attention across packed
# examples changes the gradient by 0.2 and more.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6, torch.float16: 0.05, torch.bfloat16: 0.1}
_TF32 = 0.02  # on GPUs that round the factors of float32 products


@dataclass
class Step:
    """What a training step does beside calling the model.

    Attributes:
        collate: makes its batches.
        frozen: gives it what was computed before, or None.
        offloaded: layers whose frozen weights stay on the host.
        taken: names of the shortcuts it takes.
    """

    collate: Callable[[list[Any]], dict[str, Any]]
    frozen: Frozen | None = None
    offloaded: Sequence[nn.Module] = ()
    taken: Sequence[str] = ()
    _open: tuple[dict[str, Any], list[int], list[int]] | None = field(default=None, repr=False)

    def before(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of the model's forward."""
        if self.frozen is None:
            return batch
        index, lengths = batch["index"], batch["lengths"]
        batch = self.frozen.prepare(batch)
        self._open = (batch, index, lengths)
        return batch

    def after(self) -> None:
        """Keep what the forward computed."""
        if self.frozen is not None and self._open is not None:
            self.frozen.keep(*self._open)
            self._open = None


class LabelledLoss:
    """The forward of a causal language model that computes logits where there is a label."""

    def __init__(self, model: Model, computed: Computed | None) -> None:
        self.model, self.computed = model, computed
        self._whole_forward = model.whole.forward
        self.__signature__ = inspect.signature(model.whole.forward)  # the Trainer looks at it

    def __call__(
        self,
        *args: Any,
        reads: Tensor | None = None,
        targets: Tensor | None = None,
        real: Tensor | None = None,
        place: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        if reads is None or targets is None:
            if num_items_in_batch is not None:
                kwargs["num_items_in_batch"] = num_items_in_batch
            return self._whole_forward(*args, **kwargs)
        kwargs.pop("labels", None)
        kwargs.pop("shift_labels", None)
        if self.model.config is None:
            kwargs.pop("prompt_mask", None)  # a ReFT's, whose hooks take it
        kwargs = {"use_cache": False} | kwargs
        for name in ("output_attentions", "output_hidden_states", "return_dict", "inputs_embeds"):
            if kwargs.get(name) is None:
                kwargs.pop(name, None)
        with self.computed.only(real, reads, place) if self.computed else nullcontext():
            loss = self._loss(args, kwargs, reads, targets, num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss)

    def _loss(
        self,
        args: Any,
        kwargs: dict[str, Any],
        reads: Tensor,
        targets: Tensor,
        count: Tensor | int | None,
    ) -> Tensor:
        head = self.model.head
        if head is not None:
            h_BTd = self.model.decoder(*args, **kwargs).last_hidden_state
            rows = h_BTd.reshape(-1, h_BTd.shape[-1]).index_select(0, reads)
            return linear_cross_entropy(rows, head.weight, head.bias, targets, count)
        # What the model does to its logits is its own business: its head is given fewer rows.
        handle = self.model.whole.get_output_embeddings().register_forward_pre_hook(  # type: ignore[no-untyped-call]
            lambda _, given: (given[0].reshape(1, -1, given[0].shape[-1])[:, reads],)
        )
        try:
            logits = self._whole_forward(*args, **kwargs).logits
        finally:
            handle.remove()
        return cross_entropy(logits.view(-1, logits.shape[-1]), targets, count)


class ClassifierForward:
    """The forward of a sequence classifier that computes the rows that its head reads."""

    def __init__(self, model: Model, computed: Computed | None) -> None:
        self.computed, self._whole_forward = computed, model.whole.forward
        self.__signature__ = inspect.signature(model.whole.forward)

    def __call__(
        self, *args: Any, reads: Tensor | None = None, real: Tensor | None = None, **kwargs: Any
    ) -> Any:
        with self.computed.only(real, reads) if self.computed else nullcontext():
            return self._whole_forward(*args, **kwargs)


@contextmanager
def taking(model: Model | None, shortcuts: Shortcuts, collator: Any) -> Iterator[Step]:
    """Let a model's forward take shortcuts in a block; yields the step that feeds it."""
    if model is None:
        yield Step(collator)
        return
    with ExitStack() as stack:
        offloaded = model.layers if shortcuts.offload is not None else ()
        stack.enter_context(_offloading(model, shortcuts))
        if not shortcuts.on:
            yield Step(collator, offloaded=offloaded, taken=shortcuts.names)
            return
        stack.enter_context(attention.in_training(model.whole))
        stack.enter_context(dropout.faster(model.whole))
        stack.enter_context(norms.faster(model.whole))
        if shortcuts.compile:
            # What leaves out rows is not compiled: their number is another in each batch.
            whole = len(model.layers) - (1 if shortcuts.unread else 0)
            stack.enter_context(compiled.compiling(model.layers[:whole]))
        computed = stack.enter_context(
            restricting(model.layers, padding=shortcuts.padding, unread=shortcuts.unread)
        )
        if shortcuts.frozen is not None:
            stack.enter_context(shortcuts.frozen.active())
        forward = (LabelledLoss if model.causal else ClassifierForward)(model, computed)
        stack.enter_context(forward_replaced([model.whole], lambda _: forward))
        collate = _batches(model, shortcuts, collator)
        yield Step(collate, shortcuts.frozen, offloaded, shortcuts.names)


def _offloading(model: Model, shortcuts: Shortcuts) -> AbstractContextManager[None]:
    if shortcuts.offload is None:
        return nullcontext()
    return offloading(model.layers, shortcuts.offload)


def _batches(
    model: Model, shortcuts: Shortcuts, collator: Any
) -> Callable[[list[Any]], dict[str, Any]]:
    if not model.causal:
        return SequenceBatches(collator, first_read=shortcuts.unread)
    if type(collator) is not Collator:
        raise TypeError(f"what a {type(collator).__name__} does to a batch is not known")
    edit: dict[str, Any] = {"config": model.config}
    return CausalBatches(
        collator.pad_token_id,
        head=functools.partial(first_edited, **edit) if shortcuts.heads else None,
        numbered=shortcuts.frozen is not None,
        packed=shortcuts.packed,
        alike=functools.partial(edited_alike, **edit) if shortcuts.sharing else None,
        whole=shortcuts.whole,
    )


def settle(
    model: Model, chosen: Shortcuts, adapted: nn.Module, collator: Any, rows: list[Any]
) -> Shortcuts:
    """Return the shortcuts, of those chosen, that change nothing on some rows; see `difference`."""

    def reason(shortcuts: Shortcuts) -> str | None:
        why = difference(model, shortcuts, adapted, collator, rows)
        if why is None and shortcuts.heads:
            why = difference(model, shortcuts, adapted, collator, [rows[-1], _shorter(rows[-1])])
        return why

    if not chosen.on or (why := reason(chosen)) is None:
        return chosen
    kept = Shortcuts(on=True, whole=chosen.whole, offload=chosen.offload)
    if (why := reason(kept)) is not None:
        log.warning("Training takes no shortcuts with this model: %s.", why)
        return Shortcuts(offload=chosen.offload)
    for name in ("packed", "compile", "frozen", "heads", "padding", "sharing", "unread"):
        more = replace(kept, **{name: getattr(chosen, name)})
        if more == kept or (name == "heads" and kept.frozen is None):
            continue
        if (why := reason(more)) is None:
            kept = more
        else:
            log.info("Training does without the shortcut %r with this model: %s.", name, why)
    return kept


def _shorter(row: Any) -> Any:
    """Return a row without its second token: its head begins alike, and has another length."""
    index = torch.tensor([i for i in range(len(row["labels"])) if i != 1])
    tokens = {k: torch.as_tensor(row[k])[index] for k in ("input_ids", "labels")}
    return {**row, **tokens, "index": -1}


def difference(
    model: Model,
    shortcuts: Shortcuts,
    adapted: nn.Module,
    collator: Any,
    rows: list[Any],
) -> str | None:
    """Return how shortcuts change a model's loss and gradients on rows beyond rounding, or None.

    Where states are kept, a step is taken twice: with states computed, and taken from the store.
    """
    was_training = [module for module in adapted.modules() if module.training]
    adapted.eval()  # dropout would differ
    try:
        return _difference(model, shortcuts, adapted, collator, rows)
    except Exception as error:  # whatever it is that a model cannot
        return f"{type(error).__name__}: {error}"
    finally:
        for module in was_training:
            module.training = True


def _difference(
    model: Model,
    shortcuts: Shortcuts,
    adapted: nn.Module,
    collator: Any,
    rows: list[Any],
) -> str | None:
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    device = parameters[0].device
    tolerance = _TOLERANCE[model.whole.dtype]
    if device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        tolerance = max(tolerance, _TF32)
    with _offloading(model, shortcuts):
        expected = _gradients(adapted, _to(collator(rows), device), parameters)
    with taking(model, shortcuts, collator) as step:
        keeps = shortcuts.frozen is not None and shortcuts.frozen.store is not None
        for _ in range(2 if keeps else 1):
            batch = step.before(_to(step.collate(rows), device))
            found = _gradients(adapted, batch, parameters)
            step.after()
            for name, a, b in zip(("loss", "gradient"), expected, found, strict=True):
                error = float((a - b).norm() / a.norm().clamp(min=1e-12))
                if not error <= tolerance:
                    return f"the {name} differs by {error:.1e}"
    return None


def _gradients(
    model: nn.Module, batch: dict[str, Any], parameters: Sequence[nn.Parameter]
) -> tuple[Tensor, Tensor]:
    loss = model(**batch).loss
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    flat = [
        (torch.zeros_like(p) if g is None else g).detach().flatten().float()
        for g, p in zip(grads, parameters, strict=True)
    ]
    return loss.detach().float(), torch.cat(flat)


def _to(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
