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
from reftune.speed.frozen import Frozen, edited_alike, first_edited, free_memory
from reftune.speed.loss import cross_entropy, linear_cross_entropy
from reftune.speed.offload import offloading
from reftune.speed.patch import evaluation_mode, forward_replaced
from reftune.speed.plan import Model, Shortcuts
from reftune.speed.unread import Computed, restricting

log = logging.getLogger("reftune")

# Rounding is a hundredth of it in float32, half of it and more in bfloat16 (SmolLM2); attention
# across packed examples changes the gradient by 0.08 and more.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6, torch.float16: 0.05, torch.bfloat16: 0.1}
_COARSE = 0.25  # in 16 bits, of what is compared in float32
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
    """Return the shortcuts, of those chosen, that change nothing on some rows; see `difference`.

    In 16 bits rounding can look like a difference after a large random start, and hide one of
    packing: where the model runs in float32 and there is room for it, such are compared there, and
    in 16 bits coarsely. With flash attention it does not run, and 16 bits decide.
    """

    def tried(shortcuts: Shortcuts, tolerance: float | None = None) -> str | None:
        several = [rows]
        if shortcuts.heads:
            several.append([rows[-1], _shorter(rows[-1])])
        whys = (difference(model, shortcuts, adapted, collator, r, tolerance) for r in several)
        return next(filter(None, whys), None)

    @functools.cache
    def in_float32() -> bool:
        return chosen.offload is None and _runs_in_float32(adapted, collator, rows)

    def reason(shortcuts: Shortcuts) -> str | None:
        why = tried(shortcuts)
        if (why is None and not shortcuts.packed) or not in_float32():
            return why
        if why is not None and shortcuts.compile:
            return why  # what is compiled is not compiled anew for another dtype
        if why is not None and (why := tried(shortcuts, _COARSE)) is not None:
            return why
        with _weights_in_float32(adapted):
            return tried(replace(shortcuts, compile=False))

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


def _halves(module: nn.Module) -> list[Tensor]:
    found = [*module.parameters(), *module.buffers()]
    return [t for t in found if t.dtype in (torch.float16, torch.bfloat16)]


def _has_room(module: nn.Module) -> bool:
    """Return whether a model is in 16 bits, not quantised, and fits beside itself in float32."""
    halves = _halves(module)
    if not halves or not all(_is_plain(p) for p in module.parameters()):
        return False
    device = halves[0].device
    free = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else free_memory(0.5)
    return 4 * sum(t.numel() for t in halves) < free


def _runs_in_float32(adapted: nn.Module, collator: Any, rows: list[Any]) -> bool:
    """Return whether a model in 16 bits can be tried in float32; flash attention, e.g., cannot."""
    if not _has_room(adapted):
        return False
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    try:
        with _weights_in_float32(adapted), evaluation_mode(adapted):
            _gradients(adapted, _to(collator(rows), parameters[0].device), parameters)
    except Exception as error:  # whatever it is that a model cannot
        log.debug("Shortcuts are compared in 16 bits: %s: %s", type(error).__name__, error)
        return False
    return True


def _is_plain(parameter: nn.Parameter) -> bool:
    """Return whether a parameter is numbers, and not how others make a quantised one of them."""
    return parameter.is_floating_point() and type(parameter.data) is Tensor


@contextmanager
def _weights_in_float32(module: nn.Module) -> Iterator[None]:
    """Have a model's 16-bit weights in float32 in a block; afterwards they are what they were."""
    before = [(tensor, tensor.data) for tensor in _halves(module)]
    try:
        for tensor, data in before:
            tensor.data = data.float()
        yield
    finally:
        for tensor, data in before:
            tensor.data = data
        if any(data.is_cuda for _, data in before):
            torch.cuda.empty_cache()  # others' memory again, and not in the run's figures


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
    tolerance: float | None = None,
) -> str | None:
    """Return how shortcuts change a model's loss and gradients on rows beyond rounding, or None.

    `tolerance` is relative; None takes what is rounding in the model's dtype.
    Where states are kept, a step is taken twice: with states computed, and taken from the store.
    """
    try:
        with evaluation_mode(adapted):
            return _difference(model, shortcuts, adapted, collator, rows, tolerance)
    except Exception as error:  # whatever it is that a model cannot
        return f"{type(error).__name__}: {error}"


def _difference(
    model: Model,
    shortcuts: Shortcuts,
    adapted: nn.Module,
    collator: Any,
    rows: list[Any],
    tolerance: float | None,
) -> str | None:
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    device = parameters[0].device
    if tolerance is None:
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
