"""The parts of decoding: where a completion ends, and the state a model is in meanwhile."""

import contextlib
import hashlib
import inspect
import json
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, final

import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import (
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.streamers import BaseStreamer

from reftune.controls import otherwise_than_saved
from reftune.errors import DataError, ReftConfigError
from reftune.speed.patch import evaluation_mode


def until_stop(
    pieces: Generator[str, None, None], stop: tuple[str, ...]
) -> Generator[str, None, None]:
    """Yield text up to the first stop string, holding back what may become one."""
    held = ""
    with contextlib.closing(pieces):
        for piece in pieces:
            held += piece
            cut = find_stop(held, stop)
            if cut is not None:
                if cut:
                    yield held[:cut]
                return
            keep = max((_overlap(held, s) for s in stop), default=0)
            if len(held) > keep:
                yield held[: len(held) - keep]
            held = held[len(held) - keep :]
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0
    )


def find_stop(text: str, stop: Iterable[str]) -> int | None:
    """Return where the first stop string begins, or None."""
    return min((at for s in stop if (at := text.find(s)) >= 0), default=None)


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Return the text of `ids` without special tokens, spaces as they are."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the special tokens with their ids: what `decode` leaves out of a text."""
    added = tokenizer.added_tokens_decoder.items()
    return {token.content: i for i, token in added if token.special}


def settled_text(tokenizer: PreTrainedTokenizerBase, ids: list[int], stop: tuple[str, ...]) -> str:
    """Return the text of generated ids that more ids only add to.

    An end that is part of a character, or that may become a stop string, is held back.
    """
    text = decode(tokenizer, ids).rstrip("\ufffd")
    return text[: len(text) - max((_overlap(text, s) for s in stop), default=0)]


def until_first_stop(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], stop: tuple[str, ...]
) -> tuple[list[int], str]:
    """Return the ids up to the token that completes a stop string, and the text before the string.

    Without a stop string in the text, return `ids` itself and all of its text.
    """
    text = decode(tokenizer, ids)
    if find_stop(text, stop) is None:
        return ids, text
    for n in range(1, len(ids) + 1):
        text = decode(tokenizer, ids[:n])
        cut = find_stop(text, stop)
        if cut is not None:
            return ids[:n], text[:cut]
    raise AssertionError("the whole text holds a stop string")


@final
class StopOnText(StoppingCriteria):
    """Stop a row whose generated text contains a stop string.

    transformers' own criterion also matches a string that began in the prompt.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...], prompt_length: int
    ) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.prompt_length = prompt_length
        # A token holds at least one byte, so a stop that just completed lies in this many tokens.
        self.window = max(len(s.encode()) for s in stop) + 8

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        rows = input_ids[:, self.prompt_length :].tolist()
        return torch.tensor([self.stopped(ids) for ids in rows], device=input_ids.device)

    def stopped(self, ids: list[int]) -> bool:
        """Return whether the text of generated ids contains a stop string."""
        tail = decode(self.tokenizer, ids[-self.window :])
        # A tail may decode differently from its text (a dropped leading space): look twice.
        return (
            find_stop(tail, self.stop) is not None
            and find_stop(decode(self.tokenizer, ids), self.stop) is not None
        )


@final
class RowsDone(StoppingCriteria):
    """Stop rows of which `is_done(row, generated ids)` says so, and all rows once `enough` are.

    `ends` then says where each row stopped: the number of its generated ids, or None.
    """

    def __init__(
        self, is_done: Callable[[int, list[int]], bool], prompt_length: int, enough: int
    ) -> None:
        self.is_done = is_done
        self.prompt_length = prompt_length
        self.enough = enough
        self.ends: list[int | None] = []

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        rows = input_ids[:, self.prompt_length :].tolist()
        self.ends = self.ends or [None] * len(rows)
        for k, ids in enumerate(rows):
            if self.ends[k] is None and self.is_done(k, ids):
                self.ends[k] = len(ids)
        stopped = [end is not None for end in self.ends]
        all_stop = sum(stopped) >= self.enough
        return torch.tensor([all_stop or s for s in stopped], device=input_ids.device)


@final
class StopOnEvent(StoppingCriteria):
    """Stop all rows once an event is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


@final
class WithoutEnds(BaseStreamer):
    """Hand one row's tokens to a streamer, but not one that ends it: no part of its text.

    Streamers leave out special tokens by themselves; others can end a completion, too.
    """

    def __init__(self, streamer: Any, ends: set[int]) -> None:
        self.streamer, self.ends = streamer, ends
        self.began = False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, and then each token."""
        if not (self.began and int(value) in self.ends):
            self.streamer.put(value)
        self.began = True

    def end(self) -> None:
        """Tell the streamer that there are no more."""
        self.streamer.end()


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode and give each module its own mode back.

    On a CPU a head of 16 bits is given dense states. A slice of them, which `logits_to_keep` makes,
    is multiplied by a frozen weight row by row: 20 s for 64 x 576 by 49,152, instead of 0.03 s.
    """
    head = _half_head_on_cpu(model)
    handle = None if head is None else head.register_forward_pre_hook(_dense)
    try:
        with evaluation_mode(model):
            yield
    finally:
        if handle is not None:
            handle.remove()


