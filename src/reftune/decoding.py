"""The parts of decoding: where a completion ends, and the state a model is in meanwhile."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import final

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from reftune.errors import DataError, ReftConfigError


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
        return torch.tensor([self._stopped(ids) for ids in rows], device=input_ids.device)

    def _stopped(self, ids: list[int]) -> bool:
        tail = decode(self.tokenizer, ids[-self.window :])
        # A tail may decode differently from its text (a dropped leading space): look twice.
        return (
            find_stop(tail, self.stop) is not None
            and find_stop(decode(self.tokenizer, ids), self.stop) is not None
        )


@final
class StopOnEvent(StoppingCriteria):
    """Stop all rows once an event is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode and give each module its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


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
    """Return the architecture, the active adapters and a digest of up to 9 values per weight."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        # Quantised parameters are subclasses with their own indexing; meta ones have no values.
        plain = type(parameter) in (torch.nn.Parameter, torch.Tensor)
        if plain and parameter.device.type != "meta" and parameter.numel():
            flat = parameter.detach().reshape(-1)
            step = max(1, flat.numel() // 8)
            digest.update(json.dumps(flat[::step][:9].double().tolist()).encode())
    active = list(model.active_adapters) if isinstance(model, PeftModel) else []
    architecture = type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__
    return f"{architecture} adapters={','.join(active) or 'none'} weights={digest.hexdigest()[:16]}"


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
