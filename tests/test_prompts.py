"""Prompts: the border between prompt and completion, and that generation sees the same prompt."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from reftune.errors import DataError, ReftConfigError
from reftune.prompts import (
    Example,
    Instruction,
    Message,
    TemplateName,
    encode,
    encode_examples,
    encode_prompt,
    render_prompt,
    resolve_template,
    truncate_prompt,
)
from tokenizers_for_tests import CHAT, CHAT_OWN_END, byte_tokenizer, sentencepiece_tokenizer

CONVERSATION = (
    Message(role="system", content="Be kind."),
    Message(role="user", content="Hi"),
    Message(role="assistant", content="Hello"),
    Message(role="user", content="Bye"),
)
TOKENIZERS = {
    "bare": byte_tokenizer(),
    "bos": byte_tokenizer(adds="<s> $A"),
    "bos and eos": byte_tokenizer(adds="<s> $A </s>"),
    "eos": byte_tokenizer(adds="$A </s>"),
    "merging": byte_tokenizer([("Ċ", "Ċ"), (":", "Ċ")], adds="<s> $A"),
    "chat": byte_tokenizer(chat_template=CHAT, adds="<s> $A"),
    "chat with its own end": byte_tokenizer(chat_template=CHAT_OWN_END, adds="<s> $A"),
    "sentencepiece": sentencepiece_tokenizer(),
}
BOS, EOS = 1, 2


@pytest.fixture(params=TOKENIZERS.values(), ids=TOKENIZERS.keys())
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return request.param


@pytest.mark.parametrize("template", ["auto", "none", "alpaca", "commonsense"])
@pytest.mark.parametrize("prompt", ["hi there", Instruction("hi"), Instruction("hi", "there")])
def test_generation_sees_the_prompt_of_training(
    tokenizer: PreTrainedTokenizerFast, template: TemplateName, prompt: str | Instruction
) -> None:
    encoded = encode(Example(prompt, "\nhi"), tokenizer, template, 512)
    before = encoded.input_ids[: encoded.prompt_length]
    assert before == encode_prompt(prompt, tokenizer, template)
    assert before[-1] != EOS, "the prompt must not say that it is over"
    assert before.count(BOS) == (0 if tokenizer("hi").input_ids[0] != BOS else 1), "one BOS"
    after = encoded.input_ids[len(before) :]
    assert after.count(EOS) == 1
    assert after[-1] == EOS
    assert encoded.labels == [-100] * len(before) + after


@pytest.mark.parametrize("kind", ["bos", "merging", "chat", "sentencepiece"])
def test_the_tokens_say_the_texts(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    encoded = encode(Example("there\n", "hi"), tokenizer, "none", 64)
    assert tokenizer.decode(encoded.input_ids, skip_special_tokens=True) == "there\nhi"


def test_tokens_never_merge_across_the_border() -> None:
    tokenizer = TOKENIZERS["merging"]
    encoded = encode(Example("a:", "\nb"), tokenizer, "none", 64)
    pieces = tokenizer.convert_ids_to_tokens(encoded.input_ids)
    assert pieces == ["<s>", "a", ":", "Ċ", "b", "</s>"]
    assert encoded.prompt_length == 3


def test_a_text_that_brings_bos_gets_no_second_one() -> None:
    ids = encode_prompt("<s>hi", TOKENIZERS["bos"], "none")
    assert ids.count(BOS) == 1


def test_a_completion_that_brings_eos_gets_no_second_one() -> None:
    encoded = encode(Example("hi", "there</s>"), TOKENIZERS["bos"], "none", 64)
    assert encoded.input_ids.count(EOS) == 1


@pytest.mark.parametrize(
    ("kind", "end"), [("chat", "</s>"), ("chat with its own end", "<end></s>")]
)
def test_a_chat_completion_ends_as_the_template_ends_a_turn(kind: str, end: str) -> None:
    tokenizer = TOKENIZERS[kind]
    encoded = encode(Example("hi", "there"), tokenizer, "auto", 64)
    assert tokenizer.decode(encoded.input_ids[encoded.prompt_length :]) == "there" + end


def test_a_conversation_is_rendered_by_the_chat_template() -> None:
    text = render_prompt(CONVERSATION, TOKENIZERS["chat"], "chat")
    assert text == (
        "<s><|system|>Be kind.</s>\n<|user|>Hi</s>\n<|assistant|>Hello</s>\n<|user|>Bye</s>\n"
        "<|assistant|>"
    )


@pytest.mark.parametrize("chat_template", [CHAT, CHAT.removeprefix("<s>")])
@pytest.mark.parametrize("adds", ["$A", "<s> $A </s>"])
def test_a_chat_prompt_has_the_tokens_that_transformers_gives_it(
    chat_template: str, adds: str
) -> None:
    tokenizer = byte_tokenizer(chat_template=chat_template, adds=adds)
    theirs = tokenizer.apply_chat_template(list(CONVERSATION), add_generation_prompt=True)
    assert encode_prompt(CONVERSATION, tokenizer, "chat") == theirs["input_ids"]


def test_the_templates_of_the_paper() -> None:
    bare = TOKENIZERS["bare"]
    assert render_prompt(Instruction("Add {x}."), bare, "alpaca") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nAdd {x}.\n\n### Response:\n"
    )
    assert render_prompt(Instruction("Add {input}.", "{instruction} 2"), bare, "alpaca") == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {input}.\n\n### Input:\n{instruction} 2\n\n### Response:\n"
    )
    assert render_prompt("True or false?", bare, "commonsense") == "True or false?\n"
    assert render_prompt("as it is ", bare, "none") == "as it is "


@pytest.mark.parametrize("answer", ["true", "the correct answer is true"])
def test_a_commonsense_completion_says_the_correct_answer_once(answer: str) -> None:
    tokenizer = TOKENIZERS["bos"]
    encoded = encode(Example("T?", answer), tokenizer, "commonsense", 64)
    text = tokenizer.decode(encoded.input_ids, skip_special_tokens=True)
    assert text == "T?\nthe correct answer is true"


def test_an_input_and_a_system_message_reach_every_template() -> None:
    prompt = Instruction("Add.", "1 2", system="Be brief.")
    chat = render_prompt(prompt, TOKENIZERS["chat"], "chat")
    assert chat == "<s><|system|>Be brief.</s>\n<|user|>Add.\n\n1 2</s>\n<|assistant|>"
    assert render_prompt(prompt, TOKENIZERS["bare"], "none") == "Be brief.\n\nAdd.\n\n1 2"
    assert "### Instruction:\nBe brief.\n\nAdd.\n\n### Input:\n1 2\n" in render_prompt(
        prompt, TOKENIZERS["bare"], "alpaca"
    )


def test_auto_is_chat_then_alpaca_then_none() -> None:
    assert resolve_template("auto", TOKENIZERS["chat"], "hi") == "chat"
    assert resolve_template("auto", TOKENIZERS["bare"], Instruction("hi")) == "alpaca"
    assert resolve_template("auto", TOKENIZERS["bare"], "hi") == "none"


def test_a_long_completion_loses_its_end() -> None:
    encoded = encode(Example("hi", "a" * 20), TOKENIZERS["bos"], "none", 10)
    assert len(encoded.input_ids) == 10
    assert EOS not in encoded.input_ids, "a cut completion must not teach to stop"


def test_a_prompt_may_leave_room_for_one_token_but_not_for_none() -> None:
    tokenizer = TOKENIZERS["bos"]
    assert encode(Example("a" * 8, "b"), tokenizer, "none", 10).prompt_length == 9
    with pytest.raises(DataError, match=r"^f.jsonl:7: the prompt has 10 tokens.* max_length 10"):
        encode(Example("a" * 9, "b", where="f.jsonl:7"), tokenizer, "none", 10)


def test_long_prompts_are_skipped_or_cut_on_the_left() -> None:
    tokenizer = TOKENIZERS["bos"]
    examples = [Example("xy" + "a" * 20, "bc"), Example("hi", "d")]
    skipped = encode_examples(examples, tokenizer, "none", 10, "skip")
    assert [tokenizer.decode(e.input_ids) for e in skipped] == ["<s>hid</s>"]
    cut = encode_examples(examples, tokenizer, "none", 10, "truncate_left")
    assert [tokenizer.decode(e.input_ids) for e in cut] == ["<s>aaaaaabc</s>", "<s>hid</s>"]
    assert cut[0].prompt_length == 7


def test_a_cut_prompt_keeps_bos_and_its_length() -> None:
    tokenizer = TOKENIZERS["bos"]
    assert truncate_prompt([BOS, 11, 12, 13], 3, tokenizer) == [BOS, 12, 13]
    assert truncate_prompt([10, 11, 12, 13], 3, tokenizer) == [11, 12, 13]
    assert truncate_prompt([BOS, 11], 3, tokenizer) == [BOS, 11]


def test_encoding_one_is_encoding_many() -> None:
    tokenizer = TOKENIZERS["chat"]
    examples = [Example("hi", "there"), Example(CONVERSATION, "so long")]
    many = encode_examples(examples, tokenizer, "auto", 200)
    assert many == [encode(example, tokenizer, "auto", 200) for example in examples]
    assert encode_examples([], tokenizer, "auto", 200) == []


@pytest.mark.parametrize("kind", ["merging", "sentencepiece"])
def test_encoding_one_is_encoding_many_where_some_merge_across_the_border(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    borders = [("a:", "\nb"), ("hi", "there"), ("x\n", "\ny"), ("hi ", " hi"), ("t", "here")]
    examples = [Example(before, after) for before, after in borders * 2]
    many = encode_examples(examples, tokenizer, "none", 64)
    assert many == [encode(example, tokenizer, "none", 64) for example in examples]


def test_completions_that_merge_are_tokenised_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    call = PreTrainedTokenizerFast.__call__

    def count(*args: Any, **settings: Any) -> Any:
        calls.append(1)
        return call(*args, **settings)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", count)
    counts = []
    for n in (2, 20):
        calls.clear()
        encode_examples([Example("a:", "\nb")] * n, TOKENIZERS["merging"], "none", 64)
        counts.append(len(calls))
    assert counts[0] == counts[1]


def test_errors_name_the_row_and_what_to_do() -> None:
    bare, chat = TOKENIZERS["bare"], TOKENIZERS["chat with its own end"]
    with pytest.raises(DataError, match=r"f:1: the prompt is empty"):
        encode(Example("", "x", where="f:1"), bare, "none", 10)
    with pytest.raises(DataError, match=r"the prompt is empty"):
        encode_prompt("", bare, "none")
    with pytest.raises(DataError, match=r"f:2: .*conversation.*Use the template 'chat'"):
        encode(Example(CONVERSATION, "x", where="f:2"), bare, "alpaca", 10)
    with pytest.raises(DataError, match=r"f:3: .*does not take these messages.*no system role"):
        encode(Example(CONVERSATION, "x", where="f:3"), chat, "chat", 10)
    with pytest.raises(ReftConfigError, match="no chat template"):
        encode(Example("hi", "x"), bare, "chat", 10)
    with pytest.raises(ReftConfigError, match=r"'alpacca'.*Did you mean 'alpaca'"):
        encode(Example("hi", "x"), bare, "alpacca", 10)  # type: ignore[arg-type]
    with pytest.raises(ReftConfigError, match="long_prompts is 'drop'; accepted: error, skip"):
        encode_examples([], bare, "none", 10, "drop")  # type: ignore[arg-type]
    with pytest.raises(ReftConfigError, match="max_length is 1"):
        encode(Example("hi", "x"), bare, "none", 1)