def _half_head_on_cpu(model: torch.nn.Module) -> torch.nn.Module | None:
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(whole, PreTrainedModel) or whole.device.type != "cpu":
        return None
    head: torch.nn.Module | None = None
    with contextlib.suppress(NotImplementedError, AttributeError):  # of models with their own code
        head = whole.get_output_embeddings()  # type: ignore[no-untyped-call]
    dtype = getattr(getattr(head, "weight", None), "dtype", None)
    return head if dtype in (torch.bfloat16, torch.float16) else None


def _dense(head: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if not args:
        return None
    # Not `contiguous`, which leaves a slice of one row as it is.
    return (args[0].clone(memory_format=torch.contiguous_format), *args[1:])


@contextlib.contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seed torch for the block and restore its random state; do nothing without a seed."""
    if seed is None:
        yield
        return
    on_cpu = device.type == "cpu"
    devices = [] if on_cpu else [device.index or 0]
    with torch.random.fork_rng(devices, device_type="cuda" if on_cpu else device.type):
        torch.manual_seed(seed)
        yield


def fingerprint(model: PreTrainedModel | PeftModel) -> str:
    """Return the architecture, the active adapters and a digest of up to 9 values per weight.

    Strength, subspaces and order are told where they are not as saved.
    """
    active = list(model.active_adapters) if isinstance(model, PeftModel) else []
    told = f"adapters={','.join(active) or 'none'} {otherwise_than_saved(model, active)}".rstrip()
    return f"{_architecture(model)} {told} weights={_digest(model.named_parameters())}"


def fingerprint_of(model: PreTrainedModel | PeftModel, adapter: str | None) -> str:
    """Return as `fingerprint`, of the base model and one adapter (None: of the base alone).

    Neither the adapter's name nor what else is loaded changes it.
    """
    weights: Iterable[tuple[str, torch.Tensor]] = model.named_parameters()
    if not isinstance(model, PeftModel):
        return f"{_architecture(model)} weights={_digest(weights)}"
    # Virtual tokens wrap no module, so that the base model has no tuner's prefix there.
    marks = (getattr(model.base_model, "prefix", "prompt_encoder."), ".modules_to_save.")
    base = [(name, p) for name, p in weights if not any(mark in name for mark in marks)]
    identity = f"{_architecture(model)} base={_digest(base)}"
    if adapter is None:
        return identity
    # Without saving embeddings PEFT does not ask the Hub about the base model.
    own = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    told = otherwise_than_saved(model, [adapter])
    return f"{identity} adapter={_digest(sorted(own.items()))} {told}".rstrip()


def _architecture(model: PreTrainedModel | PeftModel) -> str:
    return type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__


def _digest(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, parameter in weights:
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        # Quantised parameters are subclasses with their own indexing; meta ones have no values.
        plain = type(parameter) in (torch.nn.Parameter, torch.Tensor)
        if plain and parameter.device.type != "meta" and parameter.numel():
            flat = parameter.detach().reshape(-1)
            step = max(1, flat.numel() // 8)
            digest.update(json.dumps(flat[::step][:9].double().tolist()).encode())
    return digest.hexdigest()[:16]


def has_plain_cache(model: PreTrainedModel | PeftModel) -> bool:
    """Return whether a model's cache is keys and values alone, by row and position.

    So rows can be copied and left out. Virtual tokens (prompt and prefix tuning) may be a cache.
    """
    base = model
    if isinstance(model, PeftModel):
        if any(config.is_prompt_learning for config in model.peft_config.values()):
            return False
        base = model.get_base_model()
    arguments = inspect.signature(base.forward).parameters.keys()
    if not {"past_key_values", "position_ids", "attention_mask"} <= arguments:
        return False
    kinds = {type(layer) for layer in DynamicCache(config=base.config).layers}
    return kinds <= {DynamicLayer, DynamicSlidingWindowLayer}


def longest_first(
    lengths: Sequence[int],
    rows: int,
    tokens: int | None = None,
    counts: Sequence[int] | None = None,
) -> list[list[int]]:
    """Return batches of indices, the longest first, of at most `rows` rows and `tokens` tokens.

    A batch's tokens are its rows times its longest. `counts` says how many rows each index has,
    by default 1. An index that is too large for any batch gets its own.
    """
    batches: list[list[int]] = []
    filled = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        count = 1 if counts is None else counts[i]
        full = not batches or filled + count > rows
        if not full and tokens is not None:
            full = (filled + count) * lengths[batches[-1][0]] > tokens
        if full:
            batches.append([])
            filled = 0
        batches[-1].append(i)
        filled += count
    return batches


def check_prompt(prompt: Sequence[int], what: str) -> None:
    """Raise DataError for a prompt without tokens."""
    if len(prompt) == 0:
        raise DataError(
            f"{what} has no tokens: a model needs at least one to start from; "
            "add the beginning-of-sequence token or remove the example."
        )


def require(ok: bool, name: str, value: object, accepted: str) -> None:
    """Raise ReftConfigError, with what is accepted, where a setting is not ok."""
    if not ok:
        raise ReftConfigError(f"{name}={value!r} is not accepted: it must be {accepted}.")
