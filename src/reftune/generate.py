"""Generation: one `Completion` for one prompt, whichever engine made it.

    prompts (token ids) + Sampling -> Engine.generate -> [Completion], in the prompts' order
    prompt  (token ids) + Sampling -> stream          -> pieces of text

Shapes: B = rows of a batch, L = padded prompt length, T = generated length.
"""

import contextvars
import threading
from collections.abc import Callable, Generator, Sequence
from functools import partial
from itertools import groupby
from typing import Protocol, TypeAlias, final, runtime_checkable

from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TextIteratorStreamer

from reftune.completions import (
    Completion,
    FinishReason,
    IsDecided,
    Model,
    Sampling,
    call_generate,
    complete_batch,
    left_padded,
)
from reftune.decoding import (
    check_prompt,
    evaluating,
    fingerprint,
    fingerprint_of,
    longest_first,
    require,
    seeded,
    until_stop,
)
from reftune.errors import ReftConfigError, did_you_mean
from reftune.methods import takes_no_padding

__all__ = [
    "BASE",
    "AdapterEngine",
    "Completion",
    "Engine",
    "FinishReason",
    "HFEngine",
    "IsDecided",
    "Model",
    "OnDone",
    "Sampling",
    "stream",
]

OnDone: TypeAlias = Callable[[int, Completion], None]

BASE = "__base__"  # PEFT's name for "no adapter" in adapter_names


class Engine(Protocol):
    """Anything that turns prompts into completions: Hugging Face here, vLLM elsewhere."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer whose ids `generate` takes and gives."""

    @property
    def identity(self) -> str:
        """Return a string that differs when the model or its adapters compute another function."""

    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        adapters: Sequence[str | None] | None = None,
        on_done: OnDone | None = None,
    ) -> list[Completion]:
        """Complete every prompt and return the completions in the prompts' order.

        `adapters` names one adapter per prompt (None: the base model); without it, the active
        adapter acts on all. `on_done(index, completion)` is called as soon as a prompt is done.
        """


@runtime_checkable
class AdapterEngine(Engine, Protocol):
    """An engine that has several adapters by name, and stops where an answer is decided."""

    def identity_of(self, adapter: str | None) -> str:
        """Return the identity of the base model with one adapter, or of the base alone."""

    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        adapters: Sequence[str | None] | None = None,
        on_done: OnDone | None = None,
        is_decided: IsDecided | None = None,
    ) -> list[Completion]:
        """Complete every prompt; `is_decided(index, text so far)` may end a completion."""


