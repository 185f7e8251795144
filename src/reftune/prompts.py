"""Messages and templates: Example(prompt, completion) -> tokens, and where the prompt ends.

This is the only place that turns a prompt into tokens. Training and generation both come here, so
the prompt that an adapter was trained on and the one it is used on are the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import compress
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast, get_args

from reftune.errors import DataError, ReftConfigError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["none", "chat", "alpaca", "commonsense"]
TemplateName = Literal["auto", "none", "chat", "alpaca", "commonsense"]
LongPrompts = Literal["error", "skip", "truncate_left"]

IGNORED_LABEL = -100

_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_COMMONSENSE_ANSWER = "the correct answer is "


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Instruction:
    """An instruction with an optional input, which each template sets in its own way."""

    text: str
    input: str = ""
    system: str | None = None


Prompt = str | tuple[Message, ...] | Instruction


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and the completion to learn.

    `fields` is the row it came from, for scoring, and `where` names that row ("file.jsonl:12").
    """

    prompt: Prompt
    completion: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""


@dataclass(frozen=True, slots=True)
class Encoded:
    """The tokens of an example; the first `prompt_length` of them are the prompt."""

    input_ids: list[int]
    prompt_length: int

    @property
    def labels(self) -> list[int]:
        """Return `input_ids` with -100 over the prompt."""
        return [IGNORED_LABEL] * self.prompt_length + self.input_ids[self.prompt_length :]


def resolve_template(
    template: TemplateName, tokenizer: PreTrainedTokenizerBase, prompt: Prompt
) -> Template:
    """Return the template that "auto" stands for, or check the one that was named.

    "auto" is "chat" if the tokenizer has a chat template, else "alpaca" for an Instruction, else
    "none".

    Raises:
        ReftConfigError: no such template, or "chat" with a tokenizer that has no chat template.
    """
    accepted = list(get_args(TemplateName))
    if template not in accepted:
        raise ReftConfigError(
            f"template is {template!r}; accepted: {', '.join(accepted)}."
            f"{did_you_mean(template, accepted)}"
        )
    if template == "auto":
        if tokenizer.chat_template:
            return "chat"
        return "alpaca" if isinstance(prompt, Instruction) else "none"
    if template == "chat" and not tokenizer.chat_template:
        raise ReftConfigError(
            "template is 'chat', and the tokenizer has no chat template. Use 'alpaca' or 'none', "
            "or set tokenizer.chat_template."
        )
    return template


def render_prompt(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, template: TemplateName
) -> str:
    """Return the text of a prompt, up to where the completion begins.

    Raises:
        DataError: the prompt is a conversation, and the template takes one instruction.
        ReftConfigError: the template is not accepted.
    """
    chosen = resolve_template(template, tokenizer, prompt)
    if chosen == "chat":
        return _render_chat(prompt, tokenizer)
    text, input = _single_turn(prompt, chosen)
    if chosen == "alpaca":
        # replace(), not format(): instructions may well contain braces
        before, after = (_ALPACA_WITH_INPUT if input else _ALPACA).split("{instruction}")
        return before + text + after.replace("{input}", input)
    text = f"{text}\n\n{input}" if input else text
    return f"{text}\n" if chosen == "commonsense" else text


def encode_prompt(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, template: TemplateName
) -> list[int]:
    """Return the tokens that generation starts from: exactly those that training had as prompt.

    Raises:
        DataError: the prompt comes to no token at all, or does not fit the template.
        ReftConfigError: the template is not accepted.
    """
    text = render_prompt(prompt, tokenizer, template)
    prefix = _special_prefix(tokenizer, resolve_template(template, tokenizer, prompt))
    return _prompt_ids(_tokenize([text], tokenizer)[0], prefix)


