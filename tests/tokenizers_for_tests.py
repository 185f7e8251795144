"""Tokenizers of the kinds that differ at a prompt's border, built offline."""

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

# The shape of ChatML, with a BOS written by the template itself.
CHAT = (
    "<s>{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Turns end with a token that is not eos, as Gemma's do; there is no system role.
CHAT_OWN_END = (
    "<s>{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('no system role') }}{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPECIAL = ["<pad>", "<s>", "</s>", "<end>", "<|user|>", "<|assistant|>", "<|system|>"]


def byte_tokenizer(
    merges: Sequence[tuple[str, str]] = (),
    chat_template: str | None = None,
    adds: str = "$A",
    pad: bool = True,
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE; `adds` says which specials surround a text ("<s> $A </s>")."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*_SPECIAL, *alphabet, *(left + right for left, right in merges)]
    vocab = {token: index for index, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return _wrap(core, chat_template, adds, pad)


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that sets a "▁" before a text, as Llama 2's does."""
    words = ["▁", "▁hi", "▁there", "\n", "hi", "there", "<unk>"]
    vocab = {token: index for index, token in enumerate([*_SPECIAL, *words])}
    merges = [("▁", "hi"), ("▁", "there")]
    letters = [c for c in "abcdefghijklmnopqrstuvwxyz" if c not in vocab]
    pairs = [("h", "i"), ("t", "h"), ("th", "e"), ("the", "r"), ("ther", "e")]
    for token in [*letters, *(left + right for left, right in pairs)]:
        vocab.setdefault(token, len(vocab))
    core = Tokenizer(models.BPE(vocab=vocab, merges=[*pairs, *merges], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    return _wrap(core, None, "<s> $A", pad=True)


def _wrap(
    core: Tokenizer, chat_template: str | None, adds: str, pad: bool
) -> PreTrainedTokenizerFast:
    core.add_special_tokens(_SPECIAL)
    if adds != "$A":
        named = [(token, core.token_to_id(token)) for token in ("<s>", "</s>")]
        core.post_processor = processors.TemplateProcessing(single=adds, special_tokens=named)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>" if pad else None,
        chat_template=chat_template,
    )