@final
class HFEngine:
    """Generate in batches with a Hugging Face model, with or without PEFT adapters.

    The model's `generation_config` and training mode are left as they were. Rows of a batch do not
    influence each other, up to the rounding of the model's dtype. A batch has at most `batch_size`
    rows and, if given, `batch_tokens` tokens: padded prompts and the most that may be generated.

    Raises:
        ReftConfigError: a size is below 1.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 16,
        batch_tokens: int | None = None,
    ) -> None:
        require(batch_size >= 1, "batch_size", batch_size, "1 or more")
        enough = batch_tokens is None or batch_tokens >= 1
        require(enough, "batch_tokens", batch_tokens, "1 or more, or None")
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens

    @property
    def identity(self) -> str:
        """Return the architecture, the active adapters and a digest of a sample of all weights."""
        return fingerprint(self.model)

    def identity_of(self, adapter: str | None) -> str:
        """Return the identity of the base model with one adapter, or of the base alone.

        Raises:
            ReftConfigError: the model has no such adapter.
        """
        _adapter_names(self.model, [adapter], 1)
        return fingerprint_of(self.model, adapter)

    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        adapters: Sequence[str | None] | None = None,
        on_done: OnDone | None = None,
        is_decided: IsDecided | None = None,
    ) -> list[Completion]:
        """Complete every prompt, the longest first, and return them in the prompts' order.

        In greedy decoding a completion also ends when `is_decided(index, text so far)` says so.

        Raises:
            DataError: a prompt has no tokens.
            ReftConfigError: `adapters` has another length than `prompts` or an unknown name.
        """
        for i, prompt in enumerate(prompts):
            check_prompt(prompt, f"prompt {i}")
        names = None if adapters is None else _adapter_names(self.model, adapters, len(prompts))
        done: dict[int, Completion] = {}
        # Longest first: an out-of-memory comes with the first batch, not after an hour.
        lengths = [len(prompt) + sampling.max_new_tokens for prompt in prompts]
        batches = longest_first(lengths, self.batch_size, self.batch_tokens)
        if takes_no_padding(self.model):
            alike = [groupby(rows, key=lambda i: lengths[i]) for rows in batches]
            batches = [list(part) for parts in alike for _, part in parts]
        with evaluating(self.model), seeded(sampling.seed, self.model.device):
            for rows in batches:
                completions = complete_batch(
                    self.model,
                    self.tokenizer,
                    [prompts[i] for i in rows],
                    sampling,
                    None if names is None else [names[i] for i in rows],
                    None if is_decided is None else partial(_of_row, is_decided, rows),
                )
                for i, completion in zip(rows, completions, strict=True):
                    done[i] = completion
                    if on_done is not None:
                        on_done(i, completion)
        return [done[i] for i in range(len(prompts))]


def _of_row(is_decided: IsDecided, rows: Sequence[int], k: int, text: str) -> bool:
    return is_decided(rows[k], text)


def stream(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    sampling: Sampling,
) -> Generator[str, None, None]:
    """Yield the completion of one prompt piece by piece; the pieces joined are its `text`.

    Generation runs in a thread. An error there is raised here; closing the iterator ends it.

    Raises:
        DataError: the prompt has no tokens.
        ReftConfigError: `num_beams` is above 1; beams cannot be streamed.
    """
    check_prompt(prompt_ids, "the prompt")
    if sampling.num_beams > 1:
        raise ReftConfigError(
            f"num_beams={sampling.num_beams} cannot be streamed: use num_beams=1, "
            "or HFEngine.generate."
        )
    # The thread sees what is set here and now: reftune.options(...) around this call.
    context = contextvars.copy_context()
    pieces = _stream_pieces(model, tokenizer, prompt_ids, sampling, context)
    return until_stop(pieces, sampling.stop)


def _stream_pieces(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    sampling: Sampling,
    context: contextvars.Context,
) -> Generator[str, None, None]:
    cancel = threading.Event()
    errors: list[BaseException] = []
    streamer = TextIteratorStreamer(
        tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )

    def work() -> None:
        try:
            with evaluating(model), seeded(sampling.seed, model.device):
                rows = left_padded([prompt_ids], model, tokenizer)
                call_generate(model, tokenizer, rows, sampling, streamer=streamer, cancel=cancel)
        except BaseException as error:  # raised again in the consumer's thread
            errors.append(error)
        finally:
            # After a normal end this is a second end mark that nobody reads.
            streamer.on_finalized_text("", stream_end=True)

    thread = threading.Thread(target=context.run, args=(work,), name="reftune-stream", daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        cancel.set()
        thread.join()
    if errors:
        raise errors[0]


def _adapter_names(model: Model, adapters: Sequence[str | None], count: int) -> list[str]:
    if len(adapters) != count:
        raise ReftConfigError(
            f"got {len(adapters)} adapters for {count} prompts: give one name per prompt "
            "(None: the base model)."
        )
    known = list(model.peft_config) if isinstance(model, PeftModel) else []
    for name in adapters:
        if name is not None and name not in known:
            raise ReftConfigError(
                f"the model has no adapter {name!r}; it has {', '.join(known) or 'none'}."
                + did_you_mean(name, known)
                + " Load it first with model.load_adapter(path, adapter_name=...)."
            )
    if not isinstance(model, PeftModel):
        raise ReftConfigError(
            f"adapters were given, but the model is a plain {type(model).__name__}: "
            "give a PeftModel, or leave adapters out."
        )
    return [BASE if name is None else name for name in adapters]