def truncate_prompt(
    ids: Sequence[int], length: int, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Return the last `length` tokens of a prompt, with a leading BOS kept in front."""
    if len(ids) <= length:
        return list(ids)
    # Models put much of their attention on BOS: without it every hidden state changes.
    bos = [ids[0]] if length > 1 and ids[0] == tokenizer.bos_token_id else []
    return bos + list(ids[len(ids) - length + len(bos) :])


def encode(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    template: TemplateName,
    max_length: int,
) -> Encoded:
    """Tokenise one example: the prompt as generation sees it, then the completion and its end.

    Raises:
        DataError: the prompt is empty, or leaves no room for a completion; names the row.
        ReftConfigError: the template is not accepted.
    """
    return encode_examples([example], tokenizer, template, max_length)[0]


def encode_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    template: TemplateName,
    max_length: int,
    long_prompts: LongPrompts = "error",
) -> list[Encoded]:
    """Tokenise examples in one batch; a completion that does not fit in `max_length` is cut.

    A prompt that leaves no room for one token of completion is an error, or is skipped, or
    ("truncate_left") loses its beginning so that the completion gets up to half of `max_length`.

    Raises:
        DataError: a prompt is empty, or too long under "error"; names the row.
        ReftConfigError: the template or `long_prompts` is not accepted.
    """
    _check_settings(max_length, long_prompts)
    encoded = []
    for example, prompt, completion in _tokenized(examples, tokenizer, template):
        if long_prompts == "truncate_left":
            room = min(len(completion), max_length // 2)
            prompt = truncate_prompt(prompt, max_length - room, tokenizer)
        elif len(prompt) > max_length - 1:
            if long_prompts == "skip":
                continue
            raise DataError(
                f"{example.where or 'An example'}: the prompt has {len(prompt)} tokens, which "
                f"leaves no room for a completion within max_length {max_length}. Raise "
                "max_length, or set long_prompts to 'skip' or 'truncate_left'."
            )
        encoded.append(Encoded((prompt + completion)[:max_length], len(prompt)))
    return encoded


def _check_settings(max_length: int, long_prompts: str) -> None:
    accepted = list(get_args(LongPrompts))
    if long_prompts not in accepted:
        raise ReftConfigError(
            f"long_prompts is {long_prompts!r}; accepted: {', '.join(accepted)}."
            f"{did_you_mean(long_prompts, accepted)}"
        )
    if max_length < 2:
        raise ReftConfigError(
            f"max_length is {max_length}; it must hold a prompt and a completion, so at least 2."
        )


def _tokenized(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, template: TemplateName
) -> list[tuple[Example, list[int], list[int]]]:
    """Return each example with the tokens of its prompt and of its completion, end included.

    The prompt is tokenised alone, because generation sees nothing else: the border between the
    two is the prompt's last token by construction. The completion's tokens are what prompt and
    completion together add to it. Where their tokens merge across the border the completion is
    tokenised alone, too (always doing so would give SentencePiece models a space too many).
    """
    chosen = [resolve_template(template, tokenizer, x.prompt) for x in examples]
    prefixes = {name: _special_prefix(tokenizer, name) for name in set(chosen)}
    turn_end = _turn_end(tokenizer) if "chat" in prefixes else []
    prompts = []
    for example in examples:
        with _naming(example):
            prompts.append(render_prompt(example.prompt, tokenizer, template))
    completions = [_completion_text(x, name) for x, name in zip(examples, chosen, strict=True)]
    together = [a + b for a, b in zip(prompts, completions, strict=True)]
    before = _tokenize(prompts, tokenizer)
    after = _added(before, _tokenize(together, tokenizer), completions, tokenizer)
    result = []
    for example, name, ids, added in zip(examples, chosen, before, after, strict=True):
        end = turn_end if name == "chat" else _eos(tokenizer)
        if end and added[-len(end) :] == end:
            end = []
        with _naming(example):
            prompt = _prompt_ids(ids, prefixes[name])
        result.append((example, prompt, added + end))
    return result


def _added(
    before: list[list[int]],
    together: list[list[int]],
    completions: list[str],
    tokenizer: PreTrainedTokenizerBase,
) -> list[list[int]]:
    """Return the completions' tokens; those that merge with the prompt's are tokenised alone."""
    merged = [b != t[: len(b)] for b, t in zip(before, together, strict=True)]
    alone = iter(_tokenize(list(compress(completions, merged)), tokenizer))
    return [
        next(alone) if merges else ids[len(prompt) :]
        for prompt, ids, merges in zip(before, together, merged, strict=True)
    ]


def _completion_text(example: Example, template: Template) -> str:
    text = example.completion
    if template == "commonsense" and not text.startswith(_COMMONSENSE_ANSWER):
        return _COMMONSENSE_ANSWER + text
    return text


def _single_turn(prompt: Prompt, template: Template) -> tuple[str, str]:
    """Return the prompt as one text and its input, with a system message set before the text."""
    if isinstance(prompt, str):
        return prompt, ""
    if isinstance(prompt, Instruction):
        before = f"{prompt.system}\n\n" if prompt.system else ""
        return before + prompt.text, prompt.input
    roles = [message["role"] for message in prompt]
    if roles not in (["user"], ["system", "user"]):
        raise DataError(
            f"the prompt is a conversation ({', '.join(roles)}), and the template {template!r} "
            "takes one user message, with or without a system message. Use the template 'chat'."
        )
    return "\n\n".join(message["content"] for message in prompt), ""


def as_messages(prompt: Prompt) -> list[Message]:
    """Return a prompt as the messages that a chat template takes."""
    if isinstance(prompt, str):
        return [Message(role="user", content=prompt)]
    if isinstance(prompt, Instruction):
        text = f"{prompt.text}\n\n{prompt.input}" if prompt.input else prompt.text
        system = [Message(role="system", content=prompt.system)] if prompt.system else []
        return [*system, Message(role="user", content=text)]
    return list(prompt)


def _render_chat(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> str:
    import jinja2

    messages = as_messages(prompt)
    try:
        # untyped border: with tokenize=False the answer is a text
        return cast(str, _apply_chat_template(tokenizer, messages, generate=True))
    except jinja2.TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"the tokenizer's chat template does not take these messages ({roles}): {error}"
        ) from error


def _apply_chat_template(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], generate: bool
) -> Any:
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    return tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=generate)


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end an assistant's turn, the last of them being eos.

    They are what the chat template writes after an assistant's text, up to eos. A template whose
    turns end otherwise (Gemma's <end_of_turn>) gets eos after that, so that generation stops
    whether or not its settings name the other token.
    """
    mark = "reftune-completion"
    turns = [Message(role="user", content="?"), Message(role="assistant", content=mark)]
    tail = _apply_chat_template(tokenizer, turns, generate=False).rpartition(mark)[2].rstrip()
    ids = _tokenize([tail], tokenizer)[0] if tail else []
    eos = _eos(tokenizer)
    if eos and eos[0] in ids:
        return ids[: ids.index(eos[0]) + 1]
    return ids + eos


def _eos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    eos = tokenizer.eos_token_id
    return [] if eos is None else [eos]


def _special_prefix(tokenizer: PreTrainedTokenizerBase, template: Template) -> list[int]:
    """Return the tokens that the tokenizer sets before a text (BOS), none for "chat".

    A chat template writes its own BOS. Tokens set after a text (eos, [SEP]) would end the prompt
    before the completion, so that the tokenizer's own way of adding both is not used.
    """
    if template == "chat":
        return []
    bare = _tokenize(["a"], tokenizer)[0]
    ids: list[int] = tokenizer("a").input_ids
    starts = range(len(ids) - len(bare) + 1)
    return next((ids[:at] for at in starts if ids[at : at + len(bare)] == bare), [])


def _prompt_ids(ids: list[int], prefix: list[int]) -> list[int]:
    """Set the prefix before a prompt's tokens, unless its text brought it along."""
    prompt = ids if ids[: len(prefix)] == prefix else prefix + ids
    if not prompt:
        raise DataError(
            "the prompt is empty, so there is no token to edit. Give it a text, or use a template "
            "that adds one."
        )
    return prompt


@contextmanager
def _naming(example: Example) -> Iterator[None]:
    """Set the example's row before the message of a DataError."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{example.where or 'An example'}: {error}") from error


def _tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if not texts:
        return []
    # verbose: no note on texts longer than the model takes; max_length is looked after here
    encoding = tokenizer(texts, add_special_tokens=False, verbose=False)
    return cast(list[list[int]], encoding.input_ids)
