"""Generation: one `Completion` for one prompt, whichever engine made it.

    prompts (token ids) + Sampling -> Engine.generate -> [Completion], in the prompts' order
    prompt  (token ids) + Sampling -> stream          -> pieces of text

Shapes: B = rows of a batch, L = padded prompt length, T = generated length.
"""

import contextvars
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, cast, final

import torch
from peft import PeftModel
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from reftune.decoding import (
    StopOnEvent,
    StopOnText,
    check_prompt,
    evaluating,
    fingerprint,
    require,
    seeded,
    until_first_stop,
    until_stop,
)
from reftune.errors import ReftConfigError, did_you_mean

Model: TypeAlias = PreTrainedModel | PeftModel
OnDone: TypeAlias = Callable[[int, "Completion"], None]
FinishReason: TypeAlias = Literal["stop", "length"]

BASE = "__base__"  # PEFT's name for "no adapter" in adapter_names


@final
@dataclass(frozen=True)
class Completion:
    """What a model wrote after one prompt.

    `token_ids` ends before the end-of-sequence token; after a stop string it includes the token
    that completed the string, while `text` ends before the string (as in vLLM).
    `finish_reason` is "stop" (end of sequence or a stop string) or "length" (`max_new_tokens`).
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason


@final
@dataclass(frozen=True)
class Sampling:
    """How to choose the next token.

    `temperature=0` is greedy; `top_p` and `top_k` (0: off) act only above it. With `num_beams > 1`
    the search ends as soon as that many candidates are complete (the paper's `early_stopping`).
    With a `seed`, the same call draws the same tokens; other random state is left as it was.

    Raises:
        ReftConfigError: a value is outside its range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    num_beams: int = 1
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, ok, accepted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (1: off)"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("num_beams", self.num_beams >= 1, "1 (no beams) or more"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0 (1: off)"),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "0 (off) or more"),
        ):
            require(ok, name, getattr(self, name), accepted)
        if not isinstance(self.stop, tuple) or not all(isinstance(s, str) and s for s in self.stop):
            raise ReftConfigError(
                f"stop={self.stop!r} is not accepted: give a tuple of non-empty strings, "
                'for instance stop=("\\n",).'
            )


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


@final
class HFEngine:
    """Generate in batches with a Hugging Face model, with or without PEFT adapters.

    The model's `generation_config` and training mode are left as they were. Rows of a batch do not
    influence each other, up to the rounding of the model's dtype.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 16,
    ) -> None:
        require(batch_size >= 1, "batch_size", batch_size, "1 or more")
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size

    @property
    def identity(self) -> str:
        """Return the architecture, the active adapters and a digest of a sample of all weights."""
        return fingerprint(self.model)

    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        adapters: Sequence[str | None] | None = None,
        on_done: OnDone | None = None,
    ) -> list[Completion]:
        """Complete every prompt, the longest first, and return them in the prompts' order.

        Raises:
            DataError: a prompt has no tokens.
            ReftConfigError: `adapters` has another length than `prompts` or an unknown name.
        """
        for i, prompt in enumerate(prompts):
            check_prompt(prompt, f"prompt {i}")
        names = None if adapters is None else _adapter_names(self.model, adapters, len(prompts))
        done: dict[int, Completion] = {}
        # Longest first: an out-of-memory comes with the first batch, not after an hour.
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        with evaluating(self.model), seeded(sampling.seed, self.model.device):
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                batch = [prompts[i] for i in rows]
                batch_names = None if names is None else [names[i] for i in rows]
                completions = _generate_batch(
                    self.model, self.tokenizer, batch, sampling, batch_names
                )
                for i, completion in zip(rows, completions, strict=True):
                    done[i] = completion
                    if on_done is not None:
                        on_done(i, completion)
        return [done[i] for i in range(len(prompts))]


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
                _call_generate(
                    model, tokenizer, [prompt_ids], sampling, streamer=streamer, cancel=cancel
                )
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


def _generate_batch(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    adapter_names: list[str] | None,
) -> list[Completion]:
    generated_BT = _call_generate(model, tokenizer, prompts, sampling, adapter_names=adapter_names)
    eos = _eos_ids(model, tokenizer)
    return [
        _completion(prompt, ids, tokenizer, eos, sampling)
        for prompt, ids in zip(prompts, generated_BT.tolist(), strict=True)
    ]


def _completion(
    prompt: list[int],
    ids: list[int],
    tokenizer: PreTrainedTokenizerBase,
    eos: set[int],
    sampling: Sampling,
) -> Completion:
    end = next((k for k, token in enumerate(ids) if token in eos), None)
    reason: FinishReason = "length" if end is None else "stop"
    ids = ids[:end]
    kept, text = until_first_stop(tokenizer, ids, sampling.stop)
    if kept is not ids:
        reason = "stop"
    return Completion(tuple(prompt), tuple(kept), text, reason)


def _call_generate(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    *,
    adapter_names: list[str] | None = None,
    streamer: TextIteratorStreamer | None = None,
    cancel: threading.Event | None = None,
) -> torch.Tensor:
    """Return the generated ids [B, T] without the prompt, padded on the right."""
    length = max(map(len, prompts))
    eos = _eos_ids(model, tokenizer)
    pad = _pad_id(tokenizer, eos)
    ids_BL = torch.tensor([[pad] * (length - len(p)) + p for p in prompts], device=model.device)
    mask_BL = torch.tensor(
        [[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=model.device
    )
    criteria = StoppingCriteriaList()
    if sampling.stop:
        criteria.append(StopOnText(tokenizer, sampling.stop, length))
    if cancel is not None:
        criteria.append(StopOnEvent(cancel))
    arguments: dict[str, Any] = {}
    if adapter_names is not None:
        # PEFT repeats names for beams only when it sees num_beams as an argument of generate,
        # where transformers no longer wants it beside a generation_config.
        arguments["adapter_names"] = [n for n in adapter_names for _ in range(sampling.num_beams)]
    if streamer is not None:
        arguments["streamer"] = streamer
    with torch.inference_mode():
        # transformers types `generate` on a mixin that PreTrainedModel does not show.
        sequences = cast(Callable[..., object], model.generate)(
            input_ids=ids_BL,
            attention_mask=mask_BL,
            generation_config=_generation_config(model, sampling, length, pad, eos),
            stopping_criteria=criteria,
            **arguments,
        )
    assert isinstance(sequences, torch.Tensor)
    return sequences[:, length:]


def _generation_config(
    model: Model, sampling: Sampling, length: int, pad: int, eos: set[int]
) -> GenerationConfig:
    """Build a config in which every knob is set.

    transformers fills what is None from `model.generation_config`, so an instruct model's own
    temperature or repetition penalty would act unasked.
    """
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=sampling.temperature > 0,
        # In greedy mode these defaults mean "unset"; anything else is warned about.
        temperature=sampling.temperature or 1.0,
        top_p=sampling.top_p if sampling.temperature > 0 else 1.0,
        top_k=sampling.top_k if sampling.temperature > 0 else 50,
        typical_p=1.0,
        epsilon_cutoff=0.0,
        eta_cutoff=0.0,
        num_beams=sampling.num_beams,
        num_return_sequences=1,
        early_stopping=sampling.num_beams > 1,
        length_penalty=1.0,
        repetition_penalty=sampling.repetition_penalty,
        no_repeat_ngram_size=sampling.no_repeat_ngram_size,
        # max_length, not max_new_tokens: with both set (Llama-2's own config has max_length),
        # transformers logs a warning on every call.
        max_length=length + sampling.max_new_tokens,
        pad_token_id=pad,
        eos_token_id=sorted(eos) or None,
        use_cache=True,
        return_dict_in_generate=False,
    )
    own = model.generation_config
    if config.do_sample and own is not None and own.min_p is not None:
        config.min_p = 0.0
    if own is not None and own.max_new_tokens is not None:
        config.max_length, config.max_new_tokens = None, sampling.max_new_tokens
    return config


def _eos_ids(model: Model, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return every id that ends a sequence: the model's list and the tokenizer's own."""
    config = model.generation_config
    own = None if config is None else config.eos_token_id
    ids = set(own) if isinstance(own, list) else {own}
    return {int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None}


def _pad_id(tokenizer: PreTrainedTokenizerBase, eos: set[int]) -> int:
    """Return the id to pad with; it is masked, so any will do when the tokenizer has none."""
    pad = tokenizer.pad_token_id
    return int(pad) if pad is not None else min(eos, default=0)


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
